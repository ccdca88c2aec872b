"""Model folders for elsewhere: an adapter with what it stands on, or its sum with it as one model."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import ModelError
from ..files import read_json
from .adapters import ADAPTER_FILE, BASE_FILE, base_of
from .loading import load_config
from .merging import merge
from .multimodal import place, text_config
from .policy import Policy

BASE = "base"
"""The folder of a base model that is nowhere else, in a run or in an export."""


def copy_adapter(source: Path, part: Path, final: Path) -> dict[str, str]:
    """Write the adapter of a folder to `part`, which will be called `final`; a base that is the run's own goes with it.
    Returns `base_of` the copy. Raises ModelError where the base is a folder that is gone."""
    base = base_of(source)
    there = Path(base["name"])
    if there.is_absolute() and not there.is_dir():
        raise ModelError(f"{source}: its base model, {there}, is not there any more; put it back")
    shutil.copytree(source, part, ignore=shutil.ignore_patterns(BASE), dirs_exist_ok=True)
    if there.name == BASE and (there.parent == source.resolve() or (there.parent / "recipe.toml").exists()):
        shutil.copytree(there, part / BASE)
        base["name"] = str(final.resolve() / BASE)
    config = read_json(part / ADAPTER_FILE) | {"base_model_name_or_path": base["name"]}
    (part / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n")
    if (part / BASE_FILE).exists():
        (part / BASE_FILE).write_text(json.dumps(base, indent=1) + "\n")
    with contextlib.suppress(OSError):  # not every model has one
        GenerationConfig.from_pretrained(str(there)).save_pretrained(str(part))
    return base


def write_merged(source: Path, part: Path) -> dict[str, str]:
    """Write the sum of an adapter and its base as one model: in the dtype that the base was published in, each weight
    added up in float32 and rounded once. Returns what the base is. Raises ModelError where the base is quantised."""
    base = base_of(source)
    if base.get("quantize"):
        raise ModelError(
            f"--merged: the base of {source} is quantised ({base['quantize']}), and a sum would be rounded to few bits; leave "
            "--merged out, and load the adapter on the base as it was trained"
        )
    policy, _ = Policy.load(str(source), dtype="auto", device=torch.device("cpu"), seed=0)
    own = _published(load_config(base["name"], "policy.model"), policy.dtype)
    assert policy.adapters is not None
    place(policy.model, policy.device, torch.promote_types(own, policy.dtype))
    try:
        merge(policy.adapters)
    except ModelError as error:
        raise ModelError(f"--merged: {source} cannot be merged: {error}; leave --merged out") from None
    text_config(place(policy.model, policy.device, own)).dtype = own
    policy.save_base(part)
    return base


def _published(config: Any, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of a published model's weights for text."""
    found = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or otherwise
    return getattr(torch, found) if isinstance(found, str) else found
