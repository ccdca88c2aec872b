"""The task source's socket, the train/held-out split, and how `task.train` becomes a source.

A source is a finite sequence (possibly a very long one that is computed on demand): `source[i]` is the same task for ever,
so a position in the data is one number, and a resumed run sees what the interrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..errors import RecipeError
from ..spec import GIVEN, Spec, call, is_records, parse_spec, resolve
from ..types import Prompt, Task
from ._own import is_own, own_source

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


def load_tasks(
    spec: str,
    *,
    instruction: str = "",
    default_split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> TaskSource:
    """The source for a spec or the path of a data file.

    Args:
        spec: `name:key=value,…`, the path of a file of rows or of a saved dataset, or `package.module:object,key=value,…` (a source, or a
            callable that makes one from these options; it decides its own split). Its items are tasks or rows.
        instruction: text added to every question.
        default_split: used when the spec names none.
        columns: `task.columns`, for rows whose columns have other names.
    """
    if spec == GIVEN:
        raise RecipeError(
            "this run's problems were given in Python; go on with it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    if is_own(spec):
        return with_instruction(own_source(spec, columns), instruction)
    named = {"columns": columns} if columns else {}
    parsed = Spec("records", (), record_options(spec) | named) if is_records(spec) else parse_spec(spec)
    options = ({} if default_split is None else {"split": default_split}) | parsed.options
    source: TaskSource = call(
        resolve(parsed.name, "sppo.tasks", "build"), f"task {parsed.name}", *parsed.words, **options
    )
    if len(source) == 0:
        raise RecipeError(
            f"task {spec} holds no problems in the split {options.get('split', 'all')!r}: a tenth of all rows is held out, chosen by the "
            "hash of the question, which can be none of a few; give more rows, or held-out ones of your own with --task.eval"
        )
    return with_instruction(source, instruction)


def record_options(spec: str) -> dict[str, Any]:
    """The options of `records:…`, `hub:…` or a bare path, as `records.build` takes them."""
    if not spec.startswith(("hub:", "records:")):
        return {"path": spec}
    parsed = parse_spec(spec)
    options = dict(parsed.options)
    key = "hub" if parsed.name == "hub" else "path"
    if parsed.words and key not in options:
        options[key] = parsed.words[0]
    return options


def load_pair(
    train: str, evaluation: str | None, instruction: str, columns: Mapping[str, str] | None = None
) -> tuple[TaskSource, TaskSource]:
    """Training and held-out problems. One spec for both is split by hash; rows that have a file of their own are taken whole."""
    if columns and not any(is_records(s) or is_own(s) for s in (train, evaluation) if s is not None):
        raise RecipeError(f"task.columns renames the columns of rows, and task.train = {train!r} makes its problems")
    both = evaluation is None
    held_out = train if evaluation is None else evaluation
    if both and is_own(train):
        raise RecipeError(f"task.train = {train!r} decides its own problems; name held-out ones in task.eval")
    if both and "split=" in train:
        held_out = re.sub(r"split=[\w-]+", "split=held-out", train)
        if "split=train" not in train:
            raise RecipeError(f"task.train = {train!r} leaves nothing to hold out; drop its split, or name task.eval")
    if not both and held_out == train and is_records(train):
        raise RecipeError(f"task.eval is task.train ({train}); leave it out to hold a tenth of the rows out")
    return (
        load_tasks(
            train,
            instruction=instruction,
            default_split="train" if both or not is_records(train) else None,
            columns=columns,
        ),
        load_tasks(
            held_out,
            instruction=instruction,
            default_split="held-out" if both or not is_records(held_out) else None,
            columns=columns,
        ),
    )


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
