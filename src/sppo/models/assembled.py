"""A policy's model from its name: read in the right dtype, quantised where the recipe says so, with its adapter inside."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, RecipeError
from .adapters import Adapters, base_of, is_adapter
from .loading import choose_dtype, load, load_config, outline
from .multimodal import place
from .weights import counted, parameter_count

KEY = "policy.model"


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
    if not quantize:
        model, tokenizer = load(name, role=KEY, head=True, seed=seed)
        chosen, why = choose_dtype(dtype, parameter_count(model), device)
        return place(model, device, chosen), tokenizer, why
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"policy.quantize = {quantize!r} needs bitsandbytes: pip install 'sppo[adapters]'")
    if name.partition(":")[0] == "tiny":  # only what is read from files is quantised on the way
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(name, role=KEY, head=True, seed=seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return _base(folder, dtype, quantize, device, seed)
    chosen, why = choose_dtype(dtype, parameter_count(outline(name, role=KEY, head=True)), device)
    done = hasattr(load_config(name, KEY), "quantization_config")  # a folder that holds them quantised, such as a run's
    how = {} if done else {"quantization_config": _quantization(quantize, chosen)}
    model, tokenizer = load(name, role=KEY, head=True, seed=seed, dtype=chosen, device_map={"": device}, **how)
    return model.requires_grad_(False), tokenizer, why


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


def given_adapters(model: Any, adapter: Any, seed: int) -> tuple[Any, Adapters | None]:
    """The transformers model of one that Python code brings, and its adapters: a PeftModel's own, or a new one.

    Raises ModelError where a PeftModel is to get a second one, or a quantised model none."""
    peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if peft and adapter is not None:
        raise ModelError(
            "the given model has an adapter already, which is trained; leave peft_config (or [adapter]) out"
        )
    if peft:
        adapters = Adapters(model)
        return adapters.model, adapters
    if getattr(model, "quantization_method", None) is not None and adapter is None:
        raise ModelError(
            "the given model is quantised, so its weights cannot be trained: add peft_config (or [adapter])"
        )
    return model, None if adapter is None else Adapters.onto(model, adapter, seed=seed)
