"""How `task.train` and `task.eval` become sources of problems: by name, from rows, or the user's own `module:object`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..spec import GIVEN, Spec, call, is_records, parse_spec, resolve
from .base import TaskSource, with_instruction
from .user_source import is_own, own_source


def load_tasks(
    spec: str, *, instruction: str = "", default_split: str | None = None, columns: Mapping[str, str] | None = None
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
            "this run's problems were given in Python; continue it there: SPPOConfig(resume_from_checkpoint=True)"
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
    """Training and held-out problems.

    One spec for both is split by hash; rows that have a file of their own are taken whole.
    """
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
