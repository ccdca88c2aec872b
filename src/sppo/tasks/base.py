"""The task source's socket, the train/held-out split, and how `task.train` becomes a source.

A source is a finite sequence (possibly a very long one that is computed on demand): `source[i]` is the same task for ever,
so a position in the data is one number, and a resumed run sees what the interrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..errors import RecipeError
from ..spec import call, is_import, parse_spec, resolve
from ..types import Prompt, Task

GIVEN = "given in Python"
"""What a recipe says in place of an object that a Python user passed: it cannot be loaded by name."""
HELD_OUT = 0.1
"""The share of all problems that is held out."""
SPLITS = ("train", "held-out", "all")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")


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


def is_records(spec: str) -> bool:
    """True for a spec that reads rows (a file or a hub dataset), False for one that makes problems."""
    return spec.startswith(("hub:", "records:")) or Path(spec).suffix in FILE_SUFFIXES or Path(spec).exists()


def load_tasks(spec: str, *, instruction: str = "", default_split: str | None = None) -> TaskSource:
    """The source for a spec or the path of a data file.

    Args:
        spec: `name:key=value,…`, a path that ends in .jsonl, .json or .parquet, or `package.module:object` (a source, or a
            callable that makes one; it decides its own split).
        instruction: text added to every question.
        default_split: used when the spec names none.
    """
    if spec == GIVEN:
        raise RecipeError(
            "this run's problems were given in Python; go on with it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    if is_import(spec, "sppo.tasks") and not is_records(spec):
        found = resolve(spec, "sppo.tasks", "build")
        own: TaskSource = found() if callable(found) else found
        return with_instruction(own, instruction)
    if spec.startswith(("hub:", "records:")):
        parsed = parse_spec(spec)
        name, words, options = "records", parsed.words, dict(parsed.options)
        if spec.startswith("hub:"):
            options["hub"], words = words[0] if words else None, ()
    elif is_records(spec):
        name, words, options = "records", (spec,), {}
    else:
        parsed = parse_spec(spec)
        name, words, options = parsed.name, parsed.words, dict(parsed.options)
    if default_split is not None:
        options.setdefault("split", default_split)
    source: TaskSource = call(resolve(name, "sppo.tasks", "build"), f"task {name}", *words, **options)
    if len(source) == 0:
        raise RecipeError(
            f"task {spec} holds no problems in the split {options.get('split', 'all')!r}: a tenth of all rows is held out, chosen by the "
            "hash of the question, which can be none of a few; give more rows, or held-out ones of your own with --task.eval"
        )
    return with_instruction(source, instruction)


def load_pair(train: str, evaluation: str | None, instruction: str) -> tuple[TaskSource, TaskSource]:
    """Training and held-out problems. One spec for both is split by hash; rows that have a file of their own are taken whole."""
    both = evaluation is None
    held_out = train if evaluation is None else evaluation
    if both and is_import(train, "sppo.tasks") and not is_records(train):
        raise RecipeError(f"task.train = {train!r} decides its own problems; name held-out ones in task.eval")
    if both and "split=" in train:
        held_out = re.sub(r"split=[\w-]+", "split=held-out", train)
        if "split=train" not in train:
            raise RecipeError(f"task.train = {train!r} leaves nothing to hold out; drop its split, or name task.eval")
    if not both and held_out == train and is_records(train):
        raise RecipeError(f"task.eval is task.train ({train}); leave it out to hold a tenth of the rows out")
    return (
        load_tasks(train, instruction=instruction, default_split="train" if both or not is_records(train) else None),
        load_tasks(
            held_out, instruction=instruction, default_split="held-out" if both or not is_records(held_out) else None
        ),
    )


def with_instruction(source: TaskSource, instruction: str) -> TaskSource:
    """The source with an instruction after every question, or as it is for an empty one."""
    return _Instructed(source, instruction) if instruction else source


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
        *before, last = prompt
        return [*before, {**last, "content": f"{last['content']}\n{self.instruction}"}]


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
