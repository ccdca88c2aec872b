"""The user's own `package.module:object` as a source of problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DataError, RecipeError
from ..spec import call_own, is_import, is_records, parse_spec, resolve
from ..types import Task
from .records import task_from


def is_own(spec: str) -> bool:
    """True for `package.module:object`, with or without options."""
    return is_import(spec, "sppo.tasks") and not is_records(spec)


def own_source(spec: str, columns: Mapping[str, str] | None = None) -> OwnSource:
    """The source of `package.module:object,key=value,…`; `columns` as in `load_tasks`.

    Raises RecipeError where the object neither is a source nor makes one.
    """
    parsed = parse_spec(spec, "sppo.tasks")
    found = resolve(parsed.name, "sppo.tasks", "build")
    if callable(found) or parsed.words or parsed.options:
        found = call_own(found, f"task {parsed.name}", *parsed.words, **parsed.options)
    if not (hasattr(found, "__len__") and hasattr(found, "__getitem__")) or isinstance(found, Mapping | str):
        raise RecipeError(
            f"task {spec} is a {type(found).__name__}; a source of problems is a sequence: it has a len(), and source[i] is problem i"
        )
    if len(found) == 0:
        raise RecipeError(f"task {spec} holds no problems")
    return OwnSource(found, parsed.name, columns)


class OwnSource:
    """A source of the user's own. An item that is a row (a mapping of columns) becomes a task, like a row of a file."""

    def __init__(self, source: Any, name: str, columns: Mapping[str, str] | None) -> None:
        self.source, self.name, self.columns = source, name, columns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        try:
            item = self.source[index]
        except IndexError:
            raise
        except Exception as error:
            raise DataError(f"{self.name}[{index}] raised {type(error).__name__}: {error}") from error
        if isinstance(item, Task):
            return checked(item)
        if isinstance(item, Mapping):
            return task_from(item, f"{self.name}:{index + 1}", self.columns)
        raise DataError(
            f"{self.name}[{index}] is a {type(item).__name__}; a problem is a Task, or a row such as {{'question': …, 'answer': …}}"
        )


def checked(task: Task) -> Task:
    """The task unchanged. Raises DataError where it is none, or where its id, prompt or columns have the wrong type."""
    if not isinstance(task, Task):
        raise DataError(f"a source of problems must give a sppo.Task, not {type(task).__name__}: {str(task)[:80]}")
    if not isinstance(task.id, str) or not isinstance(task.columns, Mapping):
        raise DataError(f"task {task.id!r}: a Task has an `id` that is text and `columns` that are a mapping")
    messages = isinstance(task.prompt, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in task.prompt
    )
    if not isinstance(task.prompt, str) and not (messages and task.prompt):
        raise DataError(
            f'task {task.id}: a prompt is text or a list of chat messages such as {{"role": "user", "content": "…"}}, not {str(task.prompt)[:80]}'
        )
    return task
