"""Decoding on a CPU in compiled code: one step of a Llama-like model (Llama, SmolLM, Mistral, Qwen 2 and 3), `decode.c`.

A decoding step is some twenty small operations a layer on a few rows each: in PyTorch, half its time is spent between the matrix
products and in attention made for many queries (docs/performance.md). The weights are the model's own tensors, read where they are: there is nothing to
copy and nothing to go stale. Where there is no compiler, sampling goes through the model's own layers instead, and says so.

Left out: AMX tiles, for want of a machine to see them right on; sliding windows; any architecture whose layers are not Llama's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import library

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
        self._library = _declared(library("decode", model.dtype))
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
