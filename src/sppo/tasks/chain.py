"""`chain`: chained arithmetic modulo 10 with written steps; its difficulty is the number of steps.

    7+5-3*2?   →   7+5=2;2-3=9;9*2=8;A:8

Operations apply from left to right. The embedded task: no download, every step checkable, hard enough that a small
model must learn to compute, easy enough to learn within minutes. Train and held-out problems are disjoint by
construction.

`chain:steps=4-6`, `chain:steps=3,split=held-out,size=100000`; `chain:steps=4-6,confidence=true`: solutions state a
random confidence too (`…;9*2=8;C:37;A:8`), a form to which a reward gives meaning (rewards/confidence.py)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..errors import RecipeError
from ..types import Task
from .base import SPLITS, in_split, question

MODULUS = 10


def build(
    steps: int | str = "4-6", split: str = "train", size: int = 1_000_000, seed: int = 0, confidence: bool = False
) -> Chain:
    """The source for `chain:…`; `steps` is a number or a range `low-high`."""
    low, high = steps_range("chain", steps)
    if split not in SPLITS:
        raise RecipeError(f"chain: split={split} is not one of {', '.join(SPLITS)}")
    return Chain(low, high, split, size, seed, bool(confidence))


def steps_range(task: str, steps: int | str) -> tuple[int, int]:
    """The fewest and the most steps that `steps` means. Raises RecipeError."""
    low, _, high = str(steps).partition("-")
    if not low.isdigit() or (high and not high.isdigit()) or int(low) < 1 or int(high or low) < int(low):
        raise RecipeError(f"{task}: steps={steps} is neither a number of steps nor a range such as 4-6")
    return int(low), int(high or low)


class Chain:
    """A million problems (`size`), each computed from its index."""

    def __init__(self, low: int, high: int, split: str, size: int, seed: int, confidence: bool = False) -> None:
        self.low, self.high, self.split, self.size, self.seed = low, high, split, size, seed
        self.confidence = confidence

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        rng = np.random.Generator(np.random.Philox(key=(self.seed << 40) + index))
        steps = int(rng.integers(self.low, self.high + 1))
        while True:
            text, solution, answer = problem(steps, rng)
            if in_split(text, self.split):
                if self.confidence:
                    work, mark, value = solution.rpartition("A:")
                    solution = f"{work}C:{rng.integers(100):02};{mark}{value}"
                return Task(
                    f"chain/{self.split}/{index}", question(text), {"answer": str(answer)}, solution, float(steps)
                )


def problem(steps: int, rng: np.random.Generator) -> tuple[str, str, int]:
    """A random problem: its question, its worked solution, its answer."""
    value = int(rng.integers(MODULUS))
    text, solution = str(value), ""
    for _ in range(steps):
        operator = "+-*"[rng.integers(3)]
        operand = int(rng.integers(1, MODULUS)) if operator == "*" else int(rng.integers(MODULUS))
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS
        text += f"{operator}{operand}"
        solution += f"{value}{operator}{operand}={result};"
        value = result
    return f"{text}?", f"{solution}A:{value}", value


def check_steps(task: Task, steps: Sequence[str]) -> list[float | None]:
    """1 for each written step that is the problem's next one, starts from the value before it and is right; else 0.

    A step is judged from what was written before it, so one slip costs one step; `A:8` must repeat the last value.

    >>> check_steps(Task("", "7+5-3*2?"), ["7+5=2", "2-3=8", "8*2=6", "A:6"])
    [1.0, 0.0, 1.0, 1.0]
    """
    value, *rest = re.split(r"([-+*])", task.text.strip().rstrip("?"))
    todo = list(zip(rest[::2], rest[1::2], strict=True))
    scores: list[float | None] = []
    for step in steps:
        written = re.fullmatch(r"(\d{1,9})([-+*])(\d{1,9})=(\d{1,9})", step)
        if written is None:
            if re.fullmatch(r"C:\d\d", step):
                scores.append(None)  # a stated confidence is no step
                continue
            answer = re.fullmatch(r"A:\s{0,2}(\d{1,9})", step)
            scores.append(float(answer is not None and not todo and answer[1] == value))
            continue
        before, operator, operand, after = written.groups()
        expected = todo.pop(0) if todo else None
        a, b = int(before), int(operand)
        right = {"+": a + b, "-": a - b, "*": a * b}[operator] % MODULUS
        scores.append(float(before == value and (operator, operand) == expected and int(after) == right))
        value = after
    return scores
