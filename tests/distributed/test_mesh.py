"""What ranks tell each other: sums in the order of ranks, the same bits everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.distributed.mesh import Mesh
from sppo.distributed.ranks import SMALL, RankMesh, join
from sppo.errors import RecipeError

from .group import on_ranks


def of(rank: int, count: int) -> torch.Tensor:
    """Numbers of very different sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(-8, 8, (count,), generator=generator)


def told(mesh):
    rank = mesh.rank
    large = [of(rank, SMALL + 5), of(rank, 7).view(7, 1), torch.arange(3) + rank]
    mesh.add_up(large)
    matrix, mine = torch.full((5, 2), -1.0), torch.arange(5)[rank::2] if rank < 2 else torch.zeros(0, dtype=torch.long)
    matrix[mine] = float(rank)
    mesh.fill(matrix, mine, torch.tensor([0, 1, 2, 4]))
    return {
        "small": mesh.sum(of(rank, 11)), "large": large, "count": mesh.sum(rank + 1), "number": mesh.sum(0.5 + rank),
        "max": mesh.max(float(rank)), "nan": mesh.max(math.nan if rank == 1 else 1.0), "matrix": matrix,
        "joined": mesh.joined([torch.tensor([float(rank)] * rank)] if rank else []),
        "parts": mesh.dealt([0, 1, 2, 3], lambda rows: [[row] for row in rows], list),
    }  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
def test_ranks_add_up_in_their_order_and_agree_to_the_bit(shards):
    found = on_ranks(3, told, shards=shards)
    for rank in found:
        assert torch.equal(rank["small"], (of(0, 11) + of(1, 11)) + of(2, 11))
        a, b, whole = rank["large"]
        assert torch.equal(a, (of(0, SMALL + 5) + of(1, SMALL + 5)) + of(2, SMALL + 5))
        assert torch.equal(b[:, 0], (of(0, 7) + of(1, 7)) + of(2, 7))
        assert whole.tolist() == [3, 6, 9]
        assert (rank["count"], rank["number"], rank["max"]) == (6, 4.5, 2.0)
        assert math.isnan(rank["nan"])
        assert rank["joined"].tolist() == [1.0, 2.0, 2.0]
        assert rank["matrix"][:, 0].tolist()[:3] == [0.0, 1.0, 0.0]
        assert rank["matrix"][4, 0] == 0.0
    empty = [] if shards == 1 else [[]]
    assert [rank["parts"] for rank in found] == [[[0], [3]], [[1], *empty], [[2], *empty]]


def test_one_process_gets_back_what_it_gives():
    mesh, x = join(0, 1, "env://", 1.0), torch.ones(2)
    assert type(mesh) is Mesh
    assert mesh.sum(x) is x
    assert mesh.max(x) is x
    assert mesh.dealt([1, 2], lambda rows: [rows], list) == [[1, 2]]
    assert len(mesh.joined([])) == 0


def test_shards_must_divide_the_learners():
    with pytest.raises(RecipeError, match=r"cluster\.shards = 3 must divide cluster\.learners = 4"):
        join(0, 4, "env://", 1.0, shards=3)


def test_weights_are_divided_from_a_billion_parameters_on():
    settled = []
    for wanted, parameters in ((0, 10**6), (0, 10**9), (2, 10**6), (1, 10**10)):
        mesh = RankMesh(0, 4, torch.device("cpu"), wanted)
        mesh.settle(parameters)
        settled.append(mesh.shards)
    assert settled == [1, 4, 2, 1]


def waits(mesh):
    if mesh.rank == 0:
        mesh.sum(1.0)


def test_a_rank_that_waits_in_vain_fails_at_its_timeout():
    with pytest.raises(AssertionError, match=r"rank 0(.|\n)*(Timed out|timeout|closed|reset)"):
        on_ranks(2, waits, timeout=3)
