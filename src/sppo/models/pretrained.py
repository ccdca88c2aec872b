"""Loading models: a folder, a hub name or `tiny:…`; every way this goes wrong is one sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError
from ..spec import call, parse_spec
from ..types import Task
from . import tiny
from .pull import SOURCES

transformers.utils.logging.disable_progress_bar()

LARGE = 50_000_000
"""Parameters from which bfloat16 pays; below, a step is dominated by other things and float32 is simply more exact."""


def native_bfloat16(device: torch.device) -> str | None:
    """What multiplies bfloat16 natively here (`CUDA`, `AMX`, `AVX512-BF16`), or None."""
    if device.type == "cuda":
        return "CUDA" if torch.cuda.is_bf16_supported() else None
    for name, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")):
        if torch.cpu.get_capabilities().get(key):
            return name
    return None


def choose_dtype(requested: str, parameters: int, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype for `policy.dtype` / `critic.dtype`, and the reason, to be stated at start."""
    if requested != "auto":
        return getattr(torch, requested), "as the recipe says"
    hardware = native_bfloat16(device)
    if hardware and parameters >= LARGE:
        return torch.bfloat16, f"{parameters / 1e6:.0f}M parameters, and {hardware} multiplies it natively"
    if parameters < LARGE:
        return torch.float32, f"{parameters / 1e6:.2g}M parameters: nothing to gain from bfloat16"
    return torch.float32, "no native bfloat16 on this machine"


def outline(name: str, *, role: str, head: bool) -> Any:
    """The model without its weights (on the meta device), to count with; the same errors as `load`."""
    if name == "tiny" or name.startswith("tiny:"):
        return load(name, role=role, head=head)[0]
    name = existing(name, role)
    try:
        with torch.device("meta"):
            return (AutoModelForCausalLM if head else AutoModel).from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{role}: {name} cannot be loaded: {first_line(error)}") from error


def saved_dtype(folder: str) -> str:
    """The dtype that a saved model folder holds: a checkpoint comes back as it was, whatever this machine would choose."""
    return str(json.loads((Path(folder) / "config.json").read_text()).get("dtype", "float32"))


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str, *, role: str, head: bool, seed: int = 0) -> tuple[Any, Any]:
    """The float32 model and its tokenizer for a folder, hub name or `tiny:…` spec.

    Args:
        role: `policy.model` or `critic.model`, to name the key in errors.
        head: with a language-model head (`AutoModelForCausalLM`), or the backbone alone (`AutoModel`).
        seed: initialises what is made from scratch.

    Raises:
        ModelError: no such folder, no weights in it, no tokenizer, or nothing that can generate.
    """
    if name == "tiny" or name.startswith("tiny:"):
        return call(tiny.build, "tiny", seed=seed, head=head, **parse_spec(name).options)
    name = existing(name, role)
    try:
        config = AutoConfig.from_pretrained(name)
        if head and config.is_encoder_decoder:
            raise ModelError(
                f"{role}: {name} is an encoder-decoder ({config.model_type}); a policy must be a causal LM"
            )
        factory = AutoModelForCausalLM if head else AutoModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = factory.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{role}: {name} cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # a critic reads no pooler
    if missing:
        raise ModelError(
            f"{role}: {name} lacks weights for {missing[0]} ({len(missing)} in all); is it a whole {'causal LM' if head else 'model'}?"
        )
    return model, load_tokenizer(name, role)


def load_tokenizer(name: str, role: str) -> Any:
    """The tokenizer of a model folder or hub name, with a pad token: its own, or its EOS (padding is always masked)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{role}: {name} has no tokenizer that can be loaded: {first_line(error)}") from error
    ensure_pad(tokenizer, f"{role}: {name}")
    return tokenizer


def ensure_pad(tokenizer: Any, where: str) -> int:
    """The pad id: the tokenizer's own, or its EOS or UNK (padding is masked everywhere, so which one does not matter)."""
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ModelError(f"{where} has a tokenizer with neither a pad nor an EOS token; add one to it")
        tokenizer.pad_token = substitute
    return int(tokenizer.pad_token_id)


def render_chat(tokenizer: Any, task: Task, answer: bool = True) -> str:
    """Chat messages through the template, open for the assistant's turn (`answer`); what the template refuses becomes a sentence."""
    try:
        return tokenizer.apply_chat_template(task.prompt, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(
            f"task {task.id}: the model's chat template refuses this conversation: {first_line(error)}"
        ) from error


def existing(name: str, role: str) -> str:
    """The name, if it is a usable folder or may be a hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, role)
        name = str(folder)
    elif folder.name in SOURCES:
        raise ModelError(f"{role}: there is no folder {name} yet; fetch it with: sppo pull {folder.name} --to {name}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise ModelError(f"{role}: there is no folder {name}")
    return name


def _check_folder(folder: Path, role: str) -> None:
    if not (folder / "config.json").exists():
        inner = next((p.parent for p in sorted(folder.glob("**/config.json"))), None)
        hint = f"; did you mean {inner}?" if inner else ""
        raise ModelError(f"{role}: {folder} has no config.json, so it is not a model folder{hint}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{role}: {folder} has a config.json but no weights (*.safetensors); was the download cut off?"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
