"""A policy's model from its name: read in the right dtype, quantised where the recipe says so, with its adapter inside."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from ..errors import ModelError, RecipeError
from ..files import read_json
from ..spec import GIVEN, is_import
from .adapters import Adapters, base_of, is_adapter
from .loading import choose_dtype, existing, load, load_config, outline
from .multimodal import place
from .weights import counted, parameter_count

KEY = "policy.model"
KINDS = ("nf4", "fp4", "int8")
"""What bitsandbytes holds."""


@dataclass(frozen=True)
class Assembled:
    """A model that can be trained, or a frozen one with adapters in it."""

    model: Any
    tokenizer: Any
    adapters: Adapters | None
    base: dict[str, str]
    """Of adapters, what they stand on: `name`, `dtype`, `quantize`, and its `fingerprint` where it is known."""
    stated: str
    """Size, dtype and why, for the user."""


def load_model(
    name: str, *, dtype: str, device: torch.device, seed: int, adapter: Any = None, quantize: str = ""
) -> Assembled:
    """The model of a folder (an adapter's too), a hub name or `tiny:…`, on its device.

    Args:
        dtype: a recipe's `policy.dtype`.
        adapter: what to put into it: a recipe's [adapter], peft's own config, or None.
        quantize: "", "nf4" or "int8".

    Raises:
        ModelError: it cannot be loaded, or its adapter is of another model.
        RecipeError: an adapter in an adapter, targets that match nothing, a package that is missing.
    """
    saved = is_adapter(name)
    if saved and adapter is not None:
        raise RecipeError(
            f"{KEY} = {name!r} holds an adapter, which is trained on: leave [adapter] out, or name its base, "
            f"{base_of(Path(name))['name']}"
        )
    base = base_of(Path(name).expanduser()) if saved else {"name": name, "quantize": quantize}
    quantize = quantize or base.get("quantize", "")
    if quantize and not saved and adapter is None:
        raise RecipeError(f"policy.quantize = {quantize!r} freezes the weights: add [adapter], trained beside them")
    if saved and dtype == "auto":
        dtype = base.get("dtype", "auto")
    model, tokenizer, why = _base(base["name"], dtype, quantize, device, seed)
    quantize = quantised(model.config)
    count, kind = parameter_count(model), str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    stated = (
        f"{counted(count)} parameters in {f'{quantize}, computed in ' if quantize else ''}{kind} on {device} ({why})"
    )
    if not saved and adapter is None:
        return Assembled(model, tokenizer, None, {}, stated)
    adapters = Adapters.read(model, Path(name).expanduser()) if saved else Adapters.onto(model, adapter, seed=seed)
    trained = sum(p.numel() for p in adapters.named(adapters.name).values())
    here = {"name": _absolute(base["name"]), "dtype": kind, "quantize": quantize}
    if any(base.get(key, here[key]) != here[key] for key in ("dtype", "quantize")):
        base.pop("fingerprint", None)  # of the same weights, rounded otherwise
    base |= here
    return Assembled(
        model, tokenizer, adapters, base, f"{stated}, frozen, and an adapter of {counted(trained)} parameters"
    )


def _base(name: str, dtype: str, quantize: str, device: torch.device, seed: int) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and why it has its dtype."""
    is_tiny = name.partition(":")[0] == "tiny"
    there = "" if is_tiny else quantised(load_config(existing(name, KEY), KEY))
    if there and quantize not in ("", there):
        raise RecipeError(f"policy.quantize = {quantize!r}: {name} was saved in {there}; leave policy.quantize out")
    if not quantize and not there:
        model, tokenizer = load(name, role=KEY, head=True, seed=seed)
        chosen, why = choose_dtype(dtype, parameter_count(model), device)
        return place(model, device, chosen), tokenizer, why
    if (quantize or there) in KINDS and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"policy.quantize = {quantize or there!r} needs bitsandbytes: pip install 'sppo[adapters]'")
    if is_tiny:  # only what is read from files is quantised on the way
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(name, role=KEY, head=True, seed=seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return _base(folder, dtype, quantize, device, seed)
    chosen, why = choose_dtype(dtype, parameter_count(outline(name, role=KEY, head=True)), device)
    how = {} if there else {"quantization_config": _quantization(quantize, chosen)}
    model, tokenizer = load(name, role=KEY, head=True, seed=seed, dtype=chosen, device_map={"": device}, **how)
    for p in model.parameters():
        if p.is_floating_point() and p.device.type == "cpu":
            p.data = p.data.clone()  # what is not quantised would keep the whole file mapped
    return model.requires_grad_(False), tokenizer, why


def quantised(config: Any) -> str:
    """How the weights of a model with this config are held: "nf4", "int8", transformers' name of another way, or ""."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    get = found.get if isinstance(found, dict) else partial(getattr, found)
    four, eight = get("load_in_4bit", False), get("load_in_8bit", False)
    kind = get("bnb_4bit_quant_type", "fp4") if four else "int8" if eight else get("quant_method", "other")
    return str(getattr(kind, "value", kind))


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' options: QLoRA's for four bits (arXiv 2305.14314), its scales quantised once more."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of every product
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _absolute(name: str) -> str:
    """A folder's whole path: who loads the adapter may stand elsewhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def can_be_named(name: str) -> bool:
    """Whether a base model can be loaded again by its name: a folder's, or a hub's."""
    return name.partition(":")[0] != "tiny" and not is_import(name, "sppo.models") and name != GIVEN


def on(model: Any, device: torch.device) -> Any:
    """The model on a device; a quantised one must be where it was loaded to."""
    return model if quantised(model.config) else model.to(device)


def name_of(model: Any) -> str:
    """The name by which a model that Python code brings can be loaded again, to the same weights: the folder or hub
    name that it is from. "" where there is none, where the weights were changed since, and where they are quantised,
    which can be done in many ways."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name or quantised(model.config):
        return ""
    state = {n.replace(".base_layer.", "."): p for n, p in model.state_dict().items() if ".lora_" not in n}
    missing = {p.data_ptr() for p in state.values()}
    for path in _weight_files(name):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a file is no mapping
                if key in state:
                    if not torch.equal(file.get_tensor(key).to(state[key]), state[key]):
                        return ""
                    missing.discard(state[key].data_ptr())
    return "" if missing else _absolute(name)


def _weight_files(name: str) -> list[str]:
    """The files of a model's weights that are on this machine."""
    find = partial(cached_file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    with contextlib.suppress(OSError):
        if (whole := find(name, "model.safetensors")) is not None:
            return [whole]
        if (index := find(name, "model.safetensors.index.json")) is not None:
            return [str(Path(index).parent / shard) for shard in {*read_json(Path(index))["weight_map"].values()}]
    return []


def given_adapters(model: Any, adapter: Any, seed: int) -> tuple[Any, Adapters | None]:
    """The transformers model of one that Python code brings, and its adapters: a PeftModel's own, or a new one.

    Raises ModelError where a PeftModel is to get a second one, or a quantised model none."""
    if hasattr(model, "active_peft_config"):
        if adapter is not None:
            raise ModelError("the given model has an adapter already, which is trained; leave peft_config out")
        adapters = Adapters.given(model)
        return adapters.model, adapters
    if quantised(model.config) and adapter is None:
        raise ModelError(
            "the given model is quantised, so its weights cannot be trained: add peft_config (or [adapter])"
        )
    return model, None if adapter is None else Adapters.onto(model, adapter, seed=seed)
