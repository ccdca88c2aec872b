"""The processes that train one model together, and the sum over what each of them has computed.

Every rank gets the whole batch and takes the same decisions; ranks differ only in which micro-batches they pass through the model. What
is counted on the batch (denominators, group statistics, plans) is therefore the same on all ranks and needs no sum. What is added up over
micro-batches (losses, KL, entropy, gaps) is a part on each rank: `mesh.sum` makes it the whole, and any decision comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, int, Tensor)


class Mesh:
    """One process: every method returns what it is given, so no bit changes. `RankMesh` (ranks.py) is that of several.

    >>> Mesh().sum(3)
    3
    """

    rank: int = 0
    size: int = 1
    shards: int = 1
    """Ranks that hold one copy of the weights between them."""

    def sum(self, x: T) -> T:
        """The sum of `x` over all ranks, of the type and shape of `x`; every rank must call it. With one process: `x` itself."""
        return x

    def max(self, x: T) -> T:
        """The largest `x` of all ranks, element by element; NaN where any is NaN."""
        return x

    def dealt(self, ordered: Any, cut: Callable[[Any], list[Any]], empty: Callable[[], Any]) -> list[Any]:
        """This rank's micro-batches of rows in order of length: all that `cut` makes of them. Of several ranks r gets every size-th row from
        r on; where weights are divided, ranks with fewer micro-batches than others get `empty` ones, since all must make the same passes."""
        return cut(ordered)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """All elements of all ranks' tensors in one, in the order of ranks, on the CPU. [n] each → [N]."""
        return torch.cat(list(parts)) if parts else torch.zeros(0)

    def fill(self, x: Tensor, mine: Tensor, rows: Tensor) -> None:
        """Give every rank the `rows` of a matrix on the CPU, in place; each rank has made those of `mine`, and each row is one rank's."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, which has the same shape on all ranks, by its sum over them."""
