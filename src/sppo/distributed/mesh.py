"""The processes that train one model together, and the sum over what each of them has computed.

Every rank gets the whole batch and takes the same decisions; ranks differ only in which micro-batches they pass through the model. What
is counted on the batch (denominators, group statistics, plans) is therefore the same on all ranks and needs no sum. What is added up over
micro-batches (losses, KL, entropy, gaps) is a part on each rank: `mesh.sum` makes it the whole, and any decision comes after it.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T", float, int, Tensor)


class Mesh:
    """One process, which is all there is today: `sum` returns its argument, so no bit changes.

    A mesh of several ranks will set `rank` and `size` and all-reduce in `sum`, in an order that does not depend on timing.

    >>> Mesh().sum(3)
    3
    """

    rank: int = 0
    size: int = 1

    def sum(self, x: T) -> T:
        """The sum of `x` over all ranks, of the type and shape of `x`; every rank must call it. With one process: `x` itself."""
        return x
