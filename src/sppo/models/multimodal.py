"""Models that read more than text (Gemma 3, Qwen-VL, Mistral 3): their decoder of text and its head are trained; towers
and projectors are neither trained nor rounded, and a checkpoint holds them again.

Left out: images themselves. Prompts are text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from .head import backbone
from .weights import cast

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What a processor is made from, beside its tokenizer."""


def reads_more_than_text(config: Any) -> bool:
    """Whether a config is of a decoder of text and something else."""
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def text_config(model: Any) -> Any:
    """The config of a model, or of its decoder of text."""
    return model.config.get_text_config()


def causal_class(config: Any) -> Any:
    """transformers' class that generates text with the whole of a checkpoint: the one that it was saved from, where it
    reads more than text."""
    if not reads_more_than_text(config):
        return AutoModelForCausalLM
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    whole = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if whole and named.can_generate() else AutoModelForImageTextToText


def text_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and parameters of the decoder of text and of its head: all, of a model that reads nothing else."""
    if not reads_more_than_text(getattr(model, "config", None)):
        yield from model.named_parameters()
        return
    mine = {id(p) for part in _text_parts(model) for p in part.parameters()}
    yield from ((name, p) for name, p in model.named_parameters() if id(p) in mine)


def freeze_rest(model: nn.Module) -> None:
    """Train nothing but the decoder of text and its head."""
    for p in _rest(model):
        p.requires_grad_(False)


def narrow_rest(model: Any, dtype: Any) -> None:
    """Give what is not trained of a float32 model the dtype of its checkpoint back, where that rounds nothing."""
    for p in _rest(model):
        if p.dtype == torch.float32 and isinstance(dtype, torch.dtype) and torch.equal(p.to(dtype).float(), p):
            p.data = p.data.to(dtype)


def place(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a model; of one that reads more than text, the rest keeps its dtype. (It goes along to the device: some
    models take the first weight's device for their own.)"""
    for part in _text_parts(model) if reads_more_than_text(model.config) else [model]:
        cast(part, dtype)
    return model.to(device)


def shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of a model may share with it (`copy.deepcopy`'s memo): all that never changes."""
    return {id(p): p for p in _rest(model)}


def processor_files(model: Any) -> dict[str, bytes]:
    """The files of a model's processor, from where its weights were loaded; none for a model of text."""
    if not reads_more_than_text(model.config) or not model.name_or_path:
        return {}
    found = {}
    for name in PROCESSOR_FILES:
        path = cached_file(
            model.name_or_path, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        if path is not None:
            found[name] = Path(path).read_bytes()
    return found


def _text_parts(model: Any) -> list[nn.Module]:
    return [part for part in (backbone(model), model.get_output_embeddings()) if part is not None]


def _rest(model: nn.Module) -> list[nn.Parameter]:
    mine = {id(p) for _, p in text_parameters(model)}
    return [p for p in model.parameters() if id(p) not in mine]
