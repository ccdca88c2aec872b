"""What a user must know of a step that is not well, said once a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..config import Config
from ..rollout.engine import Sampling
from ..types import Verdict

LOW_ESS = 0.1
"""Below this effective sample size the importance weights carry almost no information."""


class Health:
    """Looks at each step's numbers and verdicts; `say` hears a sentence with the cause and the mend."""

    def __init__(self, config: Config, sampling: Sampling, say: Callable[[str], None]) -> None:
        self.config, self.sampling, self.say = config, sampling, say
        self._said: set[str] = set()

    def before(self) -> None:
        """What the recipe alone tells."""
        updates = self.config.training.minibatches * self.config.training.epochs
        if self.config.objective.surrogate == "plain" and updates > 1:
            self.say(
                f"objective.surrogate = 'plain' corrects for no ratio, and {updates} updates a step follow each other: all but the first are off policy"
            )

    def look(self, metrics: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
        """After a step; `verdicts` are of every response that was judged, trained on or not."""
        ess, correction = metrics.get("ratio/ess"), metrics.get("engine/correction_ess")
        ratio = self.config.objective.ratio
        if ess is not None and ess < LOW_ESS:
            self._once(
                "ess",
                f"ratio = {ratio!r} leaves an effective sample size of {ess:.1%} at {metrics['rollout/mean_tokens']:.0f} tokens: "
                "use ratio = 'geometric' or 'token', fewer minibatches, or a lower learning rate",
            )
        if correction is not None and correction < LOW_ESS:
            cut = self.sampling.cut
            cause = "top_k, top_p or min_p" if cut else "the engine's precision"
            mend = "sample without them, or use ratio = 'token'" if cut else "use ratio = 'token' or 'geometric'"
            self._once(
                "correction",
                f"correcting for {cause} leaves an effective sample size of {correction:.1%} with ratio = {ratio!r}: {mend}",
            )
        masked = [v for v in verdicts if v.masked and "quarantined" not in v.evidence]
        lost = next((v for v in masked if f"masked {v.outcome}" not in self._said), None)
        if lost is not None:
            outcomes = ", ".join(f"{k} {v}" for k, v in sorted(Counter(v.outcome for v in verdicts).items()))
            why = lost.evidence.get("reason")
            self._once(
                f"masked {lost.outcome}",
                f"{len(masked)} of this step's samples could not be graded and are masked ({outcomes})"
                + (f": {str(why)[:300]}" if why else ""),
            )
        if metrics.get("advantage/std") == 0.0:
            self._once("flat", "every advantage is the same, so this step teaches nothing (all rewards equal?)")

    def _once(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(f"warning: {sentence}")
