"""ALGORITHM §4.1 and §4.5: trees whose forks depend on the prefix give the exact gradient, whatever the gate; forks that depend on what was
drawn do not. Every tree that can be sampled is enumerated."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sppo.objective.tree import nodes, returns

from .tabular import EOS, INDEX, LIMIT, RESPONSES, VOCABULARY, parameters, rewards, scores, true_gradient

ROW = {y: s for s, y in enumerate(RESPONSES)}


def trees(prefix, forks, table, children, rare=None):
    """(probability, leaves) of everything that can grow from a prefix; a leaf is (tokens, forks).

    `children(prefix)` says how many ways go on. With `rare`, a second child is only drawn where the first one's next token is `rare`, which
    is how not to do it.
    """
    if prefix and (prefix[-1] == EOS or len(prefix) == LIMIT):
        yield 1.0, [(prefix, forks)]
        return
    count = children(prefix)
    if count == 1:
        yield from stretches(prefix, forks, table, children, rare)
        return
    t = len(prefix)
    if rare is None:
        ways = [list(stretches(prefix, (*forks, (t, k, count)), table, children, rare)) for k in range(count)]
        for combination in itertools.product(*ways):
            probability = 1.0
            for p, _ in combination:
                probability *= p
            yield probability, [leaf for _, leaves in combination for leaf in leaves]
        return
    for p, leaves in stretches(prefix, forks, table, children, rare):
        if leaves[0][0][t] != rare:
            yield p, leaves
    first = [
        (p, leaves)
        for p, leaves in stretches(prefix, (*forks, (t, 0, 2)), table, children, rare)
        if leaves[0][0][t] == rare
    ]
    second = list(stretches(prefix, (*forks, (t, 1, 2)), table, children, rare))
    for (p, a), (q, b) in itertools.product(first, second):
        yield p * q, [*a, *b]


def stretches(prefix, forks, table, children, rare):
    for token in range(VOCABULARY):
        probability = table[INDEX[prefix]][token]
        for p, leaves in trees((*prefix, token), forks, table, children, rare):
            yield probability * p, leaves


def expected(theta, reward_S, children, etas, rare=None):
    """The exact expectations of the estimator, with the credit that training gives: Q − [(1 − η)·b + η·(mean of siblings)], one for each η."""
    table, b = torch.softmax(theta, -1).tolist(), 0.37
    weight = [[[0.0] * LIMIT for _ in RESPONSES] for _ in etas]  # of each token's score
    mass = 0.0
    for probability, leaves in trees((), (), table, children, rare):
        mass += probability
        reward, keep = [float(reward_S[ROW[y]]) for y, _ in leaves], [True] * len(leaves)
        tree = nodes([f for _, f in leaves], [len(y) for y, _ in leaves], keep)
        for node, (q, others) in zip(tree, returns(tree, reward, keep), strict=True):
            gap, row = 0.0 if others is None else others - b, ROW[leaves[node.leaf][0]]
            for eta, weight_ST in zip(etas, weight, strict=True):
                for t in range(node.start, node.end):
                    weight_ST[row][t] += probability * node.weight * (q - b - eta[node.depth] * gap)
    assert abs(mass - 1) < 1e-10
    return torch.einsum("est,stp->ep", torch.tensor(weight, dtype=theta.dtype), scores(theta))


@pytest.mark.parametrize("branching", [{(): 2}, {(1,): 2, (1, 2): 2}, {(): 2, (1, 2): 2}, {(2, 1): 3}])
@pytest.mark.parametrize("seed", range(2))
def test_forks_that_depend_on_the_prefix_leave_the_gradient_exact(branching, seed):
    theta, reward_S = parameters(seed), rewards(seed)
    rng = random.Random(seed)
    etas = [[0.0] * 4, [1.0] * 4, [rng.random() for _ in range(4)]]
    found = expected(theta, reward_S, lambda prefix: branching.get(prefix, 1), etas)
    assert float((found - true_gradient(theta, reward_S)).abs().max()) < 1e-10


def test_forks_that_depend_on_the_token_drawn_are_biased():
    theta, reward_S = parameters(0), rewards(0)
    found = expected(theta, reward_S, lambda prefix: 2 if prefix == () else 1, [[1.0] * 4], rare=1)
    assert float((found - true_gradient(theta, reward_S)).abs().max()) > 1e-3


def test_an_ungraded_leaf_leaves_the_means():
    #      ┌─ a (ungraded)
    #   ───┤        ┌─ b 1
    #      └────────┴─ c 0
    forks = [((2, 0, 2),), ((2, 1, 2), (4, 0, 2)), ((2, 1, 2), (4, 1, 2))]
    tree = nodes(forks, [5, 6, 7], [False, True, True], first=10)
    assert [(n.leaf, n.start, n.end, n.weight) for n in tree] == [
        (11, 0, 2, 1.0), (10, 2, 5, 0.5), (11, 2, 4, 0.5), (11, 4, 6, 0.25), (12, 4, 7, 0.25)
    ]  # fmt: skip
    reward = [0.0] * 10 + [9.0, 1.0, 0.0]
    keep = [True] * 10 + [False, True, True]
    assert returns(tree, reward, keep) == [(0.5, None), (None, 0.5), (0.5, None), (1.0, 0.0), (0.0, 1.0)]
