"""Loading models: a folder, a hub name or `tiny:…`; every way this goes wrong is one sentence that says what to do."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..errors import ModelError
from ..files import first_line, read_json, readable
from ..spec import call, parse_spec
from ..types import Task
from . import tiny
from .head import backbone
from .multimodal import causal_class, narrow_rest, reads_more_than_text
from .pull import SOURCES

transformers.utils.logging.disable_progress_bar()

MOST_LAYERS = 10_000
"""Of a model that is loaded; no model has a tenth of that."""
LARGE = 50_000_000
"""Parameters from which bfloat16 pays; below, a step is dominated by other things and float32 is simply more exact."""


CLASSES = {"AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16", "AVX-512": "avx512_f", "AVX2": "avx2"}
"""Classes of processors, the fastest first, by what PyTorch calls their instructions; the first two multiply bfloat16
natively."""


def processor(device: torch.device) -> str:
    """What computes: a GPU, or a processor with its class and its threads: `AMD EPYC (AVX2), threads: 2`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = torch.cpu.get_capabilities()
    name = found.get("cpu_name") or platform.machine()
    kind = next((f" ({kind})" for kind, key in CLASSES.items() if found.get(key)), "")
    return f"{name}{kind}, threads: {torch.get_num_threads()}"


def native_bfloat16(device: torch.device) -> str | None:
    """What multiplies bfloat16 natively here (`CUDA`, `AMX`, `AVX512-BF16`), or None."""
    if device.type == "cuda":
        return "CUDA" if torch.cuda.is_bf16_supported() else None
    found = torch.cpu.get_capabilities()
    return next((kind for kind in ("AMX", "AVX512-BF16") if found.get(CLASSES[kind])), None)


def choose_dtype(
    requested: str, parameters: int, device: torch.device, *, elsewhere: bool = False
) -> tuple[torch.dtype, str]:
    """The dtype for `policy.dtype` / `critic.dtype`, and the reason, to be stated at start. `elsewhere`: a GPU that is
    not here, and not asked."""
    if requested != "auto":
        return getattr(torch, requested), "as asked"
    hardware = "CUDA" if elsewhere else native_bfloat16(device)
    if hardware and parameters >= LARGE:
        return torch.bfloat16, f"{parameters / 1e6:.0f}M parameters, and {hardware} multiplies it natively"
    if parameters < LARGE:
        return torch.float32, f"{parameters / 1e6:.2g}M parameters: nothing to gain from bfloat16"
    return torch.float32, "no native bfloat16 on this machine"


def outline(name: str, *, role: str, head: bool) -> Any:
    """The model without its weights (on the meta device), to count with; a folder needs its config.json only. The
    same errors as `load`.

    Never runs code that comes with a model (`auto_map`): a model that needs it is refused."""
    if name == "tiny" or name.startswith("tiny:"):
        return load(name, role=role, head=head)[0]
    name = existing(name, role, weights=False)
    with readable(f"{role}: {name} cannot be loaded", ModelError), torch.device("meta"):
        config = load_config(name, role)
        factory = causal_class(config) if head else AutoModel
        if hasattr(factory, "from_config"):
            return factory.from_config(config, trust_remote_code=False)
        return factory(config)


def load_config(name: str, role: str) -> Any:
    """The config of a model folder or hub name; code that comes with a model is never run. Raises ModelError."""
    with readable(f"{role}: {name} has no config that can be read", ModelError):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:  # making them would take for ever
            raise ValueError(f"num_hidden_layers is {layers!r}")
        return config


def load_weights(factory: Any, name: str, role: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of a folder or hub name by one of transformers' factories, in the dtype that it was saved in unless
    `options` say another, and transformers' report of what it lacked. Raises ModelError."""
    with readable(f"{role}: {name} cannot be loaded", ModelError):
        options = {"dtype": "auto", "output_loading_info": True, "trust_remote_code": False} | options
        model, report = factory.from_pretrained(name, **options)
        return model, report


def saved_dtype(folder: str) -> str:
    """The dtype that a saved model folder holds: a checkpoint comes back as it was, whatever this machine would
    choose. Raises ModelError."""
    path = Path(folder) / "config.json"
    with readable(f"{path} cannot be read", ModelError):
        config = read_json(path)
        text = config.get("text_config")  # of a model that reads more, the part that is trained
        dtype = (text if isinstance(text, dict) and "dtype" in text else config).get("dtype", "float32")
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"its dtype is {dtype!r}")
        return str(dtype)


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str, *, role: str, head: bool, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """The model, in the dtype that it was saved in, and its tokenizer for a folder, hub name or `tiny:…` spec.

    Args:
        role: `policy.model` or `critic.model`, to name the key in errors.
        head: with a language-model head (`AutoModelForCausalLM`, or the class of a checkpoint that reads more than
            text), or the backbone alone (`AutoModel`, or its decoder of text).
        seed: initialises what is made from scratch.
        options: of transformers' `from_pretrained`.

    Raises:
        ModelError: no such folder, no weights in it, no tokenizer, or nothing that can generate.
    """
    if name == "tiny" or name.startswith("tiny:"):
        return call(tiny.build, "tiny", seed=seed, head=head, **parse_spec(name).options)
    name = existing(name, role)
    config = load_config(name, role)
    if head and config.is_encoder_decoder:
        raise ModelError(f"{role}: {name} is an encoder-decoder ({config.model_type}); a policy must be a causal LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head and reads_more_than_text(config):  # so that what is not trained is not rounded either (multimodal.py)
            options = {"dtype": torch.float32} | options
        model, report = load_weights(causal_class(config) if head else AutoModel, name, role, **options)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # a critic reads no pooler
    if missing:
        raise ModelError(
            f"{role}: {name} lacks weights for {missing[0]} ({len(missing)} in all); is it a whole "
            f"{'causal LM' if head else 'model'}?"
        )
    if head:
        narrow_rest(model, config.dtype)
    elif reads_more_than_text(config):
        model = backbone(model)
    return model, load_tokenizer(name, role)


def load_tokenizer(name: str, role: str) -> Any:
    """The tokenizer of a model folder or hub name, with a pad token: its own, or its EOS (padding is always masked)."""
    with readable(f"{role}: {name} has no tokenizer that can be loaded", ModelError):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        ensure_pad(tokenizer, f"{role}: {name}")
        tokenizer.decode(tokenizer("3+4 = seven\n")["input_ids"])  # some that are broken say so when they are used
        return tokenizer


def ensure_pad(tokenizer: Any, where: str) -> int:
    """The pad id: the tokenizer's own, or its EOS or UNK (padding is masked everywhere, so which one does not
    matter)."""
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ModelError(f"{where} has a tokenizer with neither a pad nor an EOS token; add one to it")
        tokenizer.pad_token = substitute
    return int(tokenizer.pad_token_id)


def render_chat(tokenizer: Any, task: Task, answer: bool = True) -> str:
    """Chat messages through the template, open for the assistant's turn (`answer`); the row's `tools`, if it has any,
    go along.

    Raises ModelError where the template refuses: one row's conversation, whatever the template raises.
    """
    try:
        rendered: str = tokenizer.apply_chat_template(
            task.prompt, tools=_tools(task), tokenize=False, add_generation_prompt=answer
        )
        return rendered
    except MemoryError:
        raise
    except Exception as error:  # a template is a program
        raise ModelError(
            f"task {task.id}: the model's chat template refuses this conversation: {first_line(error)}"
        ) from error


def prompt_ids(tokenizer: Any, task: Task, chat: bool) -> list[int]:
    """A prompt's ids: chat messages through the template (`chat`), anything else as plain text; never two BOS in a row.

    A template writes its own BOS, and a plain prompt may have been rendered before it became a row: the tokenizer's
    own BOS would be a second.
    """
    if chat and not isinstance(task.prompt, str):
        ids = tokenizer(render_chat(tokenizer, task), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(task.text)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    while start is not None and ids[:2] == [start, start]:
        ids = ids[1:]
    return list(ids)


def embedded(ids: list[int], rows: int, name: str) -> list[int]:
    """The ids. Raises ModelError where one is beyond the `rows` of the model's embedding: a tokenizer of another model,
    or one that was changed."""
    if ids and max(ids) >= rows:
        raise ModelError(
            f"{name}: its tokenizer gives the id {max(ids)}, and the model has {rows} embeddings: they are not of "
            "one model"
        )
    return ids


def _tools(task: Task) -> list[Any] | None:
    """The functions that a row describes for the template (tasks/records.py); None for a column of that name that is
    something else."""
    tools = task.columns.get("tools")
    described = isinstance(tools, list) and all(
        isinstance(t, dict) and ("function" in t or "parameters" in t) for t in tools
    )
    return tools if described and tools else None


def existing(name: str, role: str, weights: bool = True) -> str:
    """The name, if it is a usable folder (with `weights`, unless they are not needed) or may be a hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, role, weights)
        name = str(folder)
    elif folder.name in SOURCES:
        raise ModelError(f"{role}: there is no folder {name} yet; fetch it with: sppo pull {folder.name} --to {name}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise ModelError(f"{role}: there is no folder {name}")
    return name


def _check_folder(folder: Path, role: str, weights: bool) -> None:
    if not (folder / "config.json").exists():
        inner = next((p.parent for p in sorted(folder.glob("**/config.json"))), None)
        hint = f"; did you mean {inner}?" if inner else ""
        raise ModelError(f"{role}: {folder} has no config.json, so it is not a model folder{hint}")
    files = [
        p
        for pattern in ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
        for p in folder.glob(pattern)
    ]
    if odd := [p.name for p in sorted(files) if not p.is_file()]:  # a pipe would be read for ever
        raise ModelError(f"{role}: {folder}/{odd[0]} is no regular file, so {folder} cannot be loaded")
    if weights and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{role}: {folder} has a config.json but no weights (*.safetensors); was the download cut off?"
        )
