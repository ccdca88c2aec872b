"""Where the action tokens of a rectangle of ids lie: those that the policy wrote, in one turn or several."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Actions(NamedTuple):
    """The N action tokens of B rows in order, and their places in a compact rectangle [B, T], T the most of a row."""

    row_N: Tensor
    position_N: Tensor  # in the row of ids; the state at the position before it predicts the token
    t_N: Tensor  # in the compact row
    mask_BT: Tensor
    before_B: Tensor  # tokens to compute: all before a row's last action, one where a row has none

    @classmethod
    def of(cls, action_BL: Tensor) -> Actions:
        """The actions of a bool mask. Raises ValueError for an action at a row's beginning, which no state precedes."""
        if action_BL.numel() and bool(action_BL[:, 0].any()):
            raise ValueError("an action token is the first of its row: nothing precedes it")
        row_N, position_N = action_BL.nonzero(as_tuple=True)
        count_B = action_BL.sum(1)
        width = int(count_B.max()) if len(count_B) else 0
        mask_BT = torch.arange(width, device=action_BL.device) < count_B[:, None]
        column_L = torch.arange(action_BL.size(1), device=action_BL.device)
        last_B = (column_L * action_BL).amax(1) if action_BL.numel() else count_B
        return cls(row_N, position_N, mask_BT.nonzero(as_tuple=True)[1], mask_BT, last_B.clamp(min=1))

    def to(self, device: torch.device) -> Actions:
        """The same on a device."""
        return Actions(*(x.to(device) for x in self))

    def spread(self, x_N: Tensor) -> Tensor:
        """[B, T] with a value for each action, and 0 elsewhere."""
        return x_N.new_zeros(self.mask_BT.shape).index_put((self.row_N, self.t_N), x_N)
