"""The policy: a causal language model, its tokenizer, and the two questions the loop asks of it.

`prompt_ids(task)`: what the model reads. `logps(ids, actions, temperature)`: how likely it finds the tokens that were
written (scorer.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp import at_rest, device_of, dtype_of, local, put_together
from ..distributed.mesh import Mesh
from ..environments.base import Call
from ..errors import ModelError
from ..files import readable
from ..objective.ratio import wide
from ..types import Message, Task
from .adapters import REFERENCE, Adapters
from .assembled import load_model
from .calls import read_calls
from .head import backbone
from .loading import embedded, ensure_pad, prompt_ids, render_chat
from .multimodal import freeze_rest, processor_files, shared, text_config
from .scorer import ActionLogps, Scorer
from .turns import Manner, continuation_ids
from .weights import Weights, fingerprint, sha256, weights_of, write


class Policy:
    """A causal LM to train, or one that is frozen and adapters in it. Public tensors are float32 (float64 models stay
    float64)."""

    mesh = Mesh()
    """The ranks that hold it; sharding.py sets it."""
    twin: Callable[[], Scorer] | None = None
    """Of weights that are divided among ranks: makes a frozen scorer with a copy of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        chat_template: str = "auto",
        name: str = "policy",
        adapters: Adapters | None = None,
        base: Mapping[str, str] | None = None,
    ) -> None:
        """`base` says what the adapters stand on: the `name` of a model, and whether it was quantised."""
        self.tokenizer = tokenizer
        self.name = name
        self.adapters = adapters
        self.base = dict(base or {})
        self.chat = chat_template == "auto" and bool(getattr(tokenizer, "chat_template", None))
        self.eos_ids = _eos_ids(model, tokenizer, name)
        self.pad_id: int = ensure_pad(tokenizer, f"policy.model: {name}")
        freeze_rest(model)
        self.scorer: Any = Scorer(model, adapters)
        self._processor_files = processor_files(model)
        self._divide()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str,
        device: torch.device,
        seed: int,
        chat_template: str = "auto",
        adapter: Any = None,
        quantize: str = "",
    ) -> tuple[Policy, str]:
        """Load `policy.model`, a model or an adapter of one; also returns the sentence that states size, dtype and why.

        Args:
            adapter: what to put into a model: a recipe's [adapter], or peft's own config.
            quantize: a recipe's `policy.quantize`.
        """
        found = load_model(name, dtype=dtype, device=device, seed=seed, adapter=adapter, quantize=quantize)
        with readable(f"policy.model: {name} cannot be used", ModelError):
            policy = cls(
                found.model, found.tokenizer, chat_template=chat_template, name=name,
                adapters=found.adapters, base=found.base,
            )  # fmt: skip
        if found.base.get("fingerprint", policy.frozen_fingerprint()) != policy.frozen_fingerprint():
            raise ModelError(
                f"{name}: its base, {found.base['name']}, has other weights than the adapter was trained on; put the base as it was there"
            )
        style = "chat template" if policy.chat else "plain text (no chat template)"
        head = "" if policy.scorer.head.direct else "; its head is more than a projection, so full logits are held"
        padded = "" if policy.packs else f"; updates are padded, not packed: {policy.scorer.unpacked_why}"
        return policy, f"policy {name}: {found.stated}; {style}{head}{padded}"

    def _divide(self) -> None:
        """Note which parameters are trained, and which are the frozen rest: adapters that come later are neither."""
        named = dict(self.model.named_parameters())
        self._trained = [n for n, p in named.items() if p.requires_grad]
        self._frozen = [n for n, p in named.items() if not p.requires_grad]
        self._frozen_hash: tuple[Any, str] = (None, "")

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.scorer.model

    @property
    def packs(self) -> bool:
        """Whether `logps` computes no padding."""
        return bool(self.scorer.packs)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.model.get_input_embeddings().weight)  # of the part that reads text

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return dtype_of(self.model.get_input_embeddings().weight)

    @property
    def context(self) -> int | None:
        """The most positions the model can attend to, or None when its config does not say."""
        return getattr(text_config(self.model), "max_position_embeddings", None)

    @property
    def embeddings(self) -> int:
        """Ids that can be read."""
        rows: int = self.model.get_input_embeddings().weight.size(0)
        return rows

    @property
    def vocabulary(self) -> int:
        """Ids that can be read and written: Llama 3.2 Vision reads more, of images."""
        matrices = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return min(m.weight.size(0) for m in matrices if hasattr(m, "weight"))

    def as_reference(self, saved: Path | None = None) -> Policy:
        """π_ref, a frozen policy of these weights: a copy; or the adapter switched off, where it does nothing yet, else
        a copy of it. `saved` is the folder of an adapter to take in its place."""
        if self.adapters is None:
            return self.copied()
        if saved is not None:
            self.adapters.load(saved, REFERENCE)
            for p in self.adapters.named(REFERENCE).values():
                p.requires_grad_(False)
        elif not self.adapters.fresh(self.adapters.name):
            self.adapters.copy(REFERENCE)
        there = bool(self.adapters.named(REFERENCE)) and not self.adapters.fresh(REFERENCE)
        frozen = copy.copy(self)
        frozen.scorer = self.scorer.under(REFERENCE if there else None)
        frozen.scorer.checkpoint_activations(False)
        return frozen

    def copied(self) -> Policy:
        """A frozen policy with a copy of all weights, divided among ranks as these are."""
        frozen = copy.copy(self)
        if self.twin is not None:
            frozen.scorer, frozen.adapters = self.twin(), None
            return frozen
        frozen.scorer = copy.deepcopy(self.scorer, shared(self.model)).requires_grad_(False).eval()
        frozen.adapters = frozen.scorer.adapters
        frozen.scorer.head.forget()  # the copy's own weight is converted when it is asked for
        frozen.scorer.checkpoint_activations(False)
        return frozen

    # -- text and ids --------------------------------------------------------------------------------------------

    def prompt_ids(self, task: Task) -> list[int]:
        """The ids the model reads for a task: chat messages through the template, text as it is; one BOS at most."""
        ids = embedded(prompt_ids(self.tokenizer, task, self.chat), self.embeddings, self.name)
        if self.chat and not isinstance(task.prompt, str):
            return ids
        if not isinstance(task.prompt, str) and any(m["role"] == "assistant" for m in task.prompt):
            raise ModelError(
                f"task {task.id} is a conversation, and {self.name} has no chat template; use a chat model or "
                "plain-text prompts"
            )
        if ids and ids[-1] in self.eos_ids:  # some tokenizers close what they tokenise; a prompt must stay open
            ids = ids[:-1]
        return ids

    def continuation_ids(self, messages: Sequence[Message], end: int | None = None) -> list[int]:
        """The ids that an environment's messages put between a reply of the policy, which ended with the id `end`, and its next one
        (turns.py)."""
        ends = [self.rendered([i]) for i in ([] if end is None else [end]) + list(self.eos_ids)]
        told = self.manner.answered(messages)
        return embedded(continuation_ids(self.tokenizer, told, chat=self.chat, ends=ends), self.embeddings, self.name)

    @cached_property
    def manner(self) -> Manner:
        """How it takes part in conversations with tools."""
        return Manner.of(self.tokenizer, self.chat)

    def would_call(self, text: str) -> bool:
        """Whether a text would call a tool if the policy wrote it."""
        return bool(read_calls(text, self.manner.syntax)[1])

    def said(self, ids: Sequence[int]) -> tuple[str, list[Call]]:
        """What a reply says beside its calls, and the calls in it."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        content, calls = read_calls(self.rendered(ids), self.manner.syntax)
        return (content if calls else self.text(ids)), calls

    def refuses(self, task: Task) -> str | None:
        """Why a prompt cannot be put to this model, or None: its template refuses it, or it is a conversation and
        there is no template."""
        if isinstance(task.prompt, str) or (not self.chat and len(task.prompt) == 1):
            return None  # nothing to render
        try:
            render_chat(self.tokenizer, task) if self.chat else self.prompt_ids(task)
        except ModelError as error:
            return str(error).removeprefix(f"task {task.id}: ")
        return None

    def rendered(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included: a prompt as the model reads it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def response_ids(self, text: str) -> list[int]:
        """The ids of a response to imitate: its text, then the EOS."""
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_ids[0]]
        return embedded(ids, self.embeddings, self.name)

    def probe(self, prompt: int, response: int) -> tuple[list[int], list[int]]:
        """Pseudo-random ids for the engine's canary, the same for every model of a vocabulary: a prompt and a
        response of these lengths."""
        vocabulary = self.vocabulary
        ids = torch.randint(vocabulary, (prompt + response,), generator=torch.Generator().manual_seed(0)).tolist()
        room = max(1, min(prompt, (self.context or 10**9) - response))
        return ids[:room], ids[prompt:]

    def text(self, ids: Sequence[int]) -> str:
        """The text of response ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # -- log-probabilities ---------------------------------------------------------------------------------------

    def logps(self, ids_BL: Tensor, action_BL: Tensor, temperature: float) -> ActionLogps:
        """log π(y_t | x, y_<t) of the tokens that the policy wrote, with gradient where enabled: for `backward()`.
        (On a CPU the embedding's part goes straight into its `.grad`, unseen by `torch.autograd.grad` and by hooks on
        the weight: kernels/patch_layers.py.)

        Args:
            ids_BL: rows of tokens on any device: a prompt, what the policy wrote, perhaps further turns; padding on
                the right.
            action_BL: True for the tokens that the policy wrote. What follows a row's last one is not read.
            temperature: the sampling temperature.

        Returns:
            [B, T], T the most actions of a row, each row's in order from column 0 on.

        Raises:
            ValueError: a row's first token is an action.
        """
        found: ActionLogps = self.scorer(ids_BL, action_BL, temperature)
        return found

    @torch.no_grad()
    def given_logps(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of each token of given responses to given prompts, at temperature 1."""
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        ids_BL = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids_BL[b, : len(row)] = torch.tensor(row)
            action_BL[b, len(prompt) : len(row)] = True
        logp_BT = self.logps(ids_BL, action_BL, 1.0).logp_BT
        return [logps[: len(r)] for logps, r in zip(logp_BT.tolist(), responses, strict=True)]

    def squared_score(self, logp_BT: Tensor) -> Tensor:
        """(1 − π)² of each token, [B, T]: the squared length of its score in logits, but for a factor between 1 and
        2."""
        return (1 - logp_BT.exp()).square()

    def checkpoint_activations(self) -> None:
        """From now on training passes keep only the layers' inputs, and compute the layers again in the backward
        pass. Raises ModelError."""
        if not self.scorer.checkpoint_activations():
            raise ModelError(
                f"training.checkpoint_activations: {self.name} has no layers that transformers could checkpoint"
            )

    def next_logits(self, last_N: Tensor | None = None, **inputs: Any) -> Tensor:
        """Float32 logits of the tokens to come, for engines: after each row's last one, [B, V], or after the tokens
        at `last_N` of a single packed row, [N, V]."""
        head = self.scorer.head
        if head.direct:
            hidden_BSD = backbone(self.model)(use_cache=True, **inputs).last_hidden_state
            logits: Tensor = head.logits(hidden_BSD[:, -1] if last_N is None else hidden_BSD[0, last_N])
            return logits
        with head.wide():
            keep = 1 if last_N is None else last_N
            logits_BSV = wide(self.model(use_cache=True, logits_to_keep=keep, **inputs).logits)
        return logits_BSV[:, -1] if last_N is None else logits_BSV[0]

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name: all weights, or an adapter's; tied ones once. Of divided ones this rank's parts."""
        at_rest(self.scorer)
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self._trained}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the whole tensor of every weight that is trained, in the model's dtype, always in the same order; tied weights
        come once. Engines load them, and `sha256` is of what is yielded here. Where weights are divided, all ranks must ask for them."""
        return weights_of(self.trained)

    def take(self, weights: Weights) -> None:
        """Take over weights that another policy yields (`weights`); its own lie here already, and are not copied.
        Raises ValueError for others."""
        write(self.trained, weights)

    def fingerprint(self) -> str:
        """A cheap hash of the weights, bit for bit, the frozen ones too (weights.py)."""
        return fingerprint(self.weights(), self.frozen_fingerprint())

    def frozen_fingerprint(self) -> str:
        """That of the weights that are not trained, '' where all are; taken anew when one has been written to."""
        if not self._frozen:
            return ""
        at_rest(self.scorer)
        named = dict(self.model.named_parameters())
        frozen = {name: named[name] for name in self._frozen}
        state = _state(frozen)
        if state != self._frozen_hash[0]:
            self._frozen_hash = (state, fingerprint(weights_of(frozen)))
        return self._frozen_hash[1]

    def pin_frozen(self, fingerprint: str) -> None:
        """Say what `frozen_fingerprint` is as long as nothing is written to these weights from now on."""
        named = dict(self.model.named_parameters())
        self._frozen_hash = (_state({name: named[name] for name in self._frozen}), fingerprint)

    def sha256(self) -> str:
        """The trained weights' SHA-256, for summaries and audits."""
        return sha256(self.weights())

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load; of a
        model that reads more than text, all of it, as its own class and `AutoProcessor` load it; of adapters, one that
        `PeftModel.from_pretrained` loads. All ranks must call it; the first writes."""
        first = self.mesh.rank == 0
        if self.adapters is not None:
            base = self.base | {"fingerprint": self.frozen_fingerprint()}
            if first:
                self.adapters.save(folder, self.adapters.name, base)
        else:
            with put_together(self.scorer, first):
                if first:
                    text_config(self.model).dtype = self.dtype
                    self.model.save_pretrained(folder)
        if first:
            self._save_beside(folder)

    def save_base(self, folder: Path) -> None:
        """Write the model below the adapters, and name it as what they stand on: for one that is nowhere else. All ranks must call it."""
        assert self.adapters is not None
        first = self.mesh.rank == 0
        with put_together(self.scorer, first):
            if first:
                self.adapters.save_base(folder)
        if first:
            self._save_beside(folder)
        self.base["name"] = str(folder.resolve())

    def _save_beside(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        for name, content in self._processor_files.items():
            (folder / name).write_bytes(content)


def _state(parameters: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """What changes when one of them is written to."""
    return [(x.data_ptr(), x._version) for x in map(local, parameters.values())]


def _eos_ids(model: Any, tokenizer: Any, name: str) -> list[int]:
    """Every id that ends a response; the tokenizer's own first."""
    found: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    for ids in (getattr(generation, "eos_token_id", None), getattr(text_config(model), "eos_token_id", None)):
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i not in found:
                found.append(i)
    if not found:
        raise ModelError(
            f"policy.model: {name} names no EOS token, so a response could never end; set eos_token in its tokenizer"
        )
    return found
