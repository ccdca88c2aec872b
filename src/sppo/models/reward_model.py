"""A learned reward: one scalar r(x, y) for a whole response, from any transformers sequence-classification model.

Decoders are scored packed: sequences lie one after the other in a single row, each attends to itself alone
(kernels/attention.py), and only the hidden state at each sequence's last token meets the head, so that nothing is
spent on padding and nothing of size tokens × outputs is ever held. Encoders, and decoders whose attention does not
keep packed sequences apart (a test at loading tells), are scored in padded batches of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from ..distributed.fsdp import put_together
from ..distributed.mesh import Mesh
from ..errors import ModelError
from ..kernels import attention as packing
from ..objective.ratio import wide
from ..types import Prompt, Task
from . import tiny
from .loading import choose_dtype, ensure_pad, existing, load, load_config, load_tokenizer, load_weights, render_chat
from .weights import cast, counted, parameter_count

CENTER_KEY = "sppo_center"
"""In `config.json`: the mean score of the training responses. Preferences fix scores only up to a shift."""


class RewardModel(nn.Module):
    """A sequence classifier with one output (or two, whose difference is the logit of the second)."""

    mesh = Mesh()
    """The ranks that hold it; sharding.py sets it."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "reward model") -> None:
        super().__init__()
        ensure_pad(tokenizer, f"reward model: {name}")
        if model.config.num_labels not in (1, 2):
            raise ModelError(
                f"reward model: {name} has {model.config.num_labels} outputs; a reward model has one (or two: bad, "
                "good)"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.center = float(getattr(model.config, CENTER_KEY, 0.0) or 0.0)
        self.packs = False
        self.packs = self._packing_holds()

    @classmethod
    def load(
        cls, name: str, *, device: torch.device, dtype: str = "auto", seed: int = 0, fresh: bool = False
    ) -> tuple[RewardModel, str]:
        """The reward model of a folder or hub name, and the sentence to state.

        Args:
            fresh: a new head on whatever backbone (a causal LM, an encoder, `tiny:…`), to be trained. Without it a
                missing head is an error: its scores would be noise.

        Raises:
            ModelError: no such folder, no weights, no trained head, more than two outputs.
        """
        if name == "tiny" or name.startswith("tiny:"):
            if not fresh:
                raise ModelError(f"reward model: {name} would be untrained; train one with: sppo reward-model train")
            backbone, tokenizer = load(name, role="--model", head=False, seed=seed)
            model: Any = tiny.classifier(backbone, seed)
        else:
            model, tokenizer = _pretrained(name, seed, fresh)
        parameters = parameter_count(model)
        chosen, why = choose_dtype(dtype, parameters, device)
        made = cls(cast(model, chosen).to(device), tokenizer, name=name)
        how = "packed" if made.packs else "in padded batches"
        return made, (
            f"reward model {name}: {counted(parameters)} parameters in {str(chosen).removeprefix('torch.')} ({why}); "
            f"one score per response, {how}"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The longest sequence it can read, or None when nothing says so."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        known = [n for n in limits if n is not None and 0 < n < 1e9]
        return int(min(known)) if known else None

    def ids(self, prompt: Prompt, response: str) -> list[int]:
        """What it reads of a prompt and a response: the chat template where there is one, a pair for encoders, else
        plain text."""
        if getattr(self.tokenizer, "chat_template", None):
            said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            task = Task("reward", [*said, {"role": "assistant", "content": response}])
            text = render_chat(self.tokenizer, task, answer=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = prompt if isinstance(prompt, str) else Task("reward", prompt).text
        if self._decodes:  # the end is part of what is judged
            end = self.tokenizer.eos_token_id
            return self.tokenizer(text + response, split_special_tokens=True)["input_ids"] + (
                [] if end is None else [end]
            )
        return self.tokenizer(text, response, split_special_tokens=True)["input_ids"]

    @property
    def _decodes(self) -> bool:
        return isinstance(getattr(self.model, "score", None), nn.Linear)

    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Scores r, [B] in float32, for sequences given as ids (an empty one is an error)."""
        if not sequences:  # as much as other ranks wait for, and a gradient of 0
            return self.forward([[0]])[:0].clone()
        if not self._decodes:
            return self._padded(sequences)
        last_BD = self._last_packed(sequences) if self.packs else self._last_padded(sequences)
        logits_BK = functional.linear(wide(last_BD), wide(self.model.score.weight))
        return _one(logits_BK)

    def _last_packed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        length_B = torch.tensor([len(s) for s in sequences], device=self.device)
        ids_1L = torch.tensor([i for s in sequences for i in s], device=self.device)[None]
        positions_1L = torch.cat([torch.arange(len(s), device=self.device) for s in sequences])[None]
        hidden_1LD = self.model.base_model(
            input_ids=ids_1L,
            position_ids=positions_1L,
            use_cache=False,
            **packing.boundaries([len(s) for s in sequences]),
        ).last_hidden_state
        return hidden_1LD[0, length_B.cumsum(0) - 1]

    def _tensors(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(s) for s in sequences)
        pad = self.tokenizer.pad_token_id
        ids_BL = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences], device=self.device)
        length_B = torch.tensor([len(s) for s in sequences], device=self.device)
        return ids_BL, length_B

    def _last_padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        ids_BL, length_B = self._tensors(sequences)  # padded on the right: causal attention keeps it out
        hidden_BLD = self.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD[torch.arange(len(sequences), device=self.device), length_B - 1]

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        ids_BL, length_B = self._tensors(sequences)
        mask_BL = (torch.arange(ids_BL.size(1), device=self.device)[None] < length_B[:, None]).long()
        return _one(wide(self.model(input_ids=ids_BL, attention_mask=mask_BL).logits))

    @torch.no_grad()
    def _packing_holds(self) -> bool:
        """Whether packed sequences leave each other alone, on three that would notice."""
        if not self._decodes:
            return False
        probe = [[i % self.model.config.vocab_size for i in range(a, a + n)] for a, n in ((3, 7), (11, 5), (5, 5))]
        before = self.model.config._attn_implementation
        try:
            packing.use(self.model)
            packed, apart = self._last_packed(probe), self._last_padded(probe)
            if (packed - apart).abs().max() <= packing.TOLERANCE[apart.dtype] * apart.abs().max():
                return True
        except (TypeError, RuntimeError, ValueError):
            pass
        self.model.set_attn_implementation(before)
        return False

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], token_budget: int = 8192) -> Tensor:
        """Scores, [B] on the CPU, in micro-batches of similar length and up to `token_budget` tokens. All ranks must ask for the same; each
        gets all of them."""
        out_B = torch.zeros(len(sequences))
        for part in self.cuts([len(s) for s in sequences], token_budget):
            out_B[part] = self([sequences[i] for i in part]).cpu().to(out_B.dtype)
        return self.mesh.sum(out_B)

    def cuts(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """This rank's rows by micro-batch, long ones first. Packed rows cost their own tokens, padded ones the longest's."""

        def cut(order: list[int]) -> list[list[int]]:
            parts: list[list[int]] = []
            used = 0
            for i in order:
                cost = lengths[i] if self.packs or not parts else lengths[parts[-1][0]]
                if not parts or used + cost > token_budget:
                    parts.append([])
                    used, cost = 0, lengths[i]
                parts[-1].append(i)
                used += cost
            return parts

        return self.mesh.dealt(sorted(range(len(lengths)), key=lambda i: -lengths[i]), cut, list)

    def save(self, folder: Path) -> None:
        """A folder that `AutoModelForSequenceClassification.from_pretrained` loads. All ranks must call it; the first writes."""
        first = self.mesh.rank == 0
        with put_together(self, first):
            if not first:
                return
            setattr(self.model.config, CENTER_KEY, self.center)
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _one(logits_BK: Tensor) -> Tensor:
    return logits_BK[:, 0] if logits_BK.size(1) == 1 else logits_BK[:, 1] - logits_BK[:, 0]


def _pretrained(name: str, seed: int, fresh: bool) -> tuple[Any, Any]:
    name = existing(name, "reward model")
    config = load_config(name, "reward model")
    if config.is_encoder_decoder:
        raise ModelError(
            f"reward model: {name} is an encoder-decoder ({config.model_type}); take an encoder or a decoder"
        )
    options = {"num_labels": 1} if fresh else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = load_weights(
            AutoModelForSequenceClassification, name, "reward model", ignore_mismatched_sizes=fresh, **options
        )
    missing = sorted(report["missing_keys"])
    if missing and not fresh:
        raise ModelError(
            f"reward model: {name} has no trained head ({missing[0]} is missing), so its scores would be noise; "
            "train one with: sppo reward-model train"
        )
    return model, load_tokenizer(name, "reward model")
