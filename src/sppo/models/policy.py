"""The policy: a causal language model, its tokenizer, and the two questions the loop asks of it.

`prompt_ids(task)`: what the model reads. `response_logps(...)`: how likely it finds given responses.

Sequences are packed (packed.py): no padding is computed. A model that cannot be packed gets them right-padded, where causal
attention alone keeps padding out. Dropout is off in every pass: old and current log-probabilities come from the same function.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError
from ..files import readable
from ..kernels import attention as packing
from ..kernels.cuda.attention import HALF
from ..kernels.cuda.head import exact_logits, wide_products
from ..kernels.logprobs import exact_products, token_logps, token_logps_from_logits
from ..kernels.patch_layers import fusable, fused
from ..objective.ratio import wide
from ..types import Message, Task
from .loading import choose_dtype, embedded, ensure_pad, first_line, load, prompt_ids, render_chat
from .narrow import narrow_linear
from .turns import continuation_ids

LANES = 8 * 4096
"""Bytes that a fingerprint adds up beside each other."""


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities and entropies of responses, [B, T] with zeros beyond each response's length; mask is bool."""

    logp_BT: Tensor
    entropy_BT: Tensor
    mask_BT: Tensor


class Policy:
    """A causal LM to train. Public tensors are float32 (float64 models stay float64)."""

    def __init__(self, model: Any, tokenizer: Any, *, chat_template: str = "auto", name: str = "policy") -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.chat = chat_template == "auto" and bool(getattr(tokenizer, "chat_template", None))
        self.eos_ids = _eos_ids(model, tokenizer, name)
        self.pad_id: int = ensure_pad(tokenizer, f"policy.model: {name}")
        self.direct_head = self._head_is_a_projection()
        self._checkpointed: list[Any] = []
        self._fused: tuple[Any, list[Any]] | None = None
        self.unpacked_why = ""
        self.packs = self._packing_holds()

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, seed: int, chat_template: str = "auto"
    ) -> tuple[Policy, str]:
        """Load `policy.model`; also returns the sentence that states size, dtype and why."""
        model, tokenizer = load(name, role="policy.model", head=True, seed=seed)
        parameters = parameter_count(model)
        chosen, why = choose_dtype(dtype, parameters, device)
        with readable(f"policy.model: {name} cannot be used", ModelError):
            policy = cls(model.to(device=device, dtype=chosen), tokenizer, chat_template=chat_template, name=name)
        style = "chat template" if policy.chat else "plain text (no chat template)"
        head = "" if policy.direct_head else "; its head is more than a projection, so full logits are held"
        padded = "" if policy.packs else f"; updates are padded, not packed: {policy.unpacked_why}"
        return policy, (
            f"policy {name}: {_count(parameters)} parameters in {str(chosen).removeprefix('torch.')} on {device} ({why}); "
            f"{style}{head}{padded}"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int | None:
        """The most positions the model can attend to, or None when its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def reference(self) -> Policy:
        """A frozen copy: π_ref."""
        frozen = Policy.__new__(Policy)
        frozen.__dict__.update(self.__dict__)
        frozen.__dict__.pop("_head_cache", None)  # this policy goes on writing to its own
        frozen.model, frozen._checkpointed = copy.deepcopy(self.model).requires_grad_(False).eval(), []
        return frozen

    # -- text and ids --------------------------------------------------------------------------------------------

    def prompt_ids(self, task: Task) -> list[int]:
        """The ids the model reads for a task: chat messages through the template, text as it is; one BOS at most."""
        ids = embedded(prompt_ids(self.tokenizer, task, self.chat), self.model, self.name)
        if self.chat and not isinstance(task.prompt, str):
            return ids
        if not isinstance(task.prompt, str) and any(m["role"] == "assistant" for m in task.prompt):
            raise ModelError(
                f"task {task.id} is a conversation, and {self.name} has no chat template; use a chat model or plain-text prompts"
            )
        if ids and ids[-1] in self.eos_ids:  # some tokenizers close what they tokenise; a prompt must stay open
            ids = ids[:-1]
        return ids

    def continuation_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that an environment's messages put between a reply of the policy and its next one (turns.py)."""
        eos = self.rendered(self.eos_ids[:1])
        return embedded(continuation_ids(self.tokenizer, messages, chat=self.chat, eos=eos), self.model, self.name)

    def refuses(self, task: Task) -> str | None:
        """Why a prompt cannot be put to this model, or None: its template refuses it, or it is a conversation and there is no template."""
        if isinstance(task.prompt, str) or (not self.chat and len(task.prompt) == 1):
            return None  # nothing to render
        try:
            render_chat(self.tokenizer, task) if self.chat else self.prompt_ids(task)
        except ModelError as error:
            return str(error).removeprefix(f"task {task.id}: ")
        return None

    def rendered(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens included: a prompt as the model reads it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def response_ids(self, text: str) -> list[int]:
        """The ids of a response to be learnt by supervision: its text, then the EOS."""
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_ids[0]]
        return embedded(ids, self.model, self.name)

    def probe(self, prompt: int, response: int) -> tuple[list[int], list[int]]:
        """Pseudo-random ids for the engine's canary, the same for every model of a vocabulary: so many of a prompt, of a response."""
        vocabulary = self.model.get_input_embeddings().weight.size(0)
        ids = torch.randint(vocabulary, (prompt + response,), generator=torch.Generator().manual_seed(0)).tolist()
        room = max(1, min(prompt, (self.context or 10**9) - response))
        return ids[:room], ids[prompt:]

    def text(self, ids: Sequence[int]) -> str:
        """The text of response ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # -- log-probabilities ---------------------------------------------------------------------------------------

    def response_logps(
        self, ids_BL: Tensor, prompt_len_B: Tensor, response_len_B: Tensor, temperature: float
    ) -> ResponseLogps:
        """log π(y_t | x, y_<t) of each response token, with gradient where enabled: for `backward()`. (On a CPU the embedding's part goes
        straight into its `.grad`, unseen by `torch.autograd.grad` and by hooks on the weight: lent.py.)

        Args:
            ids_BL: prompt then response then padding, on any device.
            prompt_len_B, response_len_B: lengths in tokens; prompts have at least one.
            temperature: the sampling temperature.

        The state at position t−1 scores the token at position t. Only response positions meet the vocabulary.
        """
        ids_BL = ids_BL.to(self.device)
        prompt_len_B, response_len_B = prompt_len_B.to(self.device), response_len_B.to(self.device)
        width = int(response_len_B.max()) if response_len_B.numel() else 0
        step_T = torch.arange(width, device=self.device)
        mask_BT = step_T[None, :] < response_len_B[:, None]
        row_N, t_N = mask_BT.nonzero(as_tuple=True)
        position_N = prompt_len_B[row_N] + t_N
        target_N = ids_BL[row_N, position_N]
        # the last token is scored, but nothing follows that it could predict
        inputs = self._packed_inputs if self.packs else self._padded_inputs
        inputs_1, state_N = inputs(ids_BL, prompt_len_B + response_len_B - 1, row_N, position_N - 1)
        with fused(self.fusable()), self._checkpointing():
            if self.direct_head:
                hidden_ND = self._backbone()(use_cache=False, **inputs_1).last_hidden_state.flatten(0, 1)[state_N]
                head = self.model.get_output_embeddings()
                bias = getattr(head, "bias", None)
                logp_N, entropy_N = token_logps(hidden_ND, head.weight, bias, target_N, temperature)
            else:
                with self._wide_head():
                    logits_NV = self._logits_at(inputs_1, state_N)
                logp_N, entropy_N = token_logps_from_logits(logits_NV, target_N, temperature)
        blank = torch.zeros(mask_BT.shape, dtype=logp_N.dtype, device=self.device)
        return ResponseLogps(blank.index_put((row_N, t_N), logp_N), blank.index_put((row_N, t_N), entropy_N), mask_BT)

    def checkpoint_activations(self) -> None:
        """From now on training passes keep only the layers' inputs, and compute the layers again in the backward pass."""
        self._checkpointed = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not self._checkpointed:
            raise ModelError(
                f"training.checkpoint_activations: {self.name} has no layers that transformers could checkpoint"
            )

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """transformers' own switch works in training mode only, where dropout is on; so the layers are wrapped here, while
        gradients are wanted."""
        layers = self._checkpointed if torch.is_grad_enabled() else []
        for layer in layers:
            layer.forward = partial(checkpoint, partial(self._again, layer.forward), use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _again(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A layer as it was computed the first time: the backward pass comes when nothing is lent any more."""
        with fused(self.fusable()):
            return forward(*args, **kwargs)

    def fusable(self) -> list[Any]:
        """What `fused` takes, asked once for the model as it is."""
        now = (self.model, self.dtype, self.device)
        if self._fused is None or self._fused[0] != now:
            self._fused = (now, fusable(self.model))
        return self._fused[1]

    @torch.no_grad()
    def given_logps(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of each token of given responses to given prompts, at temperature 1."""
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        width = max(map(len, rows))
        ids_BL = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows])
        prompt_len_B, response_len_B = (torch.tensor([len(x) for x in part]) for part in (prompts, responses))
        logp_BT = self.response_logps(ids_BL, prompt_len_B, response_len_B, 1.0).logp_BT
        return [logps[: len(r)] for logps, r in zip(logp_BT.tolist(), responses, strict=True)]

    def squared_score(self, logp_BT: Tensor) -> Tensor:
        """(1 − π)² of each token, [B, T]: the squared length of its score in logits, but for a factor between 1 and 2."""
        return (1 - logp_BT.exp()).square()

    def _padded_inputs(
        self, ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """A rectangle, padded on the right, and where the wanted states lie in it."""
        width = int(length_B.max())
        return {"input_ids": ids_BL[:, :width]}, row_N * width + position_N

    def _packed_inputs(
        self, ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """One row of nothing but tokens, and where the wanted states lie in it."""
        column_L = torch.arange(ids_BL.size(1), device=ids_BL.device)
        real_BL = column_L < length_B[:, None]
        packed = {
            "input_ids": ids_BL[real_BL][None],
            "position_ids": column_L.expand_as(ids_BL)[real_BL][None],
            **packing.boundaries(length_B.tolist()),
        }
        return packed, (length_B.cumsum(0) - length_B)[row_N] + position_N

    @torch.no_grad()
    def _packing_holds(self) -> bool:
        """Whether packed sequences leave each other alone, at every position of three; if not, padding it is."""
        before = self.model.config._attn_implementation
        vocabulary = self.model.get_input_embeddings().weight.size(0)
        ids_BL = (torch.arange(3)[:, None] * 7 + torch.arange(9) * 3 + 1).remainder(vocabulary).to(self.device)
        length_B = torch.tensor([9, 6, 6], device=self.device)
        row_N, position_N = (torch.arange(9, device=self.device) < length_B[:, None]).nonzero(as_tuple=True)
        try:
            inputs, state_N = self._padded_inputs(ids_BL, length_B, row_N, position_N)
            apart_NV = self.model(use_cache=False, **inputs).logits.flatten(0, 1)[state_N].log_softmax(-1)
            packing.use(self.model)
            inputs, state_N = self._packed_inputs(ids_BL, length_B, row_N, position_N)
            packed_NV = self.model(use_cache=False, **inputs).logits.flatten(0, 1)[state_N].log_softmax(-1)
            if (packed_NV - apart_NV).abs().max() <= packing.TOLERANCE[self.dtype] * apart_NV.abs().max():
                return True
            self.unpacked_why = "its packed sequences see each other"
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            self.unpacked_why = first_line(error)
        self.model.set_attn_implementation(before)
        return False

    def next_logits(self, last_N: Tensor | None = None, **inputs: Any) -> Tensor:
        """Float32 logits of the tokens to come, for engines: after each row's last one, [B, V], or after the tokens at `last_N`
        of a single packed row, [N, V]."""
        if not self.direct_head:
            keep = 1 if last_N is None else last_N
            with self._wide_head():
                logits_BSV = wide(self.model(use_cache=True, logits_to_keep=keep, **inputs).logits)
            return logits_BSV[:, -1] if last_N is None else logits_BSV[0]
        hidden_BSD = self._backbone()(use_cache=True, **inputs).last_hidden_state
        hidden_ND = hidden_BSD[:, -1] if last_N is None else hidden_BSD[0, last_N]
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if hidden_ND.is_cuda and hidden_ND.dtype in HALF and wide_products():
            logits = exact_logits(hidden_ND, head.weight)
            return logits if bias is None else logits + bias.float()
        weight = self.float32_head()
        with exact_products(head.weight.dtype):
            return narrow_linear(hidden_ND.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    def float32_head(self) -> Tensor:
        """The output projection in float32, converted once for each version of the weights rather than once a token, and always in the same
        place: a captured step reads it there (rollout/cuda_graphs.py)."""
        weight: Tensor = self.model.get_output_embeddings().weight
        if weight.dtype in (torch.float32, torch.float64):
            return weight
        version, cached = getattr(self, "_head_cache", (-1, None))
        if cached is None or version != weight._version:
            with torch.inference_mode(False), torch.no_grad():  # so that it may be written to in any mode
                if cached is None or cached.shape != weight.shape or cached.device != weight.device:
                    cached = torch.empty_like(weight, dtype=torch.float32)
                cached.copy_(weight)
            self._head_cache = (weight._version, cached)
        return cached

    def _logits_at(self, inputs: dict[str, Any], state_N: Tensor) -> Tensor:
        """Logits of the wanted positions of a training pass, [N, V]; the head sees no others where the model lets them be chosen."""
        if self.packs:
            logits_NV = self.model(use_cache=False, logits_to_keep=state_N, **inputs).logits[0]
            if len(logits_NV) == len(state_N):
                return logits_NV
        else:
            logits_NV = self.model(use_cache=False, **inputs).logits.flatten(0, 1)
        return logits_NV[state_N]

    @contextlib.contextmanager
    def _wide_head(self) -> Iterator[None]:
        """Let the model's own output projection give float32, so that whatever the model does to its logits (caps, scales) is done in float32:
        in bfloat16 a logit of 20 is only known to 0.06. A head that is no plain linear layer stays as it is."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or head.weight.dtype in (torch.float32, torch.float64):
            yield
            return
        before = head.__dict__.get("forward")
        head.forward = partial(self._wide_product, head)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del head.forward
            if before is not None:  # narrow.py's
                head.forward = before  # type: ignore[method-assign]

    def _wide_product(self, head: Any, hidden: Tensor) -> Tensor:
        weight = head.weight.float() if torch.is_grad_enabled() else self.float32_head()
        bias = None if head.bias is None else head.bias.float()
        with exact_products(head.weight.dtype):
            return torch.nn.functional.linear(hidden.float(), weight, bias)

    def _backbone(self) -> Any:
        return self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model

    @torch.no_grad()
    def _head_is_a_projection(self) -> bool:
        """Ask the model: some scale or cap their logits (Gemma 2, Granite, Cohere), and then the plain path is used. Small logits would pass
        through a cap all but unchanged, so the model is also shown large ones."""
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(head, "weight"):
            return False
        ids = torch.arange(4, device=self.device)[None] % head.weight.size(0)
        try:
            hidden = self._backbone()(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model(input_ids=ids, use_cache=False).logits
        except (AttributeError, TypeError):
            return False
        mine = torch.nn.functional.linear(hidden, head.weight, getattr(head, "bias", None))
        if mine.shape != logits.shape or not torch.allclose(mine.float(), logits.float(), rtol=1e-3, atol=1e-3):
            return False
        large = torch.linspace(-100, 100, logits.size(-1), device=self.device).expand(logits.shape).clone()
        handle = head.register_forward_hook(lambda *_: large)
        try:
            shown = self.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        unseen = torch.equal(shown, logits)  # a model that multiplies with the weight itself
        return unseen or torch.allclose(shown.double(), large.double(), rtol=1e-2)

    # -- identity --------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A cheap hash of the weights, bit for bit (see `fingerprint`)."""
        return fingerprint(self.model)

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights at about memory speed, the same on every device: 32 hexadecimal digits.

    Bytes are taken as rows of 4,096 lanes of eight bytes. Each word is multiplied by an odd number of its row's own, its upper half is folded
    into its lower one, and each lane is summed modulo 2⁶⁴; names and lanes go through BLAKE2b. Per word that is one-to-one, so weights that
    differ in one word of a lane never have the same sum; moved or swapped blocks, and any other change that was not made for it, have with a
    chance of about 2⁻³² a lane or less. The multipliers are public: who wants two policies of one fingerprint can construct them. Files are
    vouched for by SHA-256 (audit/chain.py).
    """
    total = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().reshape(-1)
        if flat.storage_offset() * flat.element_size() % 8:  # eight bytes must be whole
            flat = flat.clone()
        bits = flat.view(torch.uint8)
        whole = len(bits) - len(bits) % LANES
        total.update(f"{name}:{len(bits)}:".encode())
        total.update(_lanes(bits[:whole].view(torch.int64).view(-1, LANES // 8)).cpu().numpy().tobytes())
        total.update(bits[whole:].cpu().numpy().tobytes())
    return total.hexdigest()


def _lanes(word_RL: Tensor) -> Tensor:
    """Σ over rows of fold(word · odd multiplier of the row), [L] of int64, in blocks that stay in a processor's cache."""
    lane_L = word_RL.new_zeros(word_RL.size(1))
    odd_R = _odd(word_RL.size(0), word_RL.device)
    rows = 2048 if word_RL.is_cuda else 16
    for first in range(0, word_RL.size(0), rows):
        mixed = word_RL[first : first + rows] * odd_R[first : first + rows, None]
        half = mixed.view(torch.int32)
        half[:, ::2] ^= half[:, 1::2]  # so that the highest bits, which a product cannot carry up any more, count twice
        lane_L += mixed.sum(0)
    return lane_L


def _odd(rows: int, device: torch.device) -> Tensor:
    """An odd pseudo-random multiplier for each row (SplitMix64 of its number), [R] of int64."""
    x = (torch.arange(1, rows + 1, device=device) * -0x61C8864680B583EB).contiguous()
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of every weight in order of name; tied weights count once. Two equal policies, bit for bit, are equal here."""
    total = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        total.update(f"{name}:{p.dtype}:{tuple(p.shape)}".encode())
        total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _eos_ids(model: Any, tokenizer: Any, name: str) -> list[int]:
    """Every id that ends a response; the tokenizer's own first."""
    found: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    for ids in (getattr(generation, "eos_token_id", None), model.config.eos_token_id):
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i not in found:
                found.append(i)
    if not found:
        raise ModelError(
            f"policy.model: {name} names no EOS token, so a response could never end; set eos_token in its tokenizer"
        )
    return found


def parameter_count(model: torch.nn.Module) -> int:
    """Weights of a model; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"
