"""What is known of a recipe on a machine, and the seconds that each part of a step takes with it on a layout of a cluster."""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from sppo.errors import DataError, UserError
from sppo.files import read_json, readable

Histogram = list[list[float]]
"""Pairs of a value and its weight."""


@dataclass(frozen=True)
class Measured:
    """What is known of a recipe on a machine, in seconds unless said; `cluster_sim.py --calibrate` writes one."""

    responses: int
    """Per step."""
    lengths: Histogram | dict[str, float]
    """Tokens of a response: values with weights, or {"lognormal": sigma, "mean": tokens, "limit": tokens}, cut at the limit."""
    decode: list[list[float]]
    """Pairs of live sequences, rising, and the seconds of one pass that gives each of them a token; linear in between and beyond."""
    train: float
    """Per token of prompt and response, by one rank."""
    prompt: float = 0.0
    """Tokens of a prompt, mean."""
    slots: int = 1 << 20
    """Sequences that a worker decodes at once (`rollout.batch`)."""
    prefill: float = 0.0
    """Per token of a prompt."""
    call: float = 0.0
    """Per chunk: to send it, pack weights for it, and get it back."""
    verdicts: Histogram = field(default_factory=lambda: [[0.0, 1.0]])
    """Seconds of one response's verdict, with weights."""
    minibatches: int = 1
    """Optimiser updates per step."""
    minibatch: float = 0.0
    """Per optimiser update, however many ranks."""
    optimiser: float = 0.0
    """Of one optimiser step on all weights; shards divide it."""
    micro_tokens: float = 16384.0
    """Tokens of a micro-batch."""
    gathered: float = 0.0
    """Bytes of the weights that shards put together for a pass."""
    reduced: float = 0.0
    """Bytes of the gradients that ranks add up."""
    bandwidth: float = math.inf
    """Bytes per second between ranks of a node, by which a rank gets or gives."""
    bandwidth_between: float = math.inf
    """… between nodes."""
    node: int = 8
    """Ranks per node."""
    overlap: float = 0.0
    """The share of passes behind which exchanges between ranks can hide."""
    transfer: float = 0.0
    """Of the weights to the workers, and the proof that they hold them."""
    transfer_each: float = 0.0
    """More of it for every worker."""
    driver: float = 0.0
    """Per step in the driver alone: monitors, recording."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: none."""
    evaluated: int = 0
    """Responses of an evaluation."""
    cores: float | None = None
    """Of the one machine that all parts share; None: each has a device of its own."""
    threads: int = 1
    """On it: of one worker, or of one rank; several divide them."""
    scaling: float = 1.0
    """Twice the threads are 2 ** scaling times as fast."""

    @classmethod
    def load(cls, path: Path) -> Measured:
        """From a JSON file. Raises DataError."""
        with readable(f"{path} is no calibration"):
            return cls.of(read_json(path))

    @classmethod
    def of(cls, found: dict[str, Any]) -> Measured:
        """From an object; what it says about where it comes from is left out. Raises DataError."""
        known = {f.name for f in fields(cls)}
        if missing := {"responses", "lengths", "decode", "train"} - found.keys():
            raise DataError(f"a calibration needs {', '.join(sorted(missing))}")
        if unknown := found.keys() - known - {"source", "fit"}:
            raise DataError(f"a calibration has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        return cls(**{key: value for key, value in found.items() if key in known})

    def __post_init__(self) -> None:
        live = [pair[0] for pair in self.decode]
        if not live or live != sorted(set(live)):
            raise DataError(
                "a calibration's `decode` is pairs of live sequences, rising, and seconds: [[1, 0.01], [64, 0.02]]"
            )
        if self.responses < 1 or self.minibatches < 1 or self.slots < 1:
            raise DataError("a calibration's responses, minibatches and slots are 1 or more")
        if not isinstance(self.lengths, dict) and not self.lengths:
            raise DataError("a calibration's `lengths` hold no response")

    def as_json(self) -> dict[str, Any]:
        """Without what is infinite or absent."""
        return {k: v for k, v in asdict(self).items() if v is not None and v != math.inf}

    def pace(self, actors: int) -> tuple[float, float]:
        """Threads of each of so many workers, or ranks; and how many times longer each takes with them than with all of `threads`."""
        if self.cores is None:
            return 1.0, 1.0
        each = max(1, self.threads // actors)
        return float(each), (self.threads / each) ** self.scaling

    def pass_seconds(self, live: np.ndarray) -> np.ndarray:
        """Of one decoding pass, by how many sequences are live."""
        at, seconds = np.array(self.decode, dtype=float).T
        found = np.interp(live, at, seconds)
        if len(at) > 1:
            slope = (seconds[-1] - seconds[-2]) / (at[-1] - at[-2])
            found += np.maximum(0.0, live - at[-1]) * slope
        return found

    def chunk_seconds(self, lengths: np.ndarray) -> float:
        """Of one chunk on one worker: the call, the prompts, and the passes until its last response ends."""
        passes, live = live_profile(lengths, self.slots)
        return float(self.call + self.prefill * self.prompt * len(lengths) + (passes * self.pass_seconds(live)).sum())

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Lengths of responses."""
        if isinstance(law := self.lengths, dict):
            sigma = law["lognormal"]
            drawn = np.exp(random.normal(math.log(law["mean"]) - sigma**2 / 2, sigma, count))
            return np.clip(np.ceil(drawn), 1, law.get("limit", math.inf))
        return drawn_from(law, count, random)


def drawn_from(histogram: Histogram, count: int, random: np.random.Generator) -> np.ndarray:
    """Values of a histogram, each as often as its weight says."""
    values, weights = np.array(histogram, dtype=float).T
    return random.choice(values, count, p=weights / weights.sum())


def live_profile(lengths: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """How many passes were made with how many sequences live; a response takes a slot as soon as one is free."""
    if len(lengths) <= slots:
        ends = np.sort(lengths)
        return np.diff(ends, prepend=0.0), np.arange(len(ends), 0, -1.0)
    free = [0.0] * slots
    events = []
    for length in lengths.tolist():
        begins = heapq.heapreplace(free, free[0] + length)
        events += [(begins, 1.0), (begins + length, -1.0)]
    time, change = np.array(sorted(events)).T
    return np.diff(time), change.cumsum()[:-1]


@dataclass(frozen=True)
class Layout:
    """How a cluster is divided. The names are those of the recipe's [cluster]."""

    learners: int = 1
    rollouts: int = 1
    lag: int = 0
    chunk: int = 0
    """0: a step's responses divided by the workers."""
    shards: int = 0
    """0: all learners hold one copy between them."""
    gather: str = "update"
    verifiers: int = 0
    """0: the driver judges."""
    sync: str = "together"
    """Or `each`, which is not built: a worker takes new weights as soon as it is free, and nobody waits for the last one."""

    def __post_init__(self) -> None:
        if self.learners < 1 or self.rollouts < 1 or min(self.lag, self.chunk, self.shards, self.verifiers) < 0:
            raise UserError(f"no such layout: {self}: learners and rollouts are 1 or more, nothing is below 0")
        if self.learners % self.held_by:
            raise UserError(f"shards = {self.shards} does not divide learners = {self.learners}")
        if self.gather not in ("update", "layer") or self.sync not in ("together", "each"):
            raise UserError("gather is 'update' or 'layer', and sync 'together' or 'each'")

    @property
    def held_by(self) -> int:
        """Ranks that hold one copy of the weights between them."""
        return self.shards or self.learners


def chunks(m: Measured, layout: Layout, lengths: np.ndarray) -> list[float]:
    """Seconds of each chunk of a step."""
    size = layout.chunk or math.ceil(m.responses / layout.rollouts)
    whole = len(lengths) // size if size <= m.slots else 0  # these are computed all at once
    ends = np.sort(lengths[: whole * size].reshape(whole, size), 1)
    decoding = np.diff(ends, axis=1, prepend=0.0) @ m.pass_seconds(np.arange(size, 0, -1.0))
    found = (m.call + m.prefill * m.prompt * size + decoding).tolist()
    found += [m.chunk_seconds(lengths[i : i + size]) for i in range(whole * size, len(lengths), size)]
    slower = m.pace(layout.rollouts)[1]
    return [seconds * slower for seconds in found]


def verdict_works(m: Measured, layout: Layout, count: int, random: np.random.Generator) -> list[float]:
    """Seconds that each verifier works; the next response goes to the one that is free first."""
    seconds = drawn_from(m.verdicts, count, random)
    if layout.verifiers <= 1:
        return [float(seconds.sum())]
    works = [0.0] * min(layout.verifiers, count)
    for x in seconds.tolist():
        heapq.heapreplace(works, works[0] + x)
    return works


def exchange_seconds(m: Measured, layout: Layout, micro_batches: int) -> float:
    """Of one minibatch's exchanges between ranks: shards put the weights together and add up gradients, then copies add up theirs."""
    n, shards = layout.learners, layout.held_by
    copies, passes = n // shards, 1 if layout.gather == "update" else micro_batches
    within = m.bandwidth if shards <= m.node else m.bandwidth_between
    between = m.bandwidth if n <= m.node else m.bandwidth_between
    gathers = passes * (1 if layout.gather == "update" else 2)  # layer by layer: forward and backward
    sharded = (shards - 1) / shards * (gathers * m.gathered + passes * m.reduced) / within
    return sharded + 2 * (copies - 1) / copies * m.reduced / shards / between


def update(m: Measured, layout: Layout, tokens: np.ndarray, random: np.random.Generator) -> list[list[float]]:
    """Seconds that each rank works, for each minibatch; `tokens` are of each row, its prompt included."""
    found, slower = [], m.pace(layout.learners)[1]
    for rows in np.array_split(random.permutation(tokens), m.minibatches):
        if not len(rows):
            continue
        padded = np.zeros(-(-len(rows) // layout.learners) * layout.learners)
        padded[: len(rows)] = np.sort(rows)
        rank_tokens = padded.reshape(-1, layout.learners).sum(0)
        most = float(rank_tokens.max())
        exchange = exchange_seconds(m, layout, max(1, math.ceil(most / m.micro_tokens)))
        rest = slower * (m.minibatch + m.optimiser / layout.held_by)
        rest += max(0.0, exchange - m.overlap * slower * m.train * most)
        found.append((slower * m.train * rank_tokens + rest).tolist())
    return found
