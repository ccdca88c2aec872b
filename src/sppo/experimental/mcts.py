"""Monte Carlo tree search over the segments of a response, for problems that sampling alone does not solve.

A node is a prefix that ends with a segment. Each simulation walks down by PUCT (arXiv 1911.08265 eq. 2), lets the policy write on from
where it stops (the next segment, where somebody can tell what a prefix is worth; else to the end), has that judged, and hangs it into the
tree:

    score(child)  =  Q + explore · P · √visits / (1 + visits of the child)
    Q             =  (v + Σ outcomes) / (1 + visits),  v the prefix's value, or where nobody knows one the parent's Q; a response that has
                     not ended has the value of what is written as its outcome
    P             ∝  how often the policy wrote this segment here, times v: whether a solution goes through this child

The policy writes on from a node while it has done so fewer than width · √visits times (progressive widening), or while none of its children is
worth anything. Children are its own samples, so their counts are its prior. What search finds is off-policy: it may feed a supervised loss,
never the policy gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..rollout.sampler import sample_seed

AT_ONCE = 4
"""Responses from each node that a walk ends in: for the sake of the batch."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """What was written so far: where its segments end (the last one at its end), what each prefix up to there is worth if anybody knows, the
    outcome in [0, 1], whether it is a solution, and whether it can go on."""

    ids: Ids
    ends: Sequence[int]
    values: Sequence[float | None]
    outcome: float
    solved: bool
    over: bool = True


@dataclass(slots=True)
class Found:
    """What came of one problem."""

    solution: Ids | None = None
    simulations: int = 0
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """A prefix of responses."""

    ids: Ids
    value: float | None = None
    over: bool = False
    drawn: int = 0
    visits: int = 0
    total: float = 0.0
    children: dict[Ids, Node] = field(default_factory=dict)

    def q(self, otherwise: float) -> float:
        """The mean outcome, with the prefix's value (or `otherwise`) counted as one more visit."""
        return ((otherwise if self.value is None else self.value) + self.total) / (1 + self.visits)

    @property
    def hope(self) -> float:
        """P, before it is made to sum to 1."""
        return self.drawn * (1.0 if self.value is None else self.value)


def walk(root: Node, explore: float, width: float) -> list[Node]:
    """From the root to the node from which the policy is to write on."""
    path, otherwise = [root], 0.0
    while True:
        node = path[-1]
        hopeful = [(c, c.hope) for c in node.children.values() if not c.over and c.hope > 0]
        if not hopeful or sum(c.drawn for c in node.children.values()) < width * math.sqrt(node.visits):
            return path
        otherwise = node.q(otherwise)
        scale = explore * math.sqrt(node.visits) / sum(hope for _, hope in hopeful)
        scores = [c.q(otherwise) + scale * hope / (1 + c.visits) for c, hope in hopeful]
        path.append(hopeful[scores.index(max(scores))][0])


def hang(path: Sequence[Node], judged: Judged) -> None:
    """Hang a response that was written on from the path's last node into the tree, and note its outcome all the way up."""
    nodes = list(path)
    for end, value in zip(judged.ends, judged.values, strict=True):
        here = nodes[-1]
        if end <= len(here.ids):
            continue
        segment = judged.ids[len(here.ids) : end]
        child = here.children.setdefault(segment, Node(judged.ids[:end], value, judged.over and end == len(judged.ids)))
        child.drawn += 1
        nodes.append(child)
    for node in nodes:
        node.visits += 1
        node.total += judged.outcome


def search(
    problems: int,
    write_on: Callable[[Sequence[tuple[int, Ids]], Sequence[int]], Sequence[Ids]],
    judge: Callable[[Sequence[tuple[int, Ids]]], Sequence[Judged | None]],
    *,
    budget: int,
    longest: int,
    seed: int,
    explore: float = 1.0,
    width: float = 0.5,
) -> list[Found]:
    """Search each problem until it is solved or its budget is spent; all of them side by side.

    Args:
        write_on: from (problem, prefix) and a seed each to the ids that follow, at most longest − len(prefix) of them, at least one.
        judge: what was written so far; None for what cannot be graded, which is forgotten.
        budget: tokens written for a problem, at most.
        longest: tokens of a response, at most.
    """
    roots, found = [Node(()) for _ in range(problems)], [Found() for _ in range(problems)]
    active, turn = list(range(problems)), 0
    while active:
        asked: list[tuple[int, list[Node]]] = []
        for i in active:
            path = walk(roots[i], explore, width)
            room = longest - len(path[-1].ids)
            copies = min(AT_ONCE, (budget - found[i].tokens) // room)
            asked += [(i, path)] * copies
        active = sorted({i for i, _ in asked})
        if not asked:
            break
        seeds = [sample_seed(seed, turn, n) for n in range(len(asked))]
        written = write_on([(i, path[-1].ids) for i, path in asked], seeds)
        whole = [(i, path[-1].ids + ids) for (i, path), ids in zip(asked, written, strict=True)]
        for (i, path), ids, judged in zip(asked, written, judge(whole), strict=True):
            found[i].tokens += len(ids)
            found[i].simulations += 1
            if judged is None:
                continue
            hang(path, judged)
            if judged.solved and found[i].solution is None:
                found[i].solution = judged.ids
        active = [i for i in active if found[i].solution is None]
        turn += 1
    return found
