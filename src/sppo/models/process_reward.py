"""A process reward model: a token classifier that says, at the end of each step, how good the reasoning is so far.

The prompt as text, then each step and a separator; the score of a step is read at its separator's last token (the
convention of process-supervision trainers, arXiv 2305.20050): σ of one output, or the second of two outputs' softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

from ..errors import ModelError
from ..objective.ratio import wide
from .loading import choose_dtype, ensure_pad, existing, load_config, load_tokenizer, load_weights
from .weights import cast, counted, parameter_count


class StepModel:
    """Scores of steps, in [0, 1]."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, separator: str = "\n") -> None:
        ensure_pad(tokenizer, f"step model: {name}")
        if model.config.num_labels not in (1, 2):
            raise ModelError(
                f"step model: {name} has {model.config.num_labels} outputs per token; one or two (bad, good) are read"
            )
        self.model, self.tokenizer, self.name, self.separator = model.eval(), tokenizer, name, separator

    @classmethod
    def load(
        cls, name: str, *, device: torch.device, dtype: str = "auto", separator: str = "\n"
    ) -> tuple[StepModel, str]:
        """The model of a folder or hub name, and the sentence to state. Raises ModelError when it cannot score
        steps."""
        name = existing(name, "step model")
        load_config(name, "step model")
        model, report = load_weights(AutoModelForTokenClassification, name, "step model")
        if report["missing_keys"]:
            raise ModelError(
                f"step model: {name} has no trained head ({min(report['missing_keys'])} is missing), so its scores "
                "would be noise"
            )
        parameters = parameter_count(model)
        chosen, why = choose_dtype(dtype, parameters, device)
        made = cls(cast(model, chosen).to(device), load_tokenizer(name, "step model"), name=name, separator=separator)
        return (
            made,
            f"step model {name}: {counted(parameters)} parameters in {str(chosen).removeprefix('torch.')} ({why})",
        )

    def ids(self, prompt: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """(ids, the position at which each step's score is read)."""
        ids = list(self.tokenizer(prompt, split_special_tokens=True)["input_ids"])
        ends = []
        for step in steps:
            ids += self.tokenizer(step + self.separator, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
            ends.append(len(ids) - 1)
        return ids, ends

    @torch.no_grad()
    def scores(self, rows: Sequence[tuple[str, Sequence[str]]], token_budget: int = 8192) -> list[list[float] | None]:
        """Scores of the steps of each (prompt, steps); None for a row that is longer than the model reads."""
        encoded = [self.ids(prompt, steps) for prompt, steps in rows]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        out: list[list[float] | None] = [None] * len(rows)
        todo = [i for i, (ids, _) in enumerate(encoded) if limit is None or len(ids) <= limit]
        todo.sort(key=lambda i: -len(encoded[i][0]))
        device, pad = next(self.model.parameters()).device, self.tokenizer.pad_token_id
        while todo:
            width = len(encoded[todo[0]][0])
            part, todo = todo[: max(1, token_budget // width)], todo[max(1, token_budget // width) :]
            ids_BL = torch.tensor(
                [[*encoded[i][0], *[pad] * (width - len(encoded[i][0]))] for i in part], device=device
            )
            mask_BL = torch.tensor(
                [[1] * len(encoded[i][0]) + [0] * (width - len(encoded[i][0])) for i in part], device=device
            )
            logits_BLK = wide(self.model(input_ids=ids_BL, attention_mask=mask_BL).logits)
            good_BL = logits_BLK[..., 0].sigmoid() if logits_BLK.size(-1) == 1 else logits_BLK.softmax(-1)[..., 1]
            for b, i in enumerate(part):
                out[i] = good_BL[b, encoded[i][1]].tolist()
        return out
