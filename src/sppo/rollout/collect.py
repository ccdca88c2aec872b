"""Tasks in, judged rollouts out: sample with the engine, decode, judge, apply the truncation rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..models.policy import Policy
from ..rewards.base import Reward
from ..types import Rollout, Task, Verdict
from .engine import Branching, Engine, Sampling, TreeEngine


def sample_seed(*parts: int | str) -> int:
    """A 64-bit seed from what identifies a sample (run seed, stream, step, task, index): no state to save or lose."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def collect(
    engine: Engine,
    policy: Policy,
    reward: Reward,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: tuple[int | str, ...],
    truncated: str = "penalise",
    progress: Callable[[int], None] | None = None,
    judging: Callable[[int], None] | None = None,
    branching: Branching | None = None,
) -> list[Rollout]:
    """`samples` judged rollouts for each task, a task's samples next to each other; with `branching`, the leaves of a tree for each task.

    `policy` lends its tokenizer; the weights are the engine's. `progress` is called with how many are sampled, `judging` with how many are to be
    judged. A response cut at the limit scores 0 under `penalise` (its outcome is never `correct`, and `truncated` is in the evidence), is masked
    under `mask`, and is as judged under `keep`.
    """
    repeated = [(task, k) for task in tasks for k in range(samples)]
    prompt_ids = {id(task): policy.prompt_ids(task) for task in tasks}
    prompts = [prompt_ids[id(task)] for task, _ in repeated]
    seeds = [sample_seed(*seed, position // samples, k) for position, (_, k) in enumerate(repeated)]
    if branching is None:
        responses = engine.generate(prompts, seeds, sampling, progress)
    else:
        if not isinstance(engine, TreeEngine):
            raise TypeError("this engine cannot branch")
        trees = engine.generate_trees(prompts, seeds, sampling, branching, progress)
        repeated = [(task, k) for (task, _), leaves in zip(repeated, trees, strict=True) for k in range(len(leaves))]
        responses = [leaf for leaves in trees for leaf in leaves]
    rollouts = [
        Rollout(
            task,
            prompt_ids[id(task)],
            r.ids,
            r.logps,
            r.finish,
            policy.text(r.ids),
            k,
            kept=r.kept,
            forks=r.forks,
            version=r.version,
        )
        for (task, k), r in zip(repeated, responses, strict=True)
    ]
    if judging is not None:
        judging(len(rollouts))
    verdicts = reward.judge(rollouts)
    return [r.judged(truncation_rule(r, v, truncated)) for r, v in zip(rollouts, verdicts, strict=True)]


def truncation_rule(rollout: Rollout, verdict: Verdict, rule: str) -> Verdict:
    """A response cut at the limit scores 0 (`penalise`), is masked (`mask`), or keeps its verdict (`keep`). What a reward would have paid stays in
    the evidence (`paid_before_cut`)."""
    if rollout.finish == "stop" or verdict.masked or rule == "keep":
        return verdict
    evidence = {**verdict.evidence, "truncated": rule}
    if verdict.score > 0:
        evidence["paid_before_cut"] = verdict.score
    if rule == "mask":
        return replace(verdict, excluded=True, evidence=evidence)
    outcome = "wrong" if verdict.outcome == "correct" else verdict.outcome
    return replace(verdict, score=0.0, correctness=0.0, outcome=outcome, evidence=evidence)


def overruled(verdicts: Sequence[Verdict]) -> float:
    """The share of responses that the reward would have paid, had they not been cut at the limit."""
    return sum("paid_before_cut" in v.evidence for v in verdicts) / max(len(verdicts), 1)
