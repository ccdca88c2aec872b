"""Sampling on a CPU in compiled code: a pass of a Llama-like model (Llama, SmolLM, Mistral, Qwen 2 and 3), `decode.c`.

A decoding step is some twenty small operations a layer on a few rows each: in PyTorch, half its time is spent between
the matrix products and in attention made for many queries (docs/performance.md). For every call of the engine the
matrices are copied anew into the order in which the products read them: nothing can go stale. Where there is no
compiler, sampling goes through the model's own layers, and says so.

The product of an adapter (LoRA) is computed beside the matrix's, and rounded where the learner rounds it: added to a
bfloat16 matrix, most of an update would be rounded away (docs/performance.md). A quantised matrix is dequantised when
it is copied.

Left out: AMX tiles, for want of a machine to see them right on; sliding windows; DoRA; any architecture whose layers
are not Llama's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ...memory import lazy_zeros
from ..low_rank import base_of, dense, is_adapted, is_known, is_quantised, low_rank
from .build import library

KINDS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
LARGE = 2**25
"""Bytes to compute in that are not kept for passes that need few."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fits(model: Any) -> bool:
    """Whether a model is one that `decode.c` knows: transformers' own class with its own layers (no wrapped weights, no
    hooks; `low_rank.is_known` says which adapters and quantised matrices), ordinary options, and the other weights on
    the CPU in float32 or bfloat16."""
    kind = type(model)
    if kind.__name__ not in KINDS or not kind.__module__.startswith("transformers.models."):
        return False
    config, head, embedding = model.config, model.get_output_embeddings(), model.get_input_embeddings()
    ordinary = config.hidden_act in ("silu", "swish") and getattr(config, "sliding_window", None) is None
    linear = [m for name, m in model.named_modules() if name.rpartition(".")[2] in _PROJECTIONS]
    known = all(map(is_known, linear)) and len(linear) == len(_PROJECTIONS) * config.num_hidden_layers
    if (
        not (ordinary and known and type(head) is nn.Linear and type(embedding) is nn.Embedding)
        or head.bias is not None
        or any(base_of(layer.mlp.down_proj).bias is not None for layer in model.model.layers)
        or any(type(m).__module__.startswith("peft.") and not is_adapted(m) for m in model.modules())
    ):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    packed = {m.weight for m in map(base_of, linear) if is_quantised(m)}
    rest = {(type(p), p.dtype, p.device.type, p.is_contiguous()) for p in model.parameters() if p not in packed}
    plain = [{(nn.Parameter, dtype, "cpu", True)} for dtype in (torch.float32, torch.bfloat16)]
    return rest in plain and all(w.device.type == "cpu" for w in packed) and len(embedding.weight) >= len(head.weight)


_TENSORS = (
    "norm", "qkv", "o", "qkv_bias", "o_bias", "q_norm", "k_norm", "mlp_norm", "gate_up", "down", "keys", "values",
)  # fmt: skip
_BESIDE = ("qkv_beside", "o_beside", "gate_up_beside", "down_beside")
_SIZES = ("layers", "hidden", "heads", "groups", "size", "inner", "vocabulary", "rank")


class _LowRank(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "scale")), ("rank", ctypes.c_long)]


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in _TENSORS), *((name, _LowRank) for name in _BESIDE)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in _SIZES),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    long, pointer, model = ctypes.c_long, ctypes.c_void_p, ctypes.POINTER(_Model)
    lib.room_bytes.argtypes, lib.room_bytes.restype = [model, long, long, long], long
    lib.pack.argtypes, lib.pack.restype = [pointer, long, long, long, long, pointer], None
    lib.read_tokens.argtypes, lib.read_tokens.restype = (
        [model, ctypes.POINTER(_Tokens), long, pointer, long, long, pointer, pointer],
        None,
    )
    lib.lanes.restype = lib.pair.restype = long
    return lib


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "slots", "positions", "cosine", "sine")),
        ("columns", ctypes.c_long),
    ]


def _room(size: int) -> Tensor:
    """Bytes to compute in. Many, for whole prompts, are mapped by themselves: they go back to the machine before keys and values grow."""
    if size > LARGE:
        return lazy_zeros(size, dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device="cpu")


class Decoder:
    """Steps the sequences in a cache of slots (rollout/kv_cache.py), with the weights that the model has now."""

    def __init__(self, model: Any, slots: Any) -> None:
        if not fits(model):
            raise ValueError("it is not a model that decode.c knows")
        self._library = _declared(library("decode", model.dtype))
        self._slots, self.threads, self._dtype = slots, torch.get_num_threads(), model.dtype
        config, layers = model.config, model.model.layers
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        position_1P = torch.arange(slots.longest, device="cpu")[None]
        turns = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device="cpu"), position_1P)
        if turns[0].size(-1) != size:
            raise ValueError("its rotary embedding turns only a part of each head")
        self._cos_PS, self._sin_PS = (t[0, :, : size // 2].contiguous() for t in turns)
        self._tensors: list[Tensor] = []  # what the pointers below point at
        self._layers = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))
        head = model.get_output_embeddings().weight
        self._model = _Model(
            len(layers), config.hidden_size, heads, config.num_key_value_heads, size, config.intermediate_size,
            len(head), max(getattr(layer, name).rank for layer in self._layers for name in _BESIDE),
            config.rms_norm_eps, layers[0].self_attn.scaling, self._at(model.get_input_embeddings().weight),
            self._at(model.model.norm.weight), self._at(self._packed(head)), self._layers,
        )  # fmt: skip
        self._rows = len(model.get_input_embeddings().weight)
        filled = len(head) + -len(head) % self._library.lanes()
        self._logits_BV = torch.empty(slots.count, filled, dtype=torch.float32, device="cpu")[:, : len(head)]
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._blank = torch.empty(1, config.num_key_value_heads, 1, size, dtype=model.dtype, device="cpu")

    def next_logits(self, ids_N: Tensor, last_W: Tensor | None = None) -> Tensor:
        """Float32 logits after new tokens, [W, V], good until the next call.

        Args:
            ids_N: the tokens, for the places that the slots expect (`write_prompts`, `write_next`); keys and values
                are written there.
            last_W: the rows whose logits are wanted, at most as many as there are slots; all if not given.
        """
        slots = self._slots
        ids_N, slot_N, position_N = (
            x.to("cpu", torch.int64).contiguous() for x in (ids_N, slots.slot_N, slots.column_N)
        )
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < self._rows:
            raise IndexError(f"a token id is beyond the embedding's {self._rows} rows")
        last_W = torch.arange(len(ids_N)) if last_W is None else last_W.to("cpu", torch.int64).contiguous()
        for mine, theirs in zip(self._layers, slots.layers, strict=True):
            if not theirs.is_initialized:
                theirs.lazy_initialization(self._blank, self._blank)
            mine.keys, mine.values = theirs.key_store.data_ptr(), theirs.value_store.data_ptr()
        need = self._library.room_bytes(self._model, len(ids_N), int(position_N.max()) + 1, self.threads)
        if need > len(self._room) or 4 * need < len(self._room) - LARGE:
            self._room = _room(2 * need)
        tokens = _Tokens(
            ids_N.data_ptr(), slot_N.data_ptr(), position_N.data_ptr(), self._cos_PS.data_ptr(),
            self._sin_PS.data_ptr(), slots.columns,
        )  # fmt: skip
        self._library.read_tokens(
            self._model, tokens, len(ids_N), last_W.data_ptr(), len(last_W), self.threads, self._room.data_ptr(),
            self._logits_BV.data_ptr(),
        )  # fmt: skip
        return self._logits_BV[: len(last_W)]

    @torch.no_grad()
    def _layer(self, layer: Any) -> _Layer:
        """A layer's tensors; absent ones stay null."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        tensors = {
            "norm": layer.input_layernorm.weight, "mlp_norm": layer.post_attention_layernorm.weight,
            "qkv": self._packed(torch.cat([self._matrix(x) for x in qkv])),
            "o": self._packed(self._matrix(attention.o_proj)), "down": self._packed(self._matrix(mlp.down_proj)),
            "gate_up": self._packed(*(self._matrix(x) for x in gate_up)),
        }  # fmt: skip
        if base_of(qkv[0]).bias is not None:
            tensors["qkv_bias"] = self._filled(torch.cat([base_of(x).bias for x in qkv]))
        if base_of(attention.o_proj).bias is not None:
            tensors["o_bias"] = self._filled(base_of(attention.o_proj).bias)
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(attention, name, None)) is not None:
                tensors[name] = norm.weight
        beside = {
            "qkv_beside": self._beside(*qkv), "o_beside": self._beside(attention.o_proj),
            "gate_up_beside": self._beside(*gate_up, in_turns=True), "down_beside": self._beside(mlp.down_proj),
        }  # fmt: skip
        return _Layer(**{name: self._at(tensor) for name, tensor in tensors.items()}, **beside)

    def _matrix(self, layer: Any) -> Tensor:
        return dense(base_of(layer), self._dtype)

    def _beside(self, *layers: Any, in_turns: bool = False) -> _LowRank:
        """The active adapters of layers that read the same: A's one below the other, B's along a diagonal. in_turns: a
        register of one layer's results, then one of the next's."""
        found = [low_rank(layer) for layer in layers]
        some = [x for x in found if x is not None]
        if not some:
            return _LowRank()
        sizes, made = [base_of(layer).out_features for layer in layers], some[0].b_NR.new_zeros
        a_RK = torch.cat([x.a_RK for x in some])
        b_NR = torch.block_diag(*(x.b_NR if x else made(n, 0) for x, n in zip(found, sizes, strict=True)))
        scale_N = torch.cat(
            [made(n, dtype=torch.float32) + (x.scale if x else 0) for x, n in zip(found, sizes, strict=True)]
        )
        parts = sizes if in_turns else [len(b_NR)]
        scale = torch.stack([self._filled(part).view(-1, self._library.lanes()) for part in scale_N.split(parts)], 1)
        b = self._packed(*b_NR.split(parts))
        return _LowRank(self._at(self._packed(a_RK)), self._at(b), self._at(scale), len(a_RK))

    def _at(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _filled(self, x: Tensor) -> Tensor:
        """Rows up to a whole number of registers, the last ones 0."""
        return torch.cat([x, x.new_zeros(-len(x) % self._library.lanes(), *x.shape[1:])])

    def _packed(self, *weights_NK: Tensor) -> Tensor:
        """Matrices of one shape as decode.c multiplies with them: [N / lanes, one after the other, K / pair, lanes,
        pair]."""
        lanes, pair = self._library.lanes(), self._library.pair()
        count, k = weights_NK[0].shape
        packed = weights_NK[0].new_empty(-(-count // lanes), len(weights_NK), -(-k // pair), lanes, pair)
        for n, weight_NK in enumerate(weights_NK):
            self._library.pack(weight_NK.data_ptr(), count, k, len(weights_NK), self.threads, packed[:, n].data_ptr())
        return packed
