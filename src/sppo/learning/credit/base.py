"""Where a response's credit comes from: its reward less a baseline. One class for each kind of knowledge that a baseline has.

    PromptCritic   V(x), a prediction from the prompt alone                 critic, centred, beta
    TokenCritic    a value for every token, and GAE                         token-critic
    hybrid.py      V(x), and what the steps written so far tell            hybrid
    Samples        other rewards of the same step, no critic                batch, others, group, greedy

`advantage` is asked before `learn` has seen the batch's rewards: no baseline ever contains its sample's own reward (but for
`group` and whitening, which are the peers' own habit and scale the gradient).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import RecipeError
from ...models.critic import Critic
from ...models.policy import Policy
from ...objective.advantage import (
    GROUP_EPSILON,
    centred_advantage,
    critic_advantage,
    gae,
    gated_advantage,
    group_deviation,
    group_mean,
    group_sums,
    leave_one_out_mean,
    shrunk_value,
    strata,
    whitened,
)
from ...objective.diagnostics import critic_quality, explained_variance
from ...objective.value import squared_error
from ...recipe.config import Config
from ..batch import Batch, micro_batches
from ..earned import Earned
from ..history import History
from ..optimizer import MasterAdamW
from .optimal_baseline import OptimalBaseline

EV_MEMORY = 0.9
"""Decay of the running explained variance that the EV gate reads."""

Found = tuple[Tensor, Tensor | None, dict[str, Any]]
"""Advantages, [B] or [B, T]; the predicted values V(x), [B], where there is a critic; metrics."""


class Credit(Protocol):
    """What the learner asks for advantages, and teaches with each minibatch."""

    critic: Critic | None
    charges_tokens: bool
    """Whether a KL in the reward is charged to each token, as `batch.cost_BT` has it; else `reward_B` is less the response's."""

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """Advantages from everything known before this batch; masked rollouts get whatever, and are not used."""

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float] | None:
        """Train on some rows of the batch that `advantage` saw last; loss and gradient norm, or None where there is nothing to train."""

    def moved(self, nats: float) -> None:
        """The policy moved by so much in this step (KL of a whole response)."""

    def state_dict(self) -> dict[str, Any]:
        """All but the critic's weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""


def credit(config: Config, policy: Policy, critic: Critic | None) -> Credit:
    """What `objective.baseline` names."""
    if config.critic_reads is None:
        return Samples(config)
    if critic is None:
        raise RecipeError(f"objective.baseline = {config.objective.baseline!r} needs a critic")
    if config.objective.baseline == "hybrid":
        from .hybrid import hybrid  # it is made of the classes below

        return hybrid(config, policy, critic)
    return (PromptCritic if config.critic_reads == "prompt" else TokenCritic)(config, policy, critic)


def scaled(advantage: Tensor, reward_B: Tensor, batch: Batch, scale: str) -> Tensor:
    """`objective.scale`: nothing, the deviation of each group's rewards, or whitening over the batch."""
    keep = batch.keep_B if advantage.dim() == 1 else batch.keep_B[:, None] & batch.mask_BT
    if scale == "group":
        deviation_B = group_deviation(reward_B, batch.keep_B, batch.group_B) + GROUP_EPSILON
        return advantage / (deviation_B if advantage.dim() == 1 else deviation_B[:, None])
    return whitened(advantage, keep) if scale == "batch" else advantage


def charged(advantage_BT: Tensor, batch: Batch, decay: float = 1.0) -> Tensor:
    """Advantages less what the KL in the reward charges from each token on, where it charges tokens: Σ_k λ^(k−t)·β·k1_k. [B, T] → [B, T].

    λ is 1 where no value predicts these charges: a smaller one would forgive a token what follows more than some 1/(1 − λ) tokens later, and
    so the expected gradient is that of β·KL(π‖π_ref).
    """
    if batch.cost_BT is None:
        return advantage_BT
    return advantage_BT - gae(batch.cost_BT, torch.zeros_like(batch.cost_BT), batch.mask_BT, decay)


class Samples:
    """Baselines of the step's own rewards: peers without a critic."""

    critic: Critic | None = None
    charges_tokens = False

    def __init__(self, config: Config) -> None:
        self.baseline, self.scale = config.objective.baseline, config.objective.scale

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """R less the mean of others, of the group, or the greedy response's reward."""
        keep_B = batch.keep_B
        if self.baseline == "batch":
            baseline_B = leave_one_out_mean(reward_B, keep_B)
        elif self.baseline == "others":
            baseline_B = leave_one_out_mean(reward_B, keep_B, batch.group_B)
        elif self.baseline == "group":
            baseline_B = group_mean(reward_B, keep_B, batch.group_B)
        else:
            assert batch.greedy_B is not None
            baseline_B = batch.greedy_B
        return scaled(reward_B - baseline_B, reward_B, batch, self.scale), None, {}

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> None:
        """There is nothing to train."""

    def moved(self, nats: float) -> None:
        """It does not matter here."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class _Trained:
    """What both critics share: the optimiser, micro-batches and the metrics of a prediction."""

    charges_tokens = False

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        t = config.training
        self.critic: Critic | None = critic
        self.model, self.policy, self.config = critic, policy, config
        critic.reads_out(linear=config.objective.value_loss == "squared")
        self.optimiser = MasterAdamW(critic.parameters(), betas=t.betas, weight_decay=t.weight_decay)
        self.running_ev: float | None = None
        self.earned = Earned()

    def left(self, batch: Batch, reward_B: Tensor, value_B: Tensor, weight: float = 1.0) -> Tensor:
        """Rewards less (`weight` times) what such chances of success earned beyond V in earlier batches: what V is a baseline of. Then this batch
        is learnt from. [B] × 2 → [B]; the rewards themselves where nothing shapes them (earned.py)."""
        left_B = reward_B - weight * self.earned.beyond(value_B)
        known_B = batch.graded_B & reward_B.isfinite()
        self.earned.learn(batch.correct_B[known_B], reward_B[known_B], batch.share_B[known_B])
        return left_B

    def moved(self, nats: float) -> None:
        """The policy moved by so much in this step (KL of a whole response)."""

    def quality(self, batch: Batch, value_B: Tensor) -> dict[str, Any]:
        """How good the predictions were, made before these rewards were seen."""
        correct_b, value_b = batch.correct_B[batch.graded_B], value_B[batch.graded_B]
        metrics: dict[str, Any] = critic_quality(correct_b, value_b)
        metrics["critic/value_mean"] = float(value_b.mean()) if len(value_b) else None
        ev = explained_variance(correct_b, value_b)
        if ev is not None:
            previous = ev if self.running_ev is None else self.running_ev
            self.running_ev = EV_MEMORY * previous + (1 - EV_MEMORY) * ev
        metrics["critic/running_ev"] = self.running_ev
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, and what was measured."""
        return {"optimiser": self.optimiser.state_dict(), "running_ev": self.running_ev, "earned": self.earned.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.running_ev = state["running_ev"]
        self.earned.sums = list(state.get("earned", self.earned.sums))  # of a version that knew none


class PromptCritic(_Trained):
    """R − b(x), b from V(x) = σ(c(x)): as it is, with what it missed on the others, or shrunk towards what was seen of the prompt; and with
    `objective.optimal_baseline`, moved from the best prediction to the best baseline."""

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        super().__init__(config, policy, critic)
        self.history = History(config.objective.half_life)
        self.optimal = OptimalBaseline(policy, config.objective)

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """See the protocol."""
        o, keep_B = self.config.objective, batch.graded_B
        logit_B = self.model.logits([r.task for r in batch.rollouts], self.config.training.micro_budget)
        value_B = logit_B.sigmoid()
        metrics: dict[str, Any] = {}
        paid_B = batch.correct_B  # what OptimalBaseline turns into a baseline is a chance of success
        if not o.optimal_baseline:
            trusted = not o.ev_gate or (self.running_ev or 0.0) > 0  # the gate is for R as it is
            paid_B = self.left(batch, reward_B, value_B, o.baseline_weight if trusted else 0.0)
        if o.baseline == "beta":
            metrics["critic/strength"] = self.history.strength
            advantage_B = paid_B - self._shrunk(batch, paid_B, value_B)
        elif o.baseline == "centred":
            stratum_B = strata([r.task.difficulty for r in batch.rollouts], keep_B, batch.group_B)
            advantage_B = centred_advantage(paid_B, logit_B, keep_B, stratum_B)
        elif o.ev_gate:
            advantage_B = gated_advantage(paid_B, logit_B, keep_B, self.running_ev)
        else:
            advantage_B = critic_advantage(paid_B, logit_B, o.baseline_weight)
        if o.optimal_baseline:
            metrics["critic/shift"] = self.optimal.shift
            chance_B = paid_B - advantage_B
            advantage_B = reward_B - self.optimal.baseline(chance_B)
            self.optimal.learn(batch, chance_B, reward_B)
        metrics |= self.quality(batch, value_B)
        return scaled(advantage_B, reward_B, batch, o.scale), value_B, metrics

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float]:
        """Binary cross-entropy of V(x) against the correctness of the responses (never a shaped reward)."""
        prompts = [self.model.prompt_ids(batch.rollouts[i].task) for i in rows.tolist()]
        target_b, share_b = batch.correct_B[rows], batch.share_B[rows]
        length_b = torch.tensor([len(p) for p in prompts])
        total = 0.0
        for part in micro_batches(torch.arange(len(rows)), length_b, self.config.training.micro_budget):
            logit = self.model.prompt_logits([prompts[i] for i in part.tolist()])
            loss = functional.binary_cross_entropy_with_logits(
                logit, target_b[part].to(logit.device), weight=share_b[part].to(logit.device), reduction="sum"
            ) / float(share_b.sum())
            self.optimiser.backward(loss)
            total += float(loss.detach())
        return total, self.optimiser.step(lr, self.config.training.max_grad_norm)

    def moved(self, nats: float) -> None:
        """Past rewards count the less, the further the policy has moved."""
        self.history.clock += nats

    def _shrunk(self, batch: Batch, reward_B: Tensor, value_B: Tensor) -> Tensor:
        keep_B = batch.graded_B
        names = [r.task.id for r in batch.rollouts]
        past_BN = torch.tensor([self.history.past(name) for name in names])
        sum_B, count_B = group_sums(reward_B, keep_B, batch.group_B)
        own_B = torch.where(keep_B, reward_B, torch.zeros_like(reward_B))
        others_sum_B, others_B = sum_B - own_B, count_B - keep_B.to(count_B.dtype)
        strength = self.history.strength
        out_B = shrunk_value(value_B, strength, past_BN[:, 1] + others_sum_B, past_BN[:, 0] + others_B)
        firsts = [b for b, g in enumerate(batch.group_B.tolist()) if b == 0 or g != int(batch.group_B[b - 1])]
        rewards: list[list[float]] = [[] for _ in firsts]
        for g, r, keep in zip(batch.group_B.tolist(), reward_B.tolist(), keep_B.tolist(), strict=True):
            if keep:
                rewards[g].append(r)
        self.history.observe([names[b] for b in firsts], rewards, [float(value_B[b]) for b in firsts])
        return out_B if strength > 0 else torch.where(past_BN[:, 0] + others_B > 0, out_B, value_B)

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, and what was measured."""
        return super().state_dict() | {"history": self.history.state_dict(), "optimal": self.optimal.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        super().load_state_dict(state)
        self.history.load_state_dict(state["history"])
        if (optimal := state.get("optimal", state.get("odds"))) is not None:  # else of a version that knew none
            self.optimal.load_state_dict(optimal)


class TokenCritic(_Trained):
    """PPO's: a value for the state before every token, generalised advantages, and λ-returns as the critic's target.

    With `objective.value_loss = "squared"`, PPO's own, the value is the critic's read-out, and any number: its target is the return of all that
    is paid, a KL in the reward included, token by token. With "cross-entropy" it is σ of that, a chance, as the prompt critic's, and so are its
    targets: what shapes the reward stays out of them, and the KL has no value to be compared with (`charged`).
    """

    charges_tokens = True

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        super().__init__(config, policy, critic)
        self.target_BT: Tensor | None = None
        self.value_BT: Tensor | None = None  # before the step's updates
        critic.reads_tokens_of(policy)

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """See the protocol; advantages are [B, T]."""
        decay, mask_BT = self.config.objective.gae_lambda, batch.mask_BT
        value_BT = self.values(batch)
        linear = self.model.linear
        advantage_BT = charged(gae(reward_B, value_BT, mask_BT, decay), batch, decay if linear else 1.0)
        target_BT = (advantage_BT if linear else gae(batch.correct_B, value_BT, mask_BT, decay)) + value_BT
        self.target_BT, self.value_BT = target_BT if linear else target_BT.clamp(0, 1), value_BT
        value_B = value_BT[:, 0]  # before the first token: of the prompt alone
        metrics = self.quality(batch, value_B)
        return scaled(advantage_BT, reward_B, batch, self.config.objective.scale), value_B, metrics

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """What is predicted before each token, [B, T]."""
        value_BT = torch.zeros_like(batch.behaviour_logp_BT)
        for part in self._parts(batch, torch.arange(len(batch))):
            logit = self._logits(batch, part)
            value_BT[part, : logit.size(1)] = self.model.value(logit).cpu()
        return value_BT

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float]:
        """Cross-entropy or squared error of every token's value against its λ-return, the mean over tokens."""
        assert self.target_BT is not None
        assert self.value_BT is not None
        tokens, total = int(batch.response_len_B[rows].sum()), 0.0
        for part in self._parts(batch, rows):
            logit = self._logits(batch, part)
            width = logit.size(1)
            target, old = (x[part, :width].to(logit.device) for x in (self.target_BT, self.value_BT))
            if self.model.linear:
                loss_bT = squared_error(logit, target, old, self.config.objective.value_clip)
            else:
                loss_bT = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
            loss = torch.where(batch.mask_BT[part, :width].to(logit.device), loss_bT, 0.0).sum() / max(tokens, 1)
            self.optimiser.backward(loss)
            total += float(loss.detach())
        return total, self.optimiser.step(lr, self.config.training.max_grad_norm)

    def _parts(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        return micro_batches(rows, batch.prompt_len_B + batch.response_len_B, self.config.training.micro_budget)

    def _logits(self, batch: Batch, part: Tensor) -> Tensor:
        logit_bT: Tensor = self.model(batch.ids_BL[part], batch.action_BL[part])
        return logit_bT
