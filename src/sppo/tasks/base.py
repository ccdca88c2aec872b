"""The socket of a task source, and the split into training and held-out problems. `loading.py` makes one from
`task.train`.

A source is a finite sequence, possibly long and computed on demand. `source[i]` is always the same task, so a position
in the data is one number, and a resumed run sees the tasks that the interrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import RecipeError
from ..types import Prompt, Task

HELD_OUT = 0.1
"""The share of all problems that is held out."""
SPLITS = ("train", "held-out", "all")


class TaskSource(Protocol):
    """A fixed sequence of tasks."""

    def __len__(self) -> int:
        """How many tasks there are."""

    def __getitem__(self, index: int) -> Task:
        """Task `index`, always the same one."""


def in_split(text: str, split: str) -> bool:
    """Whether a problem belongs to a split, by the hash of its text: disjoint by construction, on every machine."""
    if split not in SPLITS:
        raise RecipeError(f"split={split} is not one of {', '.join(SPLITS)}")
    if split == "all":
        return True
    share = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return (share < HELD_OUT) == (split == "held-out")


def with_instruction(source: TaskSource, instruction: str) -> TaskSource:
    """The source with an instruction after every question, or as it is for an empty one."""
    return _Instructed(source, instruction) if instruction else source


def rows_in(source: TaskSource) -> TaskSource:
    """The source without the instruction that was added to it."""
    return source.source if isinstance(source, _Instructed) else source


class _Instructed:
    """A source with an instruction after every question."""

    def __init__(self, source: TaskSource, instruction: str) -> None:
        self.source, self.instruction = source, instruction

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        task = self.source[index]
        return replace(task, prompt=self._added(task.prompt))

    def _added(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return f"{prompt}\n{self.instruction}"
        asked = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=len(prompt) - 1)
        said = {**prompt[asked], "content": f"{prompt[asked]['content']}\n{self.instruction}"}
        return [*prompt[:asked], said, *prompt[asked + 1 :]]


class ListSource:
    """Tasks already in memory, as a source."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]


def question(text: str) -> Prompt:
    """A question as chat messages: put through a chat template where there is one, plain text elsewhere."""
    return [{"role": "user", "content": text}]
