"""Hard problems are searched (experimental/mcts.py), and verified solutions are learnt by supervision.

What search finds is never in the policy gradient, nor in the critic's target: it is not a sample of the policy. Each solution is judged
again whenever it is about to be learnt, and weighs less the likelier sampling alone solves its problem: weight · (1 − V(x)/enough).
`buffer.jsonl` holds every solution with where it came from; a resumed run reads it back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import RecipeError, RewardError
from ..files import read_bytes, readable
from ..learning.batch import pack
from ..learning.credit.hybrid import step_scores
from ..learning.learner import Learner
from ..learning.lessons import Lessons
from ..recipe.sections import SearchSection
from ..rewards.segments import STOPS, seen_ends, segment_starts, token_ends
from ..rollout.sampler import sample_seed
from ..rollout.sequences import ending_ids
from ..run.build import Components
from ..run.directory import no_space
from ..run.rollouts import task_json
from ..types import Rollout, Task, Verdict
from .mcts import Found, Ids, Judged, search


def build(
    section: SearchSection, components: Components, learner: Callable[[], Learner], fingerprint: Callable[[], str]
) -> Search:
    """The search of a run. Raises RecipeError where its buffer could not hold the problems.

    Args:
        learner: returns the run's, which is made after the search.
        fingerprint: returns that of the weights that sample.
    """
    return Search(section, components, learner, fingerprint)


class Search:
    """The search of one run, and its buffer."""

    def __init__(
        self,
        section: SearchSection,
        components: Components,
        learner: Callable[[], Learner],
        fingerprint: Callable[[], str],
    ) -> None:
        self.section, self.components = section, components
        self.learner, self.fingerprint = learner, fingerprint
        self.path = components.directory.path / "buffer.jsonl"
        self.solutions: dict[str, Rollout] = {}
        self.ungraded = 0  # in the present step
        self.reason, self.warned = "", False
        _task(components.held_out[0])

    def recall(self, before: int) -> None:
        """Read back what was found before a step. Raises DataError."""
        self.solutions.clear()
        with readable(f"{self.path} cannot be resumed from"):
            for line in read_bytes(self.path).decode().split("\n") if self.path.exists() else ():
                if line and (entry := json.loads(line))["step"] < before:
                    self._keep(_solution(entry))

    def step(self, step: int, rollouts: Sequence[Rollout]) -> tuple[Lessons | None, dict[str, Any]]:
        """Search the hard problems among a step's, and choose what is to be learnt with its update; also metrics."""
        self.ungraded = 0
        hard = self._hard(rollouts)
        found = self._search(step, hard)
        fresh = []
        for rollout, result in zip(hard, found, strict=True):
            if result.solution is not None:
                entry = self._entry(step, self._rollout(rollout, result.solution), result)
                if self._keep(_solution(json.loads(entry))):  # what a resumed run would read
                    fresh.append(entry + "\n")
        with no_space(self.path.parent), self.path.open("a") as file:
            file.writelines(fresh)
            file.flush()
            os.fsync(file.fileno())
        simulations = sum(f.simulations for f in found)
        if simulations and self.ungraded == simulations and not self.warned:
            self.warned = True
            self.components.observer.note(
                f"warning: the reward could not judge anything that the search wrote, so it finds nothing: {self.reason}"
            )
        lessons, refused = self._lessons(step)
        metrics: dict[str, Any] = {
            "search/problems": len(hard), "search/solved": sum(f.solution is not None for f in found), "search/fresh": len(fresh),
            "search/simulations": simulations, "search/tokens": sum(f.tokens for f in found),
            "search/buffer": len(self.solutions), "search/refused": refused, "search/ungraded": self.ungraded,
            "search/weight": sum(lessons.weights) / len(lessons.weights) if lessons else None,
        }  # fmt: skip
        return lessons, metrics

    # -- what is searched --------------------------------------------------------------------------------------------

    def _hard(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """One response of each problem that failed at all of its samples and to which the critic gives little hope, the most hopeless last."""
        graded = [r for r in rollouts if r.verdict and not r.verdict.masked]
        solved = {r.task.id for r in graded if _correct(r)}
        failed = list({r.task.id: r for r in graded if r.task.id not in solved}.values())
        chances = self._chances(failed)
        hard = [(v, r) for v, r in zip(chances, failed, strict=True) if v < self.section.below]
        return [r for _, r in sorted(hard, key=lambda entry: -entry[0])[: self.section.problems]]

    def _chances(self, rollouts: Sequence[Rollout]) -> list[float]:
        """V(x) of each one's problem; 0 where the algorithm has no critic."""
        c = self.components
        if c.critic is None or not rollouts:
            return [0.0] * len(rollouts)
        if c.config.critic_reads == "tokens":
            value_BT = self.learner().values(pack(rollouts, c.policy.pad_id))
            assert value_BT is not None
            first: list[float] = value_BT[:, 0].clamp(0, 1).tolist()
            return first
        return c.critic.logits([r.task for r in rollouts], c.config.training.micro_budget).sigmoid().tolist()

    def _search(self, step: int, hard: Sequence[Rollout]) -> list[Found]:
        c, sampling = self.components, self.components.sampling
        longest = c.config.rollout.max_tokens
        if self.section.value != "outcomes":  # what is written can be judged at the next segment's end
            segments = c.config.rollout.segments
            sampling = replace(sampling, stop=(*sampling.stop, *STOPS.get(segments, ())))
            sampling = replace(sampling, max_tokens=1) if segments == "tokens" else sampling

        def write_on(prefixes: Sequence[tuple[int, Ids]], seeds: Sequence[int]) -> list[Ids]:
            prompts = [[*hard[i].prompt_ids, *ids] for i, ids in prefixes]
            limits = [min(sampling.max_tokens, longest - len(ids)) for _, ids in prefixes]
            samples = c.engine.generate(prompts, seeds, replace(sampling, max_tokens=max(limits)), limits=limits)
            return [tuple(s.ids) for s in samples]

        def judge(responses: Sequence[tuple[int, Ids]]) -> list[Judged | None]:
            return self._outcomes(self._judged([self._rollout(hard[i], ids) for i, ids in responses]))

        s = self.section
        return search(
            len(hard), write_on, judge, budget=s.budget, longest=longest, seed=sample_seed(c.config.seed, "search", step),
            explore=s.explore, width=s.width,
        )  # fmt: skip

    def _rollout(self, like: Rollout, ids: Ids) -> Rollout:
        policy, stop = self.components.policy, self.components.sampling.stop
        text = policy.text(ids)
        stopped = ids[-1] in ending_ids(policy, stop) or any(s in text for s in stop)
        task = replace(like.task, weight=1.0)
        return Rollout.answer(task, like.prompt_ids, list(ids), [0.0] * len(ids), "stop" if stopped else "length", text)

    def _judged(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """With verdicts. A reward that fails on a whole lot of prefixes fails on them alone: the step's own responses tell whether it is broken."""
        if not rollouts:
            return []
        try:
            verdicts = self.components.reward.judge(rollouts)
        except RewardError as error:
            verdicts = [Verdict(0.0, "infra_error", {"reason": str(error)})] * len(rollouts)
        masked = [v for v in verdicts if v.masked]
        self.ungraded += len(masked)
        self.reason = str(masked[0].evidence.get("reason", masked[0].outcome)) if masked else self.reason
        return [r.judged(v) for r, v in zip(rollouts, verdicts, strict=True)]

    def _outcomes(self, rollouts: Sequence[Rollout]) -> list[Judged | None]:
        """Judged responses, ended or not, as the search reads them."""
        values = self._values(rollouts)
        return [self._outcome(r, v) for r, v in zip(rollouts, values, strict=True)]

    def _values(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], list[float | None]]]:
        """Where each response's segments end, and what each prefix up to there is worth."""
        c, out = self.components, []
        token_BT = None
        if self.section.value == "critic" and rollouts and c.config.critic_reads == "tokens":
            token_BT = self.learner().values(pack(rollouts, c.policy.pad_id))
            assert token_BT is not None
            token_BT = token_BT.clamp(0, 1)
        for b, rollout in enumerate(rollouts):
            length = len(rollout.response_ids)
            ends = [*segment_starts(c.policy, rollout, c.config.rollout.segments)[1:], length]
            values: list[float | None] = [None] * len(ends)
            if token_BT is not None:  # there is no value after the last token: at the end, the value before it
                values = [float(token_BT[b, min(end, length - 1)]) for end in ends]
            elif self.section.value == "steps" and rollout.verdict and not rollout.verdict.masked:
                values = self._step_values(rollout, ends)
            out.append((ends, values))
        return out

    def _step_values(self, rollout: Rollout, ends: Sequence[int]) -> list[float | None]:
        """The worst score among the steps that had ended by each place; None before the first one."""
        steps, split = step_scores(rollout)
        written = seen_ends(rollout.text, [s["end"] for s in steps], split)
        if rollout.finish == "stop":  # the last step has ended with the response
            written = [len(rollout.text) if end is None else end for end in written]
        judged = [
            (s["score"], end)
            for s, end in zip(steps, written, strict=True)
            if s["score"] is not None and end is not None
        ]
        places = token_ends(self.components.policy, rollout, [end for _, end in judged])
        scores = [(score, place) for (score, _), place in zip(judged, places, strict=True)]
        return [min((score for score, place in scores if place <= end), default=None) for end in ends]

    def _outcome(self, rollout: Rollout, values: tuple[list[int], list[float | None]]) -> Judged | None:
        verdict = rollout.verdict
        assert verdict is not None
        if verdict.masked:
            return None
        ends, worth = values
        sound = self.section.value != "steps" or worth[-1] is None or worth[-1] >= 0.5
        over = rollout.finish == "stop" or len(rollout.response_ids) >= self.components.config.rollout.max_tokens
        outcome = verdict.correct if rollout.finish == "stop" else 0.0 if over or worth[-1] is None else worth[-1]
        return Judged(tuple(rollout.response_ids), ends, worth, outcome, _correct(rollout) and sound, over)

    # -- what is learnt ----------------------------------------------------------------------------------------------

    def _keep(self, solution: Rollout) -> bool:
        """Put a solution into the buffer, unless the same text to the same problem is there."""
        key = hashlib.sha256(f"{solution.task.id}\n{solution.text}".encode("utf-8", "backslashreplace")).hexdigest()
        if key in self.solutions:
            return False
        self.solutions[key] = solution
        return True

    def _lessons(self, step: int) -> tuple[Lessons | None, int]:
        """Some solutions, judged again, that weigh anything; how many were refused this time."""
        known = list(self.solutions.values())
        chosen = np.random.Generator(np.random.Philox(key=sample_seed(self.components.config.seed, "lessons", step)))
        drawn = self._judged([known[i] for i in chosen.permutation(len(known))[: self.section.batch]])
        no = self.components.monitors.refuses(drawn)
        found = self._outcomes(drawn)
        right = [
            r for i, (r, f) in enumerate(zip(drawn, found, strict=True)) if f is not None and f.solved and i not in no
        ]
        refused = len(drawn) - len(right)
        weights = [self.section.weight * max(0.0, 1 - v / self.section.enough) for v in self._chances(right)]
        taught = [(r, w) for r, w in zip(right, weights, strict=True) if w > 0]
        if not taught:
            return None, refused
        batch = pack([r for r, _ in taught], self.components.policy.pad_id)
        return Lessons(batch, [w for _, w in taught], self.section.batch), refused

    def _entry(self, step: int, solution: Rollout, result: Found) -> str:
        return json.dumps({
            "step": step, "task": _task(solution.task),
            "prompt_ids": list(solution.prompt_ids), "response_ids": list(solution.response_ids), "response": solution.text,
            "found_by": f"mcts, value={self.section.value}", "simulations": result.simulations, "tokens": result.tokens,
            "policy_fingerprint": self.fingerprint(),
        })  # fmt: skip


def _task(task: Task) -> dict[str, Any]:
    """A task as JSON can hold it and give it back. Raises RecipeError."""
    text = task_json(task)
    if text is None:
        kinds = ", ".join(f"{k} ({type(v).__name__})" for k, v in task.columns.items())
        raise RecipeError(
            f"[search] keeps solved problems in buffer.jsonl, and JSON cannot hold the columns of task {task.id}: {kinds}; give plain "
            "numbers, text and lists, or leave [search] out"
        )
    return {"id": task.id, "difficulty": task.difficulty, **json.loads(text)}


def _correct(rollout: Rollout) -> bool:
    """Whether a response ended by itself, is right, and is paid for (a gate may refuse what is right)."""
    verdict = rollout.verdict
    right = verdict is not None and not verdict.masked and verdict.outcome == "correct" and verdict.score > 0
    return right and rollout.finish == "stop"


def _solution(entry: dict[str, Any]) -> Rollout:
    task = Task(**entry["task"])
    ids = entry["response_ids"]
    return Rollout.answer(task, entry["prompt_ids"], ids, [0.0] * len(ids), "stop", entry["response"])
