"""The learner: from judged rollouts to new weights, for the policy and for its critic.

One update (a minibatch): every micro-batch adds its share of one globally normalised loss, then one optimiser step.
`old` log-probabilities are those of the weights that sampled. The first minibatch's come from its own training pass, so the first
update's ratio is exactly 1, and they tell how far engine and learner disagree. Where that is next to nothing the engine's numbers
serve the other minibatches, and a step needs no forward pass of its own for them; else they are computed, over the same
micro-batches, and the importance weight corrects for the engine's.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import EngineMismatch, NonFinite, RunFailure
from ..models.critic import Critic
from ..models.policy import Policy
from ..objective.advantage import critic_advantage, gated_advantage
from ..objective.diagnostics import critic_quality, effective_sample_size, explained_variance
from ..objective.kl import kl_in_reward, sequence_kl
from ..objective.ratio import log_ratio
from ..objective.surrogate import normalised_sum, surrogate
from .batch import Batch, micro_batches
from .optim import MasterAdamW, learning_rate

EV_MEMORY = 0.9
"""Decay of the running explained variance that the EV gate reads."""
NEGLIGIBLE = 0.01
"""The engine's log-probabilities serve as `old` where no importance weight between engine and learner differs from 1 by more."""
LOW_ESS = 0.1
"""Below this effective sample size the importance weights carry almost no information: the user is told."""


class Learner:
    """Holds what is trained, and how. `reference` is None unless the recipe reads it."""

    def __init__(self, policy: Policy, critic: Critic, reference: Policy | None, config: Config) -> None:
        self.policy, self.critic, self.reference, self.config = policy, critic, reference, config
        t = config.training
        self.policy_optimiser = MasterAdamW(
            policy.model.parameters(), betas=t.betas, weight_decay=t.weight_decay, kind=t.optimizer
        )
        self.critic_optimiser = MasterAdamW(critic.parameters(), betas=t.betas, weight_decay=t.weight_decay)
        self.running_ev: float | None = None
        self.bad_in_a_row = 0
        self.bad_total = 0
        self.ratio_checked = False
        self.critic_seconds = 0.0

    # -- the advantage -----------------------------------------------------------------------------------------------

    def advantage(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Â = R − b(x) for each rollout, [B], the values V(x), [B], and the critic's metrics.

        Call before `update`: the values must not have seen these rewards. Masked rollouts get whatever, and are not used.
        """
        began = time.perf_counter()
        logit_B = self.critic.logits([r.task for r in batch.rollouts], self.config.training.micro_tokens)
        self.critic_seconds = time.perf_counter() - began
        value_B, keep_B = logit_B.sigmoid(), batch.keep_B
        reward_B = batch.reward_B
        if self.config.objective.kl > 0 and self.config.objective.kl_form == "reward":
            ref_BT = self._all_logps(self._reference(), batch)
            reward_B = kl_in_reward(
                reward_B, batch.behaviour_logp_BT + batch.kept_BT, ref_BT, batch.mask_BT, self.config.objective.kl
            )
        advantage_B = critic_advantage(reward_B, logit_B)
        if self.config.objective.ev_gate:
            advantage_B = gated_advantage(reward_B, logit_B, keep_B, self.running_ev)
        metrics: dict[str, Any] = critic_quality(batch.correct_B[keep_B], value_B[keep_B])
        metrics["critic/value_mean"] = float(value_B[keep_B].mean()) if keep_B.any() else None
        ev = explained_variance(batch.correct_B[keep_B], value_B[keep_B])
        if ev is not None:
            previous = ev if self.running_ev is None else self.running_ev
            self.running_ev = EV_MEMORY * previous + (1 - EV_MEMORY) * ev
        metrics["critic/running_ev"] = self.running_ev
        return advantage_B, value_B, metrics

    # -- the update --------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, advantage_B: Tensor, step: int) -> dict[str, Any]:
        """Train policy and critic on one batch; returns metrics. Masked rollouts are left out of every sum and count.

        Raises NonFinite after `training.max_bad_updates` bad updates in a row, EngineMismatch when the engine's
        log-probabilities are too far from the learner's.
        """
        t = self.config.training
        assert t.lr is not None  # resolved by Config.with_rates
        assert t.critic_lr is not None
        kept = batch.keep_B.nonzero()[:, 0]
        if len(kept) == 0:
            return {"update/skipped": "every rollout was masked"}
        lr = {
            "policy": learning_rate(t.lr, step, t.steps, warmup=t.warmup, schedule=t.schedule),
            "critic": learning_rate(t.critic_lr, step, t.steps, warmup=t.warmup, schedule=t.schedule),
        }
        plans = [self._plan(batch, kept, step, epoch) for epoch in range(t.epochs)]
        # Once a run the first minibatch is computed twice, to see that two passes over the same weights agree exactly.
        old_BT = torch.full_like(batch.behaviour_logp_BT, float("nan"))
        if not self.ratio_checked:
            self._fill_old(old_BT, batch, plans[0][:1])
        reference_BT = self._all_logps(self._reference(), batch) if self._loss_reads_reference() else None
        tally = _Tally()
        updates = [minibatch for plan in plans for minibatch in plan]
        for number, minibatch in enumerate(updates):
            rows = torch.cat(minibatch)
            self._policy_gradient(batch, advantage_B, minibatch, old_BT, reference_BT, number, tally)
            if number == 0 and len(plans[0]) > 1:  # while the weights are still those that sampled
                self._settle_rest(old_BT, batch, plans[0], tally)
            self._check_gap(tally)
            norm = self.policy_optimiser.step(lr["policy"], t.max_grad_norm)
            tally.add("update/grad_norm", norm)
            self._check_finite(norm)
            began = time.perf_counter()
            tally.add("critic/loss", self._critic_update(batch, rows, lr["critic"]))
            self.critic_seconds += time.perf_counter() - began
        return tally.metrics(len(updates)) | {
            "update/lr": lr["policy"],
            "update/critic_seconds": self.critic_seconds,  # of the whole step's
            "update/skipped_non_finite": self.bad_total,
        }

    def _plan(self, batch: Batch, kept: Tensor, step: int, epoch: int) -> list[list[Tensor]]:
        """Minibatches of micro-batches: a permutation that is a function of (seed, step, epoch)."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + epoch)
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        length_B = batch.prompt_len_B + batch.response_len_B
        minibatches = [m for m in shuffled.tensor_split(self.config.training.minibatches) if len(m)]
        return [micro_batches(m, length_B, self.config.training.micro_tokens, self.policy.packs) for m in minibatches]

    def _policy_gradient(
        self,
        batch: Batch,
        advantage_B: Tensor,
        minibatch: list[Tensor],
        old_BT: Tensor,
        reference_BT: Tensor | None,
        number: int,
        tally: _Tally,
    ) -> None:
        """Add up the gradient of one minibatch's loss over its micro-batches."""
        o = self.config.objective
        rows = torch.cat(minibatch)
        sequences, tokens = len(rows), int(batch.response_len_B[rows].sum())
        denominator = tokens if o.ratio == "token" else sequences
        for part in minibatch:
            current = self._logps(self.policy, batch, part)
            logp_bT, mask_bT = current.logp_BT, current.mask_BT
            width = mask_bT.size(1)
            if number == 0:
                self._settle_first(old_BT, part, logp_bT, width)
            old_bT = old_BT[part, :width].to(logp_bT.device)
            behaviour_bT = batch.behaviour_logp_BT[part, :width].to(logp_bT.device)
            anchor_bT = old_bT
            if o.anchor == "reference":
                assert reference_BT is not None
                anchor_bT = reference_BT[part, :width].to(logp_bT.device)
            log_r = log_ratio(logp_bT, anchor_bT, mask_bT, o.ratio, o.kappa)
            advantage_b = advantage_B[part].to(logp_bT.device)
            value, clipped = surrogate(
                log_r, advantage_b[:, None] if o.ratio == "token" else advantage_b, o.clip, o.dual_clip or None
            )
            element_mask = mask_bT if o.ratio == "token" else torch.ones_like(log_r, dtype=torch.bool)
            if o.engine_correction:
                mismatch = log_ratio(old_bT, behaviour_bT, mask_bT, o.ratio, o.kappa)
                mismatch = mismatch.clamp(max=math.log(o.engine_correction))
                value = value * mismatch.exp()
                tally.correction.append(mismatch[element_mask].cpu())
            loss = -normalised_sum(value, element_mask, denominator)
            if o.kl > 0 and o.kl_form != "reward":
                assert reference_BT is not None
                kl_b = sequence_kl(logp_bT, reference_BT[part, :width].to(logp_bT.device), mask_bT, o.kl_form)
                loss = loss + o.kl * kl_b.sum() / sequences
            loss.backward()
            tally.observe(
                number,
                loss.detach(),
                log_r.detach(),
                clipped,
                element_mask,
                current.entropy_BT,
                mask_bT,
                old_bT,
                behaviour_bT + batch.kept_BT[part, :width].to(logp_bT.device),
                logp_bT.detach(),
            )

    def _critic_update(self, batch: Batch, rows: Tensor, lr: float) -> float:
        """Binary cross-entropy of V(x) against the correctness of the responses (never a shaped reward)."""
        prompts = [self.critic.prompt_ids(batch.rollouts[i].task) for i in rows.tolist()]
        target_b = batch.correct_B[rows]
        length_b = torch.tensor([len(p) for p in prompts])
        total = 0.0
        for part in micro_batches(torch.arange(len(rows)), length_b, self.config.training.micro_tokens):
            logit = self.critic([prompts[i] for i in part.tolist()])
            target = target_b[part].to(logit.device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="sum") / len(rows)
            loss.backward()
            total += float(loss.detach())
        norm = self.critic_optimiser.step(lr, self.config.training.max_grad_norm)
        if not math.isfinite(norm):
            self.bad_total += 1
        return total

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def _logps(self, policy: Policy, batch: Batch, part: Tensor) -> Any:
        width = int((batch.prompt_len_B[part] + batch.response_len_B[part]).max())
        return policy.response_logps(
            batch.ids_BL[part, :width],
            batch.prompt_len_B[part],
            batch.response_len_B[part],
            self.config.rollout.temperature,
        )

    @torch.no_grad()
    def _fill_old(self, old_BT: Tensor, batch: Batch, minibatches: list[list[Tensor]]) -> None:
        """log π_old of some minibatches by a pass of their own."""
        for part in (p for minibatch in minibatches for p in minibatch):
            logp = self._logps(self.policy, batch, part).logp_BT
            old_BT[part, : logp.size(1)] = logp.to(old_BT.dtype).cpu()

    def _settle_rest(self, old_BT: Tensor, batch: Batch, plan: list[list[Tensor]], tally: _Tally) -> None:
        """log π_old of all minibatches but the first: the engine's where the first shows that they are the learner's, else computed."""
        o, first = self.config.objective, torch.cat(plan[0])
        engine_BT = batch.behaviour_logp_BT + batch.kept_BT
        weight = log_ratio(old_BT[first], engine_BT[first], batch.mask_BT[first], o.ratio, o.kappa)
        tally.served = float(weight.abs().max()) <= NEGLIGIBLE
        tally.add("engine/serves_as_old", float(tally.served))
        if not tally.served:
            self._fill_old(old_BT, batch, plan[1:])
            return
        rest = torch.cat([part for minibatch in plan[1:] for part in minibatch])
        old_BT[rest] = engine_BT[rest]

    def _settle_first(self, old_BT: Tensor, part: Tensor, logp_bT: Tensor, width: int) -> None:
        """On the first update old and current are the same numbers. Once a run that is verified, not assumed."""
        current = logp_bT.detach().to(old_BT.dtype).cpu()
        if not self.ratio_checked:
            gap = float((old_BT[part, :width] - current).abs().max())
            tolerance = 0.0 if logp_bT.device.type == "cpu" else 1e-2
            if not gap <= tolerance:
                raise RunFailure(
                    f"the first update's ratio is not 1 (log-probabilities differ by {gap:.2g} between two passes over the same "
                    "weights): the model is not deterministic in eval mode, e.g. it has dropout of its own"
                )
            self.ratio_checked = True
        old_BT[part, :width] = current

    @torch.no_grad()
    def _all_logps(self, policy: Policy, batch: Batch) -> Tensor:
        out_BT = torch.zeros_like(batch.behaviour_logp_BT)
        length_B = batch.prompt_len_B + batch.response_len_B
        for part in micro_batches(torch.arange(len(batch)), length_B, self.config.training.micro_tokens, policy.packs):
            logp = self._logps(policy, batch, part).logp_BT
            out_BT[part, : logp.size(1)] = logp.to(out_BT.dtype).cpu()
        return out_BT

    def _reference(self) -> Policy:
        if self.reference is None:
            raise RunFailure("the recipe reads the reference policy, but none is held")
        return self.reference

    def _loss_reads_reference(self) -> bool:
        o = self.config.objective
        return o.anchor == "reference" or (o.kl > 0 and o.kl_form != "reward")

    # -- what stops a run --------------------------------------------------------------------------------------------

    def _check_finite(self, norm: float) -> None:
        if math.isfinite(norm):
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        self.bad_total += 1
        if self.bad_in_a_row >= self.config.training.max_bad_updates:
            raise NonFinite(
                f"the policy's loss or gradient was not finite in {self.bad_in_a_row} updates in a row (each was skipped): "
                "lower training.lr, or look for infinite log-probabilities in the last rollouts file"
            )

    def _check_gap(self, tally: _Tally) -> None:
        gap, limit = tally.engine_gap(), self.config.objective.engine_gap_limit
        if gap is not None and gap > limit:
            raise EngineMismatch(
                f"engine and learner disagree by {gap:.3f} nats a token on average (objective.engine_gap_limit is {limit}): "
                "the engine holds other weights, or computes in another precision or at another temperature"
            )
        if tally.drift > 10 * limit:  # no update within one step moves a policy so far
            raise EngineMismatch(
                f"a minibatch whose `old` log-probabilities are the engine's is {tally.drift:.2f} nats a token away from the learner: the "
                "engine did not sample all responses from the same weights, or training.lr is far too high"
            )

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the models' weights, which checkpoints hold as model folders."""
        return {
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "running_ev": self.running_ev,
            "bad_in_a_row": self.bad_in_a_row,
            "bad_total": self.bad_total,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.critic_optimiser.load_state_dict(state["critic_optimiser"])
        self.running_ev = state["running_ev"]
        self.bad_in_a_row, self.bad_total = state["bad_in_a_row"], state["bad_total"]


class _Tally:
    """Sums over the micro-batches of one step, and the metrics they make."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.log_ratio: list[Tensor] = []
        self.correction: list[Tensor] = []  # log weights from the engine's distribution to the learner's
        self.served = False  # whether the engine's numbers are `old` in all minibatches but the first
        self.drift = 0.0  # the largest mean distance of such a minibatch to the current policy
        self.clipped = self.elements = 0
        self.entropy = self.tokens = self.kl = self.kl_tokens = 0.0
        self.gap_sum = self.gap_tokens = self.gap_max = 0.0

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def observe(
        self,
        number: int,
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
        if number > 0:  # before the first update every ratio is 1, and says nothing about health
            difference = torch.where(mask_bT, logp_bT - old_bT, 0.0)
            self.kl += float((torch.expm1(difference) - difference).sum())  # k3 of KL(old‖new), a token
            self.kl_tokens += tokens
            self.log_ratio.append(log_r[element_mask].cpu())
            self.clipped += int((clipped & element_mask).sum())
            self.elements += int(element_mask.sum())

    def engine_gap(self) -> float | None:
        return self.gap_sum / self.gap_tokens if self.gap_tokens else None

    def metrics(self, updates: int) -> dict[str, Any]:
        losses = [sum(v) for k, v in self.values.items() if k.startswith("loss/")]
        out: dict[str, Any] = {
            "loss/policy": sum(losses) / updates,
            "policy/entropy": self.entropy / max(self.tokens, 1.0),
            "engine/gap_mean": self.engine_gap(),
            "engine/gap_max": self.gap_max,
        }
        out |= {name: sum(v) / len(v) for name, v in self.values.items() if not name.startswith("loss/")}
        out["engine/correction_ess"] = effective_sample_size(torch.cat(self.correction)) if self.correction else None
        log_r = torch.cat(self.log_ratio) if self.log_ratio else None
        out["ratio/ess"] = None if log_r is None else effective_sample_size(log_r)
        out["ratio/mean"] = None if log_r is None else float(log_r.clamp(max=60).exp().mean())
        out["ratio/max_log"] = None if log_r is None else float(log_r.abs().max())
        out["ratio/clip_fraction"] = None if log_r is None else self.clipped / max(self.elements, 1)
        out["policy/kl_step"] = self.kl / self.kl_tokens if self.kl_tokens else None
        return out
