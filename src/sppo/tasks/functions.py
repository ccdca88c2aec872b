"""`functions`: small Python functions over a list of integers, with visible and hidden tests; the dial is the number of
steps.

    f(xs): add 3 to each, keep those above 4, return the sum

    def f(xs):
        xs = [x + 3 for x in xs]
        xs = [x for x in xs if x > 4]
        return sum(xs)

Made here, no download. The hidden tests of a problem fail every program that leaves one of its steps out or is off by
one in one of its numbers. Train and held-out problems are disjoint by construction.

`functions:steps=2-4`, `functions:steps=3,split=held-out,visible=2,hidden=6`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..types import Task
from .base import SPLITS, in_split, question

Apply = Callable[[list[int], int], Any]


@dataclass(frozen=True)
class Step:
    """One step of a function: its phrase in the question, its line of the solution, its effect.

    `k` is its number, if it has one.
    """

    says: str
    code: str
    apply: Apply
    numbers: tuple[int, int] | None = None
    k: int = 0


STEPS = (
    Step("add {k} to each", "xs = [x + {k} for x in xs]", lambda xs, k: [x + k for x in xs], (1, 10)),
    Step("multiply each by {k}", "xs = [x * {k} for x in xs]", lambda xs, k: [x * k for x in xs], (2, 6)),
    Step("square each", "xs = [x * x for x in xs]", lambda xs, k: [x * x for x in xs]),
    Step("keep those above {k}", "xs = [x for x in xs if x > {k}]", lambda xs, k: [x for x in xs if x > k], (0, 8)),
    Step("keep those below {k}", "xs = [x for x in xs if x < {k}]", lambda xs, k: [x for x in xs if x < k], (1, 9)),
    Step("keep the even ones", "xs = [x for x in xs if x % 2 == 0]", lambda xs, k: [x for x in xs if x % 2 == 0]),
    Step("keep the odd ones", "xs = [x for x in xs if x % 2 == 1]", lambda xs, k: [x for x in xs if x % 2 == 1]),
    Step("leave out the first {k}", "xs = xs[{k}:]", lambda xs, k: xs[k:], (1, 4)),
    Step("reverse them", "xs = xs[::-1]", lambda xs, k: xs[::-1]),
    Step("sort them", "xs = sorted(xs)", lambda xs, k: sorted(xs)),
)
ENDS = (
    Step("return them", "return xs", lambda xs, k: xs),
    Step("return the sum", "return sum(xs)", lambda xs, k: sum(xs)),
    Step("return how many there are", "return len(xs)", lambda xs, k: len(xs)),
    Step("return the largest, or 0", "return max(xs, default=0)", lambda xs, k: max(xs, default=0)),
)
LONGEST, LARGEST = 8, 12
"""Length and size of the numbers of the lists that tests pass."""


def build(
    steps: int | str = "2-4",
    split: str = "train",
    size: int = 1_000_000,
    seed: int = 0,
    visible: int = 2,
    hidden: int = 6,
) -> Functions:
    """The source for `functions:…`; `steps` is a number or a range `low-high`, `visible` and `hidden` count the tests."""
    low, _, high = str(steps).partition("-")
    if not low.isdigit() or (high and not high.isdigit()) or int(low) < 1 or int(high or low) < int(low):
        raise RecipeError(f"functions: steps={steps} is neither a number of steps nor a range such as 2-4")
    if split not in SPLITS:
        raise RecipeError(f"functions: split={split} is not one of {', '.join(SPLITS)}")
    if visible < 1 or hidden < 4:
        raise RecipeError("functions: at least 1 visible and 4 hidden tests (fewer cannot tell wrong programs apart)")
    return Functions(int(low), int(high or low), split, size, seed, visible, hidden)


class Functions:
    """A million problems (`size`), each computed from its index."""

    def __init__(self, low: int, high: int, split: str, size: int, seed: int, visible: int, hidden: int) -> None:
        self.low, self.high, self.split, self.size, self.seed = low, high, split, size, seed
        self.visible, self.hidden = visible, hidden

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        rng = np.random.Generator(np.random.Philox(key=(self.seed << 40) + index))
        n = int(rng.integers(self.low, self.high + 1))
        while True:
            steps = _draw(n, rng)
            text = f"f(xs): {', '.join(s.says.format(k=s.k) for s in steps)}"
            if not in_split(text, self.split):
                continue
            hidden = [_numbers(rng) for _ in range(self.hidden)]
            if not all(_tells_apart(steps, wrong, hidden) for wrong in _nearly(steps)):
                continue
            columns = {
                "entry_point": "f",
                "tests": [_test(steps, _numbers(rng)) for _ in range(self.visible)],
                "hidden_tests": [_test(steps, xs) for xs in hidden],
            }
            solution = "\n".join(["def f(xs):", *(f"    {s.code.format(k=s.k)}" for s in steps)])
            return Task(f"functions/{self.split}/{index}", question(f"{text}\n"), columns, solution, float(n))


def run(steps: Sequence[Step], xs: list[int]) -> Any:
    """What a function of these steps returns."""
    value: Any = list(xs)
    for step in steps:
        value = step.apply(value, step.k)
    return value


def _draw(n: int, rng: np.random.Generator) -> list[Step]:
    steps = [STEPS[rng.integers(len(STEPS))] for _ in range(n)] + [ENDS[rng.integers(len(ENDS))]]
    return [replace(s, k=int(rng.integers(*s.numbers))) if s.numbers else s for s in steps]


def _nearly(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Functions that are wrong in one place: a step left out, or a number off by one."""
    for i, step in enumerate(steps[:-1]):
        yield [*steps[:i], *steps[i + 1 :]]
        if step.numbers:
            for k in (step.k - 1, step.k + 1):
                yield [*steps[:i], replace(step, k=k), *steps[i + 1 :]]


def _tells_apart(steps: Sequence[Step], wrong: Sequence[Step], inputs: Sequence[list[int]]) -> bool:
    return any(run(steps, xs) != run(wrong, xs) for xs in inputs)


def _numbers(rng: np.random.Generator) -> list[int]:
    return [int(x) for x in rng.integers(-LARGEST, LARGEST + 1, size=rng.integers(1, LONGEST + 1))]


def _test(steps: Sequence[Step], xs: list[int]) -> dict[str, Any]:
    return {"args": [xs], "expected": run(steps, xs)}
