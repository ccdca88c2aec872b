"""Warnings about a step whose numbers show a problem, each at most once per run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..evaluation.evaluate import Evaluation
from ..recipe.config import Config
from ..rollout.engine import Sampling
from ..types import Verdict

LOW_ESS = 0.5
"""An effective sample size below which more than half of what was sampled is lost to the variance of its weights."""
FAR = 0.2
"""An exact importance weight has mean 1; at a larger distance than this, the loss is scaled by something the recipe does not say."""
MANY_CUT, SOME_OVERRULED = 0.5, 0.02
"""Shares of responses cut at the limit, and of those that the reward would have paid, from which a warning is due."""


class Warnings:
    """Looks at each step's numbers and verdicts; `say` is called with a sentence: the cause, and what to do."""

    def __init__(self, config: Config, sampling: Sampling, say: Callable[[str], None]) -> None:
        self.config, self.sampling, self.say = config, sampling, say
        self._said: set[str] = set()

    def before(self) -> None:
        """Warn of what the recipe alone shows."""
        updates = self.config.training.minibatches * self.config.training.epochs
        if self.config.objective.surrogate == "plain" and updates > 1:
            self.say(
                f"objective.surrogate = 'plain' corrects for no ratio, and a step has {updates} updates: all but the first are off policy"
            )

    def look(self, metrics: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
        """After a step; `verdicts` are of every response that was judged, trained on or not."""
        ess, correction = metrics.get("ratio/ess"), metrics.get("engine/correction_ess")
        ratio, tokens = self.config.objective.ratio, metrics["rollout/mean_tokens"]
        if ess is not None and ess < LOW_ESS:
            other = "" if ratio == "token" else "objective.ratio = 'token' (or 'family'), "
            self._once(
                "ess",
                f"the updates of one step move the policy so far that the weights of ratio = {ratio!r} leave an effective sample size of {ess:.0%} at "
                f"{tokens:.0f} tokens: use {other}fewer minibatches or epochs, or a lower training.lr",
            )
        self._corrected(correction, metrics.get("engine/correction_mean"), tokens)
        fate = "are masked" if self.config.rollout.truncated == "mask" else "score 0"
        self._cut(metrics["rollout/truncated"], metrics["rollout/overruled"], "step's", fate)
        masked = [v for v in verdicts if v.masked and not {"quarantined", "truncated"} & v.evidence.keys()]
        lost = next((v for v in masked if f"masked {v.outcome}" not in self._said), None)
        if lost is not None:
            outcomes = ", ".join(f"{k} {v}" for k, v in sorted(Counter(v.outcome for v in verdicts).items()))
            why = lost.evidence.get("reason")
            self._once(
                f"masked {lost.outcome}",
                f"{len(masked)} of this step's samples could not be graded and are masked ({outcomes})"
                + (f": {str(why)[:300]}" if why else ""),
            )
        if metrics["reward/spread"] == 0.0:
            self._once("flat", self._flat(metrics))

    def _corrected(self, ess: float | None, mean: float | None, tokens: float) -> None:
        """Warn of weights between engine and learner that vary much, or whose mean is not 1."""
        if ess is not None and ess < LOW_ESS:
            left = f"an effective sample size of {ess:.0%}"
        elif mean is not None and abs(mean - 1) > FAR:
            left = f"a mean weight of {mean:.2f} instead of 1"
        else:
            return
        whole, cut = self.config.objective.engine_correction_level == "sequence", self.sampling.cut
        what = f"whole responses of {tokens:.0f} tokens" if whole else "each token"
        cause = "rollout.top_k, top_p or min_p" if cut else "what engine and learner differ by"
        lag = 0 if self.config.cluster is None else self.config.cluster.lag
        first = "sample without them, or " if cut else ""
        if lag:
            cause, first = f"the {lag} updates that they were sampled ahead of", "lower cluster.lag, or "
        second = (
            "set objective.engine_correction_level = 'token'"
            if whole
            else "leave it out with objective.engine_correction = 0"
            if cut
            else "use policy.dtype = 'float32', or an engine that is closer to the learner (engine/gap_mean)"
        )
        self._once("correction", f"correcting {what} for {cause} leaves {left}: {first}{second}")

    def evaluated(self, result: Evaluation) -> None:
        """After the first evaluation, before anything is trained."""
        self._cut(result.truncated, result.overruled, "held-out", "count as wrong")

    def _cut(self, truncated: float, overruled: float, whose: str, fate: str) -> None:
        """Warn of responses cut at the limit, where that changes their verdict: many of them, or some that the reward pays."""
        r = self.config.rollout
        if r.truncated == "keep" or (truncated < MANY_CUT and overruled < SOME_OVERRULED):
            return
        lost = f", {overruled:.0%} although the reward would have paid them" if overruled else ""
        self._once(
            "overruled" if overruled >= SOME_OVERRULED else "cut",
            f"{truncated:.0%} of the {whose} responses were cut at rollout.max_tokens = {r.max_tokens} and {fate}{lost}: raise rollout.max_tokens, "
            "or set rollout.truncated = 'keep' where a response that was cut may be right",
        )

    def _flat(self, m: dict[str, Any]) -> str:
        """The warning for a step whose rewards are all equal; what such a step does depends on the baseline."""
        said = f"every reward of this step is {m['reward/mean']:.2f}, so it shows no response to be better than another"
        if not m["advantage/size"]:
            o = self.config.objective
            return (
                f"{said}: all advantages are 0, and the policy gets no gradient from them"
                + ("; objective.kl still pulls it to its start" if o.kl else "")
                + ("; objective.entropy_bonus still makes it less sure" if o.entropy_bonus else "")
            )
        size = f"the advantages are not 0 ({m['advantage/size']:.3f} on average)"
        if self.config.critic_reads == "tokens":
            return f"{said}; {size}, and follow the critic's values of tokens alone"
        return (
            f"{said}; {size}, because the baseline expected another reward. They cancel out over many responses; in one step they move the "
            f"policy at random (KL {m.get('policy/kl_step') or 0:.1e} per token)"
            + ("" if self.config.critic_reads is None else ". The critic learns from it as usual")
        )

    def _once(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(f"warning: {sentence}")
