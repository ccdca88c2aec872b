"""What a run took, part by part, from its recipe, its metrics and the responses that it recorded.

    sampling   seconds/rollout = call · chunks + level · (what the chunks take by the curve) + verdicts
    update     seconds/update  = minibatch · minibatches + train · (tokens + prompt tokens)

The curve, seconds of a decoding pass by live sequences, is timed here with the policy of the run's newest checkpoint and the local engine; `level`
makes it the run's. For another engine, or without a checkpoint, a straight line is fitted instead (fixed · passes + each · tokens).

Fits are least squares of relative errors over steps, no coefficient below 0. What does not depend on tokens (`call`, `minibatch`, `fixed`) is kept as
small as the steps allow, since within one run it cannot be told from the rest: add runs with other `rollout.prompts`, `cluster.chunk` or
`training.minibatches`. The tenth of the steps that fits worst is left out (the machine stalled). Verdicts are timed by judging recorded responses
again. Runs of two or more learners add what ranks exchange.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sppo.audit.replay import recorded, rows_of
from sppo.errors import DataError
from sppo.files import readable
from sppo.models.loading import pick_device
from sppo.models.policy import Policy
from sppo.recipe.config import Config
from sppo.rewards.loading import load_reward
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.directory import newest_policy
from sppo.threads import cores

from .model import Layout, Measured, live_profile

BUCKETS = 256
"""Different lengths that a histogram keeps."""


@dataclass(frozen=True)
class Ran:
    """A run: its recipe, and of each step that counts its metrics and its responses' lengths."""

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    lengths: list[np.ndarray]
    prompts: list[np.ndarray]

    @property
    def layout(self) -> Layout:
        """One learner and one worker where the recipe has no [cluster]."""
        if (c := getattr(self.config, "cluster", None)) is None:
            return Layout()
        return Layout(c.learners, c.rollouts, c.lag, c.chunk, c.shards, c.gather)

    def seconds(self, name: str) -> np.ndarray:
        """Of each step; 0 where it was not measured."""
        return np.array([m.get(f"seconds/{name}") or 0.0 for m in self.metrics])


def read(path: Path, skip: int) -> Ran:
    """A run's folder, without its first `skip` steps, in which things are compiled. Raises DataError."""
    with readable(f"{path} cannot be read"):
        config = Config.recalled(path / "recipe.toml")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines][skip:]
        steps = [int(m["step"]) for m in metrics]
    if not metrics:
        raise DataError(f"{path} has no more than {skip} steps: calibrate with a longer run, or with --skip 0")
    rows = [rows_of(path, step) for step in steps]
    lengths = [np.array([float(row["tokens"]) for row in some]) for some in rows]
    prompts = [np.array([float(len(row["prompt_ids"])) for row in some]) for some in rows]
    return Ran(path, config, metrics, lengths, prompts)


def calibrate(paths: Sequence[Path], skip: int = 1, verdict: float | None = None, curve: bool = True) -> dict[str, Any]:
    """A calibration, as JSON has it, with `source` and how well each part fits.

    Args:
        paths: folders of runs of one recipe on one machine; the first one's sizes and lengths are kept.
        skip: the first steps that are left out of each run.
        verdict: seconds of one; else recorded responses are judged again.
        curve: time decoding passes here, where that can be.

    Raises DataError where a run cannot be read, or none tells what one worker takes.
    """
    runs = [read(path, skip) for path in paths]
    alone = [run for run in runs if run.layout.rollouts == 1 and run.layout.lag == 0]
    single = [run for run in runs if run.layout.learners == 1 and run.layout.lag == 0]
    if not alone or not single:
        raise DataError(
            "a calibration needs a run with one worker, one with one learner, both with lag 0 (one run may be both)"
        )
    first, config = runs[0], runs[0].config
    verdicts = [verdict] if verdict is not None else judged_again(first)
    timed = passes_timed(first) if curve and config.rollout.engine == "local" else None
    decoding, sampling = _sampling(alone, float(np.mean(verdicts)), timed)
    minibatch, train, learning = _learning(single)
    r, e = config.rollout, config.evaluation
    m = Measured(
        responses=r.prompts * r.samples, lengths=_histogram(np.concatenate(first.lengths)), **decoding,
        prompt=float(np.concatenate(first.prompts).mean()), slots=r.batch, verdicts=[[seconds, 1.0] for seconds in verdicts],
        train=train, minibatches=config.training.minibatches * config.training.epochs, minibatch=minibatch,
        micro_tokens=float(config.training.micro_budget), transfer=_mean(alone, "sync"), driver=_mean(runs[:1], "monitors"),
        evaluate_every=e.every, evaluated=e.n * e.samples, cores=float(cores()), threads=config.run.threads or cores(),
    )  # fmt: skip
    exchange = _exchange([run for run in runs if run.layout.learners > 1 and run.layout.lag == 0], m)
    fit = {"sampling": sampling, "update": learning}
    return m.as_json() | exchange | {"source": [str(path) for path in paths], "fit": fit}


def _mean(runs: Sequence[Ran], name: str) -> float:
    """The median over steps, which a stall does not move."""
    return float(np.median(np.concatenate([run.seconds(name) for run in runs])))


def _sampling(
    runs: Sequence[Ran], verdict: float, timed: tuple[list[list[float]], float] | None
) -> tuple[dict[str, Any], float]:
    """`call`, `decode` and `prefill` of a calibration, and the mean relative error of the fit."""
    rows, seconds = [], []
    for run in runs:
        batch, judging = run.config.rollout.batch, run.seconds("judging")
        for step, (lengths, prompts) in enumerate(zip(run.lengths, run.prompts, strict=True)):
            size = run.layout.chunk or len(lengths)
            pieces = [lengths[i : i + size] for i in range(0, len(lengths), size)]
            if timed is None:
                passes = float(sum(live_profile(piece, batch)[0].sum() for piece in pieces))
                rows.append([float(len(pieces)), passes, float(lengths.sum() + prompts.sum())])
            else:
                decode, prefill = timed
                m = Measured(1, [[1, 1]], decode, 0.0, prompt=float(prompts.mean()), slots=batch, prefill=prefill)
                rows.append([float(len(pieces)), sum(m.chunk_seconds(piece) for piece in pieces)])
            spent = judging[step] or verdict * len(lengths)
            seconds.append(max(1e-9, run.seconds("rollout")[step] - spent))
    (call, *rest), error = least_squares(np.array(rows), np.array(seconds), rest=len(rows[0]) - 1)
    if timed is not None:
        decode, prefill = timed
        return {"call": call, "decode": [[n, rest[0] * s] for n, s in decode], "prefill": rest[0] * prefill}, error
    fixed, each = rest
    live = max(2.0, float(max(run.config.rollout.batch for run in runs)))
    return {"call": call, "decode": [[1.0, fixed + each], [live, fixed + live * each]], "prefill": each}, error


def passes_timed(run: Ran, tokens: int = 16) -> tuple[list[list[float]], float] | None:
    """Pairs of live sequences and seconds of a decoding pass, and seconds per token of a prompt, of the run's newest policy in this process; None
    where there is no checkpoint."""
    folder = newest_policy(run.path)
    if folder is None:
        return None
    p, torch_threads = run.config.policy, torch.get_num_threads()
    policy, _ = Policy.load(
        str(folder), dtype=p.dtype, device=pick_device(), seed=0, chat_template=p.chat_template, quantize=p.quantize
    )
    policy.eos_ids = []  # responses are as long as they are asked to be
    torch.set_num_threads(run.config.run.threads or cores())
    engine = LocalEngine(policy)
    ids = [row["prompt_ids"] for row in rows_of(run.path, int(run.metrics[-1]["step"]))]
    slots = min(run.config.rollout.batch, max(map(len, run.lengths)))

    def seconds(live: int, length: int) -> float:
        prompts = [ids[i % len(ids)] for i in range(live)]
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            engine.generate(prompts, list(range(live)), Sampling(length, 1.0, live))
            taken.append(time.perf_counter() - began)
        return min(taken)

    try:
        decode, prefill = [], 0.0
        for live in sorted({*(1 << k for k in range(slots.bit_length())), slots}):
            short, long = seconds(live, 1), seconds(live, 1 + tokens)
            decode.append([float(live), max(1e-9, (long - short) / tokens)])
            prefill = short / sum(len(ids[i % len(ids)]) for i in range(live))
        least = np.minimum.accumulate([taken for _, taken in reversed(decode)])[::-1]  # more never take less time
        return [[live, float(taken)] for (live, _), taken in zip(decode, least, strict=True)], prefill
    finally:
        engine.close()
        torch.set_num_threads(torch_threads)


def _learning(runs: Sequence[Ran]) -> tuple[float, float, float]:
    """Seconds per minibatch and per token, and the mean relative error of the fit."""
    rows, seconds = [], []
    for run in runs:
        minibatches, epochs, spent = run.config.training.minibatches, run.config.training.epochs, run.seconds("update")
        for step, (lengths, prompts) in enumerate(zip(run.lengths, run.prompts, strict=True)):
            rows.append([float(minibatches * epochs), float(epochs * (lengths.sum() + prompts.sum()))])
            seconds.append(max(1e-9, spent[step]))
    (minibatch, train), error = least_squares(np.array(rows), np.array(seconds), rest=1)
    return minibatch, train, error


def _exchange(runs: Sequence[Ran], m: Measured) -> dict[str, float]:
    """Bytes per second between ranks, such that what an update of several ranks takes beyond its passes is their exchange."""
    if not runs:
        return {}
    beyond = []
    for run in runs:
        n = run.layout.learners
        threads, slower = m.pace(n)
        slower *= max(1.0, n * threads / (m.cores or math.inf))
        spent = np.median(run.seconds("update"))
        tokens = np.mean([x.sum() + y.sum() for x, y in zip(run.lengths, run.prompts, strict=True)])
        exchange = spent / m.minibatches - slower * (
            m.minibatch + m.train * tokens / run.config.training.minibatches / n
        )
        beyond.append(max(1e-9, float(exchange)) * n / (2 * (n - 1)))
    return {"reduced": 1.0, "gathered": 1.0, "bandwidth": 1.0 / float(np.mean(beyond))}  # in units of one model


def _histogram(lengths: np.ndarray) -> list[list[float]]:
    """Lengths and how often each was seen; of many different ones, quantiles."""
    values, counts = np.unique(lengths, return_counts=True)
    if len(values) <= BUCKETS:
        return np.stack([values, counts], 1).tolist()
    middle = (np.arange(BUCKETS) + 0.5) / BUCKETS
    return [[float(x), 1.0] for x in np.quantile(lengths, middle)]


def least_squares(rows: np.ndarray, seconds: np.ndarray, rest: int = 0) -> tuple[list[float], float]:
    """Coefficients, none below 0, that explain `seconds` [n] by `rows` [n, k] in relative error; and the mean relative error.

    Exact: of all subsets of coefficients that may differ from 0, the best one whose solution has none below 0. The tenth that fits worst is
    left out of a second fit. The share that the first `rest` columns explain counts as an error of a twentieth of itself per step: steps that differ
    outweigh it, and between steps that do not, the other columns explain all.
    """
    found = _fit(rows, seconds, rest)
    error = np.abs(rows @ found / seconds - 1)
    if len(seconds) >= 10:
        kept = error <= np.quantile(error, 0.9)
        found = _fit(rows[kept], seconds[kept], rest)
        error = np.abs(rows[kept] @ found / seconds[kept] - 1)
    return found.tolist(), float(error.mean())


def _fit(rows: np.ndarray, seconds: np.ndarray, rest: int) -> np.ndarray:
    scaled = rows / seconds[:, None]
    shares = 0.05 * math.sqrt(len(seconds)) * np.diag(scaled.mean(0))[:rest]
    scaled, wanted = np.concatenate([scaled, shares]), np.concatenate([np.ones(len(seconds)), np.zeros(rest)])
    best, least = np.zeros(rows.shape[1]), math.inf
    for size in range(1, rows.shape[1] + 1):
        for some in itertools.combinations(range(rows.shape[1]), size):
            if some[-1] < rest:
                continue  # tokens cost something, whatever the noise of a few steps says
            solution = np.linalg.lstsq(scaled[:, some], wanted, rcond=None)[0]
            missed = float(((scaled[:, some] @ solution - wanted) ** 2).sum())
            if (solution >= 0).all() and solution[[c >= rest for c in some]].any() and missed < least * (1 - 1e-9):
                best, least = np.zeros(rows.shape[1]), missed
                best[list(some)] = solution
    return best


def judged_again(run: Ran, most: int = 64, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of the verdict of each of some recorded responses, one after the other. Raises UserError as `sppo audit verify` does."""
    rows = rows_of(run.path, int(run.metrics[-1]["step"]))[:most]
    rollouts = [recorded(row) for row in rows]
    reward = load_reward(run.config.reward.use)
    try:
        reward.judge(rollouts[:1])  # whatever it starts, is started
        seconds = []
        for rollout in rollouts:
            began = clock()
            reward.judge([rollout])
            seconds.append(clock() - began)
        return seconds
    finally:
        reward.close()
