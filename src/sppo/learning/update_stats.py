"""What the updates of one step add up to: metrics, and what each rollout looked like to its update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.mesh import Mesh
from ..objective.diagnostics import effective_sample_size
from ..objective.kl import estimator
from .batch import Batch


@dataclass(frozen=True)
class Trace:
    """What the last step's updates saw of each rollout, for anyone who looks at it later; of the last epoch, where there are several."""

    log_ratio_BT: Tensor
    """log π_θ/π_old of each token as it was trained on: 0 in a step's first minibatch."""
    clipped_B: Tensor
    """The share of a response's ratios that the clip cut off: 0 or 1 where the ratio is the sequence's."""

    @classmethod
    def empty(cls, batch: Batch) -> Trace:
        """Of updates that have not been made."""
        return cls(torch.zeros_like(batch.behaviour_logp_BT), torch.zeros(len(batch)))


class Tally:
    """Sums over the micro-batches of one step, and the metrics they make."""

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh or Mesh()
        self.values: dict[str, list[float]] = {}
        self.log_ratio: list[Tensor] = []
        self.correction: list[Tensor] = []  # log weights from the engine's distribution to the learner's
        self.served = False  # whether the engine's numbers are `old` in all minibatches but the first
        self.first_gap: float | None = None  # between two passes over the first micro-batch, where a run looks at it
        self.drift = 0.0  # the largest mean distance of such a minibatch to the current policy
        self.clipped = self.elements = 0
        self.entropy = self.tokens = self.kl = self.kl_tokens = 0.0
        self.gap_sum = self.gap_tokens = self.gap_max = 0.0
        self.traced: list[
            tuple[int, Tensor, Tensor, Tensor]
        ] = []  # update, rows, log ratios, the clipped share of each
        self.gradients: list[Tensor] = []  # of the first two minibatches, where the recipe asks for their noise

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def observe(
        self,
        number: int,
        part: Tensor,
        loss: Tensor,
        log_r: Tensor,
        clipped: Tensor,
        element_mask: Tensor,
        entropy_bT: Tensor,
        mask_bT: Tensor,
        old_bT: Tensor,
        behaviour_bT: Tensor,
        logp_bT: Tensor,
    ) -> None:
        self.add(f"loss/{number}", float(loss))
        tokens = float(mask_bT.sum())
        self.entropy += float(entropy_bT.sum())
        self.tokens += tokens
        if number == 0 or not self.served:
            gap = torch.where(mask_bT, (old_bT - behaviour_bT).abs(), 0.0)
            self.gap_sum += float(gap.sum())
            self.gap_max = max(self.gap_max, float(gap.max()))
            self.gap_tokens += tokens
        else:
            self.drift = max(
                self.drift, float(torch.where(mask_bT, (logp_bT - old_bT).abs(), 0.0).sum()) / max(tokens, 1)
            )
        cut, of = (clipped & element_mask).float(), element_mask.float()
        if cut.dim() == 2:
            cut, of = cut.sum(1), of.sum(1)
        log_ratio_bT = torch.where(mask_bT, logp_bT - old_bT, 0.0)
        self.traced.append((number, part, log_ratio_bT.float().cpu(), (cut / of.clamp(min=1)).cpu()))
        if number > 0:  # before the first update every ratio is 1, and says nothing about health
            self.kl += float(estimator(-log_ratio_bT, "k3").sum())  # of KL(old‖new), a token
            self.kl_tokens += tokens
            self.log_ratio.append(log_r[element_mask].cpu())
            self.clipped += int((clipped & element_mask).sum())
            self.elements += int(element_mask.sum())

    def engine_gap(self) -> float | None:
        """The mean distance of the engine's log-probabilities to the learner's, in nats per token."""
        tokens = self.mesh.sum(self.gap_tokens)
        return self.mesh.sum(self.gap_sum) / tokens if tokens else None

    def trace(self, batch: Batch) -> Trace:
        """What the updates saw of each rollout, whichever rank computed it; of the last of them that had it."""
        out, last_B = Trace.empty(batch), torch.full((len(batch),), -1)
        for number, part, log_ratio_bT, clipped_b in self.traced:
            out.log_ratio_BT[part, : log_ratio_bT.size(1)] = log_ratio_bT.to(out.log_ratio_BT.dtype)
            out.clipped_B[part] = clipped_b.to(out.clipped_B.dtype)
            last_B[part] = number
        latest_B = self.mesh.max(last_B)
        seen, mine = latest_B >= 0, (latest_B >= 0) & (latest_B == last_B)
        for x in (out.log_ratio_BT, out.clipped_B):
            self.mesh.fill(x, mine, seen)
        return out

    def metrics(self, updates: int) -> dict[str, Any]:
        losses = [sum(v) for k, v in self.values.items() if k.startswith("loss/")]
        out: dict[str, Any] = {
            "loss/policy": self.mesh.sum(sum(losses, 0.0)) / updates,
            "policy/entropy": self.mesh.sum(self.entropy) / max(self.mesh.sum(self.tokens), 1.0),
            "engine/gap_mean": self.engine_gap(),
            "engine/gap_max": self.mesh.max(self.gap_max),
        }
        out |= {name: sum(v) / len(v) for name, v in self.values.items() if not name.startswith("loss/")}
        weight = self._joined(self.correction)
        out["engine/correction_ess"] = None if weight is None else effective_sample_size(weight)
        out["engine/correction_mean"] = None if weight is None else float(weight.exp().mean())
        log_r = self._joined(self.log_ratio)
        out["ratio/ess"] = None if log_r is None else effective_sample_size(log_r)
        out["ratio/mean"] = None if log_r is None else float(log_r.clamp(max=60).exp().mean())
        out["ratio/max_log"] = None if log_r is None else float(log_r.abs().max())
        out["ratio/clip_fraction"] = (
            None if log_r is None else self.mesh.sum(self.clipped) / max(self.mesh.sum(self.elements), 1)
        )
        if len(self.gradients) == 2:
            first, second = self.gradients
            signal = float(
                first @ second
            )  # of two independent samples: ‖E g‖², without bias but for one small update between them
            out["update/grad_signal"] = signal
            out["update/grad_variance"] = float(first @ first + second @ second) / 2 - signal
        kl, tokens = self.mesh.sum(self.kl), self.mesh.sum(self.kl_tokens)
        out["policy/kl_step"] = kl / tokens if tokens else None
        return out

    def _joined(self, parts: list[Tensor]) -> Tensor | None:
        """What all ranks have seen, or None where none has seen any."""
        found = self.mesh.joined(parts)
        return found if len(found) else None
