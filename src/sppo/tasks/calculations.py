"""`calculations`: chained arithmetic with numbers too large to do by heart, from left to right; worked solutions call the tool `calculate`.

    731*48-95?   →   [calculate("731*48")]   35088   [calculate("35088-95")]   34993   A:34993

`calculations:steps=1-3`, `calculations:steps=2,digits=4,split=held-out`. Train and held-out problems are disjoint by construction.
"""

from __future__ import annotations

import numpy as np

from ..environments.base import POSITIONAL
from ..errors import RecipeError
from ..types import Message, Task
from .base import SPLITS, in_split, question
from .chain import steps_range


def build(
    steps: int | str = "1-3", digits: int = 3, split: str = "train", size: int = 1_000_000, seed: int = 0
) -> Calculations:
    """The source for `calculations:…`; `steps` is a number or a range `low-high`, the first number has up to `digits` digits."""
    if split not in SPLITS:
        raise RecipeError(f"calculations: split={split} is not one of {', '.join(SPLITS)}")
    if not 1 <= digits <= 9:
        raise RecipeError(f"calculations: digits={digits} must be from 1 to 9")
    return Calculations(*steps_range("calculations", steps), digits, split, size, seed)


class Calculations:
    """A million problems (`size`), each computed from its index."""

    def __init__(self, low: int, high: int, digits: int, split: str, size: int, seed: int) -> None:
        self.low, self.high, self.digits, self.split, self.size, self.seed = low, high, digits, split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        rng = np.random.Generator(np.random.Philox(key=(self.seed << 40) + index))
        steps = int(rng.integers(self.low, self.high + 1))
        while True:
            text, solution, answer = problem(steps, self.digits, rng)
            if in_split(text, self.split):
                name = f"calculations/{self.split}/{index}"
                return Task(name, question(text), {"answer": str(answer)}, solution, float(steps))


def problem(steps: int, digits: int, rng: np.random.Generator) -> tuple[str, list[Message], int]:
    """A random problem: its question, a conversation that solves it, its answer. Later numbers are a digit shorter than the first."""
    value = int(rng.integers(1, 10**digits))
    text, solution = str(value), list[Message]()
    for _ in range(steps):
        operator = "+-*"[rng.integers(3)]
        operand = int(rng.integers(2, 10 ** max(1, digits - 1)))
        expression = f"{value}{operator}{operand}"
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        text += f"{operator}{operand}"
        function = {"name": "calculate", "arguments": {POSITIONAL: [expression]}}
        solution += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "name": "calculate", "content": str(value)},
        ]
    return f"{text}?", [*solution, {"role": "assistant", "content": f"A:{value}"}], value
