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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp import at_rest
from ..distributed.mesh import Mesh
from ..errors import NonFinite, RunFailure
from ..models.critic import Critic
from ..models.policy import Policy
from ..models.scorer import ActionLogps
from ..objective.kl import kl_cost
from ..objective.loss import Scored, denominator, mismatch, policy_loss
from ..objective.ratio import log_ratio
from ..recipe.config import Config
from ..rollout.canary import SAMPLED, noise_limit
from .agreement import check_gap
from .batch import Batch, Share
from .credit.loading import load_credit
from .credit.token import TokenCritic
from .lessons import Lessons
from .optimizer import MasterAdamW, learning_rate
from .saved import Saved
from .shaping import less_overlong
from .update_stats import Tally, Trace

NEGLIGIBLE, OF_CLIP = 0.01, 0.1
"""The engine's log-probabilities serve as `old` where no importance weight between engine and learner differs from 1 by more, nor by
more than this share of the clip: GSPO's clip is far narrower than other ratios', and rounding alone must not cut a response off."""


class Learner(Saved):
    """Holds what is trained, and how. `reference` is None unless the recipe reads it."""

    def __init__(
        self, policy: Policy, critic: Critic | None, reference: Policy | None, config: Config, mesh: Mesh | None = None
    ) -> None:
        config, _ = config.settled()
        self.mesh = mesh or policy.mesh
        for model in (policy, critic):
            if model is not None:
                model.mesh = self.mesh
        self.policy, self.reference, self.config = policy, reference, config
        self.credit = load_credit(config, policy, critic)
        t = config.training
        self.policy_optimiser = MasterAdamW(
            policy.trained.values(),
            betas=t.betas,
            weight_decay=t.weight_decay,
            kind=t.optimizer,
            offload=t.offload,
            mesh=self.mesh,
            of=policy.scorer,
        )
        # of what is sampled ahead: the weights that wrote it are gone, and so is the measure of the engine's own difference
        self.lag = 0 if config.cluster is None else config.cluster.lag
        self.bad_in_a_row = 0
        self.bad_total = 0
        self.ratio_checked = False
        self.gap_limit: float | None = None  # between engine and learner, once a step has measured it
        self.critic_seconds = 0.0
        self.trace: Trace  # of the last update
        self.progress: Callable[[int, int], None] = lambda done, total: None  # micro-batches of an update
        self._done = self._total = 0

    def hold_little(self) -> None:
        """Memory is tight: what a micro-batch freed goes back to the machine at once."""
        for optimiser in (self.policy_optimiser, getattr(self.credit, "optimiser", None)):
            if optimiser is not None:
                optimiser.tight = True

    # -- the advantage -----------------------------------------------------------------------------------------------

    def advantage(self, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """R − b for each rollout, [B] (or for each token, [B, T]), the values V(x), [B], where there is a critic, and its metrics.

        Call before `update`: the values must not have seen these rewards. Values for masked rollouts are undefined.
        """
        o = self.config.objective
        batch, reward_B, shaping = less_overlong(batch, self.config.rollout)
        if o.kl > 0 and o.kl_form == "reward":
            ref_BT = self._all_logps(self._reference(), batch)
            cost_BT = kl_cost(batch.behaviour_logp_BT + batch.kept_BT, ref_BT, batch.mask_BT, o.kl)
            if self.credit.charges_tokens:
                batch = replace(batch, cost_BT=cost_BT)
            else:
                reward_B = reward_B - cost_BT.sum(1)
        began = time.perf_counter()
        advantage, value_B, metrics = self.credit.advantage(batch, reward_B)
        self.critic_seconds = time.perf_counter() - began
        if batch.weight_B is not None:
            advantage = advantage * (batch.weight_B if advantage.dim() == 1 else batch.weight_B[:, None])
        return advantage, value_B, metrics | shaping

    # -- the update --------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, advantage_B: Tensor, step: int, lessons: Lessons | None = None) -> dict[str, Any]:
        """Train policy and critic on one batch; returns metrics. Masked rollouts are left out of every sum and count.

        `lessons` are learnt beside it by supervision (experimental/search.py), each update a share of them; the critic never sees them.

        Raises NonFinite after `training.max_bad_updates` bad updates in a row, EngineMismatch when the engine's
        log-probabilities are too far from the learner's.
        """
        t = self.config.training
        self.trace = Trace.empty(batch)
        if not batch.keep_B.any():
            return {"update/skipped": "every rollout was masked"}
        kept, advantage_B, left_out = self._trains(batch, advantage_B)
        lr, critic_lr = self._rates(step)
        plans = [self._plan(batch, kept, step, epoch) for epoch in range(t.epochs)]
        # Once a run the first minibatch is computed twice, to see that two passes over the same weights agree exactly.
        old_BT = torch.full_like(batch.behaviour_logp_BT, float("nan"))
        if not self.ratio_checked:
            self._fill_old(old_BT, batch, plans[0][:1])
        reference_BT = self._all_logps(self._reference(), batch, kept) if self._loss_reads_reference() else None
        tally = Tally(self.mesh)
        updates = [minibatch for plan in plans for minibatch in plan]
        beside = [rows for epoch, plan in enumerate(plans) for rows in self._beside(batch, step, epoch, len(plan))]
        self._done, self._total = 0, sum(map(len, updates))
        self.progress(0, self._total)
        for number, minibatch in enumerate(updates):
            rows = torch.cat([minibatch.rows, beside[number]])
            self._policy_gradient(batch, advantage_B, minibatch, old_BT, reference_BT, number, tally)
            if number == 0:  # while the weights are still those that sampled
                self._settle_old(old_BT, batch, plans[0], tally)
            if not self.lag:
                check_gap(tally, self.gap_limit, self.config.objective, self.policy.dtype)
            if t.measure_noise and number < 2 <= len(plans[0]) <= len(batch.group_B[kept].unique()):
                tally.gradients.append(self._gradient())
            if lessons is not None:
                self._teach(lessons, number, len(updates), tally)
            norm = self.policy_optimiser.step(lr, t.max_grad_norm)
            tally.add("update/grad_norm", norm)
            self._count_bad(norm)
            self._teach_critic(batch, rows, critic_lr, tally)
        gap = tally.engine_gap()
        if self.gap_limit is None and gap is not None and not self.lag:
            self.gap_limit = noise_limit(gap, SAMPLED, self.policy.dtype)
        metrics = tally.metrics(len(updates))
        self.trace = tally.trace(batch)
        metrics |= {"update/lr": lr, "update/critic_seconds": self.critic_seconds}  # of the whole step's
        return metrics | left_out | {"update/skipped_non_finite": self.bad_total}

    def _trains(self, batch: Batch, advantage_B: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The rows that the policy learns from, their advantages, and how many were left out because their group agrees."""
        kept = batch.keep_B.nonzero()[:, 0]
        if not self._leaves_flat_groups_out():
            return kept, advantage_B, {}
        mixed = (batch.keep_B & ~batch.flat_B).nonzero()[:, 0]
        left_out = {"update/left_out": len(kept) - len(mixed)}
        if len(mixed):
            return mixed, advantage_B, left_out
        return kept, torch.zeros_like(advantage_B), left_out  # nothing to learn from; lessons may be

    def _rates(self, step: int) -> tuple[float, float]:
        """The learning rates of policy and critic."""
        t = self.config.training
        assert t.lr is not None  # both are resolved by Config.with_rates
        assert t.critic_lr is not None
        policy, critic = (
            learning_rate(peak, step, t.steps, warmup=t.warmup, schedule=t.schedule) for peak in (t.lr, t.critic_lr)
        )
        return policy, critic

    def _leaves_flat_groups_out(self) -> bool:
        """Whether prompts whose samples still agree after the last round of `rollout.resample` leave every sum and denominator, as those do that
        were replaced (DAPO, arXiv 2503.14476 eq. 11). A critic's baseline learns from them."""
        return self.config.rollout.resample > 0 and self.config.critic_reads is None

    def _plan(self, batch: Batch, kept: Tensor, step: int, epoch: int) -> list[Share]:
        """Minibatches, and this rank's micro-batches of each: a permutation that is a function of (seed, step, epoch). A prompt's samples stay together, so
        that minibatches are independent of each other, unless there are fewer prompts than minibatches."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + epoch)
        count = self.config.training.minibatches
        units = batch.group_B[kept].unique(return_inverse=True)[1]
        if units.max() + 1 < count:
            units = torch.arange(len(kept))
        order = torch.randperm(int(units.max()) + 1, generator=generator)
        minibatches = [torch.cat([kept[units == u] for u in part]) for part in order.tensor_split(count) if len(part)]
        return [self._share(m, batch, self.policy) for m in minibatches]

    def _share(self, rows: Tensor, batch: Batch, policy: Policy) -> Share:
        return Share.of(rows, batch.length_B, self.config.training.micro_budget, policy.packs, self.mesh)

    def _beside(self, batch: Batch, step: int, epoch: int, count: int) -> list[Tensor]:
        """What only the critic learns from, dealt out to an epoch's updates, the groups whole."""
        if batch.beside_B is None:
            return [torch.zeros(0, dtype=torch.long)] * count
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + epoch)
        rows = batch.beside_B.nonzero()[:, 0]
        group, unit = batch.group_B[rows].unique(return_inverse=True)
        order = torch.randperm(len(group), generator=generator)
        return [rows[torch.isin(unit, part)] for part in order.tensor_split(count)]

    def _policy_gradient(
        self,
        batch: Batch,
        advantage_B: Tensor,
        minibatch: Share,
        old_BT: Tensor,
        reference_BT: Tensor | None,
        number: int,
        tally: Tally,
    ) -> None:
        """Add up the gradient of one minibatch's loss over this rank's micro-batches."""
        o, rows = self.config.objective, minibatch.rows
        sequences, tokens = float(len(rows)), float(batch.response_len_B[rows].sum())
        divisor = denominator(o, sequences, tokens, self.config.rollout.max_tokens)
        for n, part in enumerate(minibatch, 1):
            current, last = self._logps(self.policy, batch, part), n == len(minibatch)
            if not len(part):  # other ranks have a micro-batch more
                self.policy_optimiser.backward(current.logp_BT.sum(), last=last)
                continue
            width, device = current.mask_BT.size(1), current.logp_BT.device
            if number == 0:
                self._settle_first(old_BT, part, current.logp_BT, tally)

            def of(full: Tensor, part: Tensor = part, width: int = width, device: torch.device = device) -> Tensor:
                return (full[part, :width] if full.dim() == 2 else full[part]).to(device)

            x = Scored(
                current.logp_BT,
                of(old_BT),
                of(batch.behaviour_logp_BT),
                current.mask_BT,
                None if reference_BT is None else of(reference_BT),
                None if batch.weight_B is None else of(batch.weight_B),
                current.entropy_BT,
            )
            found = policy_loss(x, of(advantage_B), o, sequences=sequences, divisor=divisor)
            self.policy_optimiser.backward(found.value, last=last)
            if found.correction is not None:
                tally.correction.append(found.correction.cpu())
            tally.observe(
                number,
                part,
                found.value.detach(),
                found.log_ratio.detach(),
                found.clipped,
                found.element_mask,
                current.entropy_BT,
                x.mask_bT,
                x.old_bT,
                x.behaviour_bT + of(batch.kept_BT),
                x.logp_bT.detach(),
            )
            self._done += 1
            self.progress(self._done, self._total)

    def _teach(self, lessons: Lessons, number: int, updates: int, tally: Tally) -> None:
        """Add the gradient of every updates-th lesson from `number` on: weight times the mean negative log-probability of a token, over as
        many lessons as there could be, so that a single one is not learnt with the weight of all."""
        batch = lessons.batch
        rows = torch.arange(number, len(batch), updates)
        total = 0.0
        weight_B = torch.tensor(lessons.weights) / batch.response_len_B
        parts = self._share(rows, batch, self.policy)
        for n, part in enumerate(parts, 1):
            current = self._logps(self.policy, batch, part)
            nll_b = -torch.where(current.mask_BT, current.logp_BT, 0.0).sum(1)
            loss = (weight_B[part].to(nll_b.device) * nll_b).sum() / (lessons.most / updates)
            self.policy_optimiser.backward(loss, last=n == len(parts))
            total += float(loss.detach())
        if len(rows):
            tally.add("search/loss", self.mesh.sum(total))

    def _teach_critic(self, batch: Batch, rows: Tensor, lr: float, tally: Tally) -> None:
        began = time.perf_counter()
        learnt = self.credit.learn(batch, rows, lr)
        if learnt is not None:
            loss, norm = learnt
            tally.add("critic/loss", loss)
            self.bad_total += not math.isfinite(norm)
        self.critic_seconds += time.perf_counter() - began

    def _gradient(self) -> Tensor:
        """The policy's gradient as one vector."""
        return torch.cat([g.flatten().float().cpu() for g in self.policy_optimiser.gradients()])

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def _logps(self, policy: Policy, batch: Batch, part: Tensor) -> ActionLogps:
        return policy.logps(*batch.rows(part), self.config.rollout.temperature)

    @torch.no_grad()
    def _fill_old(self, old_BT: Tensor, batch: Batch, minibatches: list[Share]) -> None:
        """log π_old of this rank's rows of some minibatches by a pass of their own."""
        for part in (p for minibatch in minibatches for p in minibatch):
            logp = self._logps(self.policy, batch, part).logp_BT
            old_BT[part, : logp.size(1)] = logp.to(old_BT.dtype).cpu()

    def _settle_old(self, old_BT: Tensor, batch: Batch, plan: list[Share], tally: Tally) -> None:
        """log π_old of all minibatches, on every rank, once each has computed its part of the first. The others' are the engine's where
        the first shows that they are the learner's, else they are computed."""
        if not self.ratio_checked:
            self._check_first(self.mesh.max(tally.first_gap or 0.0))
        self.mesh.fill(old_BT, plan[0].mine, plan[0].rows)
        if len(plan) == 1:
            return
        o, first = self.config.objective, plan[0].rows
        engine_BT = batch.behaviour_logp_BT + batch.kept_BT
        pair = old_BT[first], engine_BT[first], batch.mask_BT[first]
        off = float(log_ratio(*pair, o.ratio, o.kappa).abs().max())
        if o.engine_correction:
            off = max(off, float(mismatch(*pair, o).abs().max()))
        tally.served = off <= min(NEGLIGIBLE, OF_CLIP * min(o.clip))
        tally.add("engine/serves_as_old", float(tally.served))
        rest = torch.cat([minibatch.rows for minibatch in plan[1:]])
        if tally.served:
            old_BT[rest] = engine_BT[rest]
            return
        self._fill_old(old_BT, batch, plan[1:])
        self.mesh.fill(old_BT, torch.cat([minibatch.mine for minibatch in plan[1:]]), rest)

    def _settle_first(self, old_BT: Tensor, part: Tensor, logp_bT: Tensor, tally: Tally) -> None:
        """On the first update old and current are the same numbers. Once a run that is verified, not assumed."""
        current = logp_bT.detach().to(old_BT.dtype).cpu()
        if not self.ratio_checked and tally.first_gap is None:
            tally.first_gap = float((old_BT[part, : current.size(1)] - current).abs().max())
        old_BT[part, : current.size(1)] = current

    def _check_first(self, gap: float) -> None:
        tolerance = 0.0 if self.policy.device.type == "cpu" else 1e-2
        if not gap <= tolerance:
            raise RunFailure(
                f"the first update's ratio is not 1 (log-probabilities differ by {gap:.2g} between two passes over the same "
                "weights): the model is not deterministic in eval mode, e.g. it has dropout of its own"
            )
        self.ratio_checked = True

    @torch.no_grad()
    def _all_logps(self, policy: Policy, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Of some rows of the batch, or of all; 0 elsewhere. The policy is the reference, whose weights are let go of."""
        rows = torch.arange(len(batch)) if rows is None else rows
        out_BT = torch.zeros_like(batch.behaviour_logp_BT)
        for part in self._share(rows, batch, policy):
            logp = self._logps(policy, batch, part).logp_BT
            out_BT[part, : logp.size(1)] = logp.to(out_BT.dtype).cpu()
        at_rest(policy.scorer)
        return self.mesh.sum(out_BT)

    def _reference(self) -> Policy:
        if self.reference is None:
            raise RunFailure("the recipe reads the reference policy, but none is held")
        return self.reference

    def _loss_reads_reference(self) -> bool:
        o = self.config.objective
        return o.anchor == "reference" or (o.kl > 0 and o.kl_form != "reward")

    def _count_bad(self, norm: float) -> None:
        """Count updates that were not finite, each of which was skipped; too many in a row stop the run."""
        bad = not math.isfinite(norm)
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        self.bad_total += bad
        if self.bad_in_a_row >= self.config.training.max_bad_updates:
            raise NonFinite(
                f"the policy's loss or gradient was not finite in {self.bad_in_a_row} updates in a row (each was skipped): "
                "lower training.lr, or look for infinite log-probabilities in the last rollouts file"
            )

    def values(self, batch: Batch) -> Tensor | None:
        """What the critic predicts before each token, [B, T]; None where it reads prompts only, or there is none."""
        return self.credit.values(batch) if isinstance(self.credit, TokenCritic) else None

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the models' weights, which checkpoints hold as model folders: the same from any number of ranks. All of them
        must ask for it; of what is divided among them only the first has the tensors."""
        return {
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "credit": self.credit.state_dict(),
            "bad_in_a_row": self.bad_in_a_row,
            "bad_total": self.bad_total,
            "gap_limit": self.gap_limit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back, which may be of another number of ranks; every rank is given all of it."""
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.credit.load_state_dict(state["credit"])
        self.bad_in_a_row, self.bad_total = state["bad_in_a_row"], state["bad_total"]
        self.gap_limit = state.get("gap_limit")  # not in checkpoints of older versions
