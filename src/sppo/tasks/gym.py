"""`gym:<family>`: every procedural family of reasoning-gym (the `gym` extra), with the family's own options.

    gym:chain_sum,min_terms=2,max_terms=4,min_digits=1,max_digits=3

Its own scorer is the reward `gym`. Families with an obvious worked solution give one for supervised training (here
`chain_sum`, one partial sum per line); the others offer the bare answer.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import RecipeError
from ..spec import nearest
from ..types import Task
from .base import in_split, question


def build(family: str | None = None, split: str = "train", size: int = 100_000, seed: int = 0, **options: Any) -> Gym:
    """The source for `gym:<family>,…`; unknown families and options are named with their nearest neighbour."""
    if not family:
        raise RecipeError(
            "gym needs a family: gym:chain_sum (python -c 'import reasoning_gym.factory as f; print(*f.DATASETS)' lists them)"
        )
    return Gym(str(family), split, size, seed, options)


def make_dataset(family: str, seed: int, size: int, options: dict[str, Any]) -> Any:
    """The reasoning-gym dataset. Raises RecipeError for whatever the library raises."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise RecipeError("gym tasks need the gym extra: pip install 'sppo[gym]'") from None
    if family not in DATASETS:
        raise RecipeError(f"reasoning-gym has no family {family!r}: {nearest(family, list(DATASETS))}")
    fields = list(DATASETS[family][1].__dataclass_fields__)
    for key in options:
        if key not in fields:
            raise RecipeError(f"gym:{family} has no option {key!r}: {nearest(key, fields)}")
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=size, **options)
    except Exception as error:  # the family's own validation is made of assertions
        raise RecipeError(f"gym:{family} refuses these options: {type(error).__name__}: {error}") from error


class Gym:
    """Problems `index`, `index + size`, … are tried until one falls into the split: disjoint by the hash of the
    question."""

    def __init__(self, family: str, split: str, size: int, seed: int, options: dict[str, Any]) -> None:
        in_split("", split)
        self.family, self.split, self.size, self.seed, self.options = family, split, size, seed, options
        self.tries = 200
        self.dataset = make_dataset(family, seed, size * self.tries, options)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < self.size:
            raise IndexError(index)
        for attempt in range(self.tries):
            at = index + attempt * self.size
            entry = self.dataset[at]
            if in_split(entry["question"], self.split):
                break
        else:
            raise RecipeError(f"gym:{self.family} has too few different problems for the split {self.split}")
        columns = {
            "answer": entry["answer"],
            "gym": {
                "family": self.family,
                "seed": self.seed,
                "size": len(self.dataset),
                "options": self.options,
                "index": at,
            },
        }
        solution = worked_solution(self.family, entry)
        return Task(f"gym:{self.family}/{self.split}/{index}", question(entry["question"]), columns, solution)


def worked_solution(family: str, entry: dict[str, Any]) -> str | None:
    """A response that shows its work and ends with `Answer: …`."""
    if entry["answer"] is None:
        return None
    lines = []
    asked = entry["question"].rstrip()
    expression = asked[len(asked.rstrip("0123456789 +-=")) :].strip(" +-=") if asked.endswith("=") else ""
    if family == "chain_sum" and expression:
        first, *rest = re.findall(r"([+-]?)\s{0,3}(\d+)", expression)
        value = int(first[1])
        for sign, term in rest:
            result = value + int(term) if sign == "+" else value - int(term)
            lines.append(f"{value} {sign} {term} = {result}")
            value = result
    return "\n".join([*lines, f"Answer: {entry['answer']}"])
