"""Decoding on a CPU in compiled code: one step of a Llama-like model (Llama, SmolLM, Mistral, Qwen 2 and 3), `decode.c`.

A decoding step is some twenty small operations a layer on a few rows each: in PyTorch, half its time is spent between the matrix
products and in attention made for many queries (docs/performance.md). The C file is compiled for this processor when it is first
needed, in two or three seconds, and kept in the user's cache. The weights are the model's own tensors, read where they are: there is nothing to
copy and nothing to go stale. Where there is no compiler, sampling goes through the model's own layers instead, and says so.

Left out: AMX tiles, for want of a machine to see them right on; sliding windows; any architecture whose layers are not Llama's.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("decode.c")
COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
KINDS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fits(model: Any) -> bool:
    """Whether a model is one that `decode.c` knows: transformers' own class with its own layers (no adapters, no wrapped weights, no
    hooks), ordinary options, and weights on the CPU in float32 or bfloat16."""
    kind = type(model)
    if kind.__name__ not in KINDS or not kind.__module__.startswith("transformers.models."):
        return False
    config, head = model.config, model.get_output_embeddings()
    ordinary = config.hidden_act in ("silu", "swish") and getattr(config, "sliding_window", None) is None
    linear = [m for name, m in model.named_modules() if name.rpartition(".")[2] in _PROJECTIONS]
    plain = (
        all(type(m) is nn.Linear for m in (*linear, head))
        and len(linear) == len(_PROJECTIONS) * config.num_hidden_layers
    )
    if (
        not (ordinary and plain)
        or head.bias is not None
        or any(layer.mlp.down_proj.bias is not None for layer in model.model.layers)
    ):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    weights = {(type(p), p.dtype, p.device.type, p.is_contiguous()) for p in model.parameters()}
    known = [{(nn.Parameter, dtype, "cpu", True)} for dtype in (torch.float32, torch.bfloat16)]
    return weights in known and len(model.get_input_embeddings().weight) >= len(head.weight)


class NoCompiler(Exception):
    """The C code cannot be had here; the message says why."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled `decode.c` for weights of a dtype. Raises NoCompiler."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # PyTorch loads its OpenMP for all to see, where it has one
        raise NoCompiler("PyTorch runs without GNU OpenMP here")
    try:
        compiler = _compiler()
        flags = [*COMPILE, f"-DBF16={int(dtype == torch.bfloat16)}"]
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        told = "\n".join([SOURCE.read_text(), *flags, version, _processor()])
        path = _cache() / f"decode-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, flags, path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError, UnicodeError) as error:
        raise NoCompiler(str(error)) from None


def _compiler() -> list[str]:
    """`$CC`, or what a machine calls its C compiler."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"]]:
        if shutil.which(command[0]):
            return command
    raise NoCompiler(f"no C compiler ({given[0] if given else 'cc, gcc'}) is installed")


def _cache() -> Path:
    """The user's cache where nobody else can write; else a folder of this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sppo"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    made = Path(tempfile.mkdtemp(prefix="sppo-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _compile(compiler: list[str], flags: list[str], path: Path) -> None:
    """Atomic: another process may be doing the same. Linked without OpenMP, whose symbols come from the copy that PyTorch has loaded:
    the threads of two copies would spin for each other."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder, "decode.o"), Path(folder, path.name)
        for command in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", str(made)],
            [*compiler, "-shared", str(made), "-o", str(linked), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "error" in line] or [
                    f"exit code {done.returncode}"
                ]
                raise NoCompiler(f"{compiler[0]} does not compile {SOURCE.name}: {said[0].strip()}")
        with linked.open("rb") as file:
            os.fsync(file.fileno())  # a library cut short by a lost supply of power would crash whoever loads it
        linked.replace(path)


def _processor() -> str:
    """What this processor can do: a cache in a home that machines share must not serve another kind."""
    flags = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {next(flags, platform.node())}"


_TENSORS = (
    "norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "mlp_norm", "gate", "up", "down", "keys", "values",
)  # fmt: skip
_SIZES = ("layers", "hidden", "heads", "groups", "size", "inner", "vocabulary")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _TENSORS]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in _SIZES),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    long, pointer = ctypes.c_long, ctypes.c_void_p
    lib.room_bytes.argtypes, lib.room_bytes.restype = [ctypes.POINTER(_Model), long, long, long], long
    lib.step.argtypes = [ctypes.POINTER(_Model), long, *[pointer] * 4, long, long, pointer, pointer]
    lib.step.restype = None
    return lib


class Decoder:
    """Steps the sequences in a cache of slots (rollout/slots.py), for as long as neither weights nor cache are replaced by others."""

    def __init__(self, model: Any, slots: Any) -> None:
        if not fits(model):
            raise ValueError("it is not a model that decode.c knows")
        self._library = library(model.dtype)
        self._slots, self.threads = slots, torch.get_num_threads()
        config, layers = model.config, model.model.layers
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        position_1P = torch.arange(slots.longest, device="cpu")[None]
        turns = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device="cpu"), position_1P)
        if turns[0].size(-1) != size:
            raise ValueError("its rotary embedding turns only a part of each head")
        self._cos_PS, self._sin_PS = (t[0, :, : size // 2].contiguous() for t in turns)
        self._layers = (_Layer * len(layers))(*(_Layer(**_weights(layer)) for layer in layers))
        head = model.get_output_embeddings().weight
        self._model = _Model(
            len(layers), config.hidden_size, heads, config.num_key_value_heads, size, config.intermediate_size, len(head),
            config.rms_norm_eps, layers[0].self_attn.scaling, model.get_input_embeddings().weight.data_ptr(),
            model.model.norm.weight.data_ptr(), head.data_ptr(), self._layers,
        )  # fmt: skip
        self._logits_BV = torch.empty(slots.count, len(head), dtype=torch.float32, device="cpu")
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")

    def next_logits(self, ids_B: Tensor, length_B: Tensor, columns: int) -> Tensor:
        """Float32 logits after one more token of each of the first B slots, [B, V], good until the next call.

        Args:
            ids_B: the new tokens; their keys and values are written into the slots.
            length_B: how many tokens are in each slot already: also the new token's position.
            columns: those of the longest sequence, new token included.
        """
        ids_B, length_B = (x.to("cpu", torch.int64).contiguous() for x in (ids_B, length_B))
        rows = len(ids_B)
        self._slots.write_next(length_B, columns)  # which may make the slots longer, elsewhere
        for mine, theirs in zip(self._layers, self._slots.layers, strict=True):
            mine.keys, mine.values = theirs.key_store.data_ptr(), theirs.value_store.data_ptr()
        need = self._library.room_bytes(self._model, rows, columns, self.threads)
        if need > len(self._room):
            self._room = torch.empty(2 * need, dtype=torch.uint8, device="cpu")
        self._library.step(
            self._model, rows, ids_B.data_ptr(), length_B.data_ptr(), self._cos_PS.data_ptr(), self._sin_PS.data_ptr(),
            self._slots.columns, self.threads, self._room.data_ptr(), self._logits_BV.data_ptr(),
        )  # fmt: skip
        return self._logits_BV[:rows]


def _weights(layer: Any) -> dict[str, int]:
    """Where a layer's tensors are; absent ones stay null."""
    attention, mlp = layer.self_attn, layer.mlp
    found = {
        "norm": layer.input_layernorm.weight, "mlp_norm": layer.post_attention_layernorm.weight,
        "gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight,
    }  # fmt: skip
    for name in "qkvo":
        projection = getattr(attention, f"{name}_proj")
        found |= {name: projection.weight, f"{name}_bias": projection.bias}
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        found[name] = None if norm is None else norm.weight
    return {name: tensor.data_ptr() for name, tensor in found.items() if tensor is not None}
