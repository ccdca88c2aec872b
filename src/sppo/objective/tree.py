"""Trees of responses: what each shared stretch of tokens is worth, and how much it counts. No tensors of a model, only numbers.

A node is a stretch of tokens between two forks. With K children at a fork that depends on the prefix alone,

    weight(node)  =  Π 1/K over the forks above it
    Q(node)       =  mean over its children of Q(child); a leaf's reward at the end
    ∇J            =  E Σ_nodes weight · Σ_tokens ∇log π(token) · (Q(node) − b)        for any b that does not see the node's own tokens

and the mean Q of a node's siblings is such a b: they are independent of it, given their common prefix. Each stretch counts once, however many
leaves share it. (The tree estimator of ALGORITHM.md §3; tests/exact enumerates it, and shows the bias of branching on what was drawn.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..types import Fork


@dataclass(frozen=True, slots=True)
class Node:
    """One stretch of tokens [start, end) of the leaves below it; `leaf` stands for all of them where the tokens are trained on.

    `above` is the node before its fork, by number, or −1; `depth` counts the forks above it.
    """

    leaf: int
    start: int
    end: int
    weight: float
    depth: int
    above: int


def nodes(
    forks: Sequence[tuple[Fork, ...]], lengths: Sequence[int], keep: Sequence[bool], first: int = 0
) -> list[Node]:
    """The nodes of one prompt's tree, each before those below it.

    Args:
        forks: of each leaf, in order; lengths: of each leaf, in tokens.
        keep: whether a leaf was graded; one that was stands for its node where there is one.
        first: the number of the first leaf.
    """
    out: list[Node] = []

    def visit(leaves: list[int], start: int, weight: float, depth: int, above: int) -> None:
        forking = len(forks[leaves[0]]) > depth
        end, _, children = forks[leaves[0]][depth] if forking else (lengths[leaves[0]], 0, 0)
        stands = next((i for i in leaves if keep[i]), leaves[0])
        out.append(Node(first + stands, start, end, weight, depth, above))
        if not forking:
            if len(leaves) > 1:
                raise ValueError("two leaves of a tree took the same turns")
            return
        mine = len(out) - 1
        for k in range(children):
            same = [i for i in leaves if forks[i][depth][1] == k]
            if not same:
                raise ValueError("a fork lacks a child")
            visit(same, end, weight / children, depth + 1, mine)

    visit(list(range(len(forks))), 0, 1.0, 0, -1)
    return out


def returns(
    tree: Sequence[Node], reward: Sequence[float], keep: Sequence[bool]
) -> list[tuple[float | None, float | None]]:
    """(Q of the node, mean Q of its siblings) for each; None where no leaf below, or below a sibling, was graded.

    `reward` and `keep` go by the numbers of the leaves. What was not graded is left out of every mean.
    """
    children: list[list[int]] = [[] for _ in tree]
    q: list[float | None] = [None] * len(tree)
    for n in range(len(tree) - 1, -1, -1):  # those below come later
        node = tree[n]
        if node.above >= 0:
            children[node.above].append(n)
        known = [x for c in children[n] if (x := q[c]) is not None]
        if children[n]:
            q[n] = sum(known) / len(known) if known else None
        elif keep[node.leaf]:
            q[n] = float(reward[node.leaf])
    out: list[tuple[float | None, float | None]] = []
    for n, node in enumerate(tree):
        others = [x for c in children[node.above] if c != n and (x := q[c]) is not None] if node.above >= 0 else []
        out.append((q[n], sum(others) / len(others) if others else None))
    return out
