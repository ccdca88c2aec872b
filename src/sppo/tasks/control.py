"""`control:mountain-car`: episodes of a control task (environments/control.py), each from a start of its own; the
reward is `control`."""

from __future__ import annotations

from ..environments.control import KINDS, episode
from ..errors import RecipeError
from ..spec import nearest
from ..types import Task
from .base import SPLITS


def build(name: str | None = None, split: str = "train", size: int = 100_000) -> Starts:
    """The source for `control:NAME`."""
    if name not in KINDS:
        raise RecipeError(f"control: {name!r} is not a control task: {nearest(str(name), list(KINDS))}")
    if split not in SPLITS:
        raise RecipeError(f"control: split={split} is not one of {', '.join(SPLITS)}")
    return Starts(str(name), split, size)


class Starts:
    """Training starts have even numbers, held-out ones odd."""

    def __init__(self, name: str, split: str, size: int) -> None:
        self.name, self.split, self.size = name, split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        start = index if self.split == "all" else 2 * index + (self.split == "held-out")
        return episode(self.name, start)
