"""`records`: the rows of a file, a saved dataset's folder or a hub dataset, in the layouts of published data sets.

A row needs a prompt, and something to grade responses by:

    {"question": "2+2?", "answer": "4"}                                       a question (or `problem`): becomes a user's chat message
    {"prompt": "2+2=", "answer": "4"}                                         text: used as it is
    {"prompt": [{"role": "user", "content": "2+2?"}], "tests": ["…"]}         chat messages; `tool_calls` and a column `tools` are kept
    {"prompt": [...], "reward_model": {"ground_truth": "4"}}                  the nested layout of published RL sets; its tests become `tests`
    {"conversations": [{"from": "human", "value": "2+2?"}, …]}                ShareGPT's
    {"instruction": "Add.", "input": "2+2", "output": "4"}                    Alpaca's

`solution` (text), `output` beside `instruction`, or a conversation in `messages` or `conversations` that ends with the
assistant's turn are worked solutions for supervised training. A number in `difficulty` (or `level`) is a curriculum's
dial. Any other column is passed to the rewards by name. Columns of other names are renamed by `task.columns`, e.g.
{prompt = "q", answer = "meta.gold"}.

`records:path=problems.jsonl,split=train`, a bare path, or `hub:openai/gsm8k,subset=main,hub_split=train`
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import first_line
from ..types import Message, Prompt, Task
from .base import ListSource, in_split, question
from .rows import columns_found, parsed, read_rows

PROMPTS = ("prompt", "question", "problem", "messages", "conversations", "instruction")
"""Columns that a prompt is read from, in this order (and `text` of MBPP's rows)."""
IMAGES = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what is not text in published sets."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""The roles of ShareGPT's speakers."""
TEST_KEYS = ("expected", "output", "expected_output", "stdout")
"""A list of objects with one of these is a list of tests."""


def build(
    path: str | None = None,
    split: str = "all",
    hub: str | None = None,
    subset: str | None = None,
    hub_split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> ListSource:
    """The source for `records:path=…` or `hub:…`; `split` is by hash of the prompt: train (90%), held-out or all.

    `columns`: which of the rows' columns to use by which name (`task.columns`).
    """
    rows, where = rows_of(path, hub, subset, hub_split)
    return ListSource([t for t in tasks_from(rows, where, columns) if in_split(t.text, split)])


def rows_of(
    path: str | None = None,
    hub: str | None = None,
    subset: str | None = None,
    hub_split: str = "train",
    broken: list[tuple[int, str]] | None = None,
) -> tuple[Iterator[tuple[int, Mapping[str, Any]]], str]:
    """The numbered rows that a spec's options name, and the name of their source for errors; `broken` as in
    `read_rows`."""
    if (path is None) == (hub is None):
        raise DataError("records needs a path (records:path=FILE) or a hub dataset (hub:NAME)")
    if path is not None:
        return read_rows(Path(os.path.expanduser(str(path))), broken), str(path)
    return _hub_rows(str(hub), subset, hub_split), str(hub)


def tasks_from(
    rows: Iterable[tuple[int, Mapping[str, Any]]], where: str, columns: Mapping[str, str] | None = None
) -> list[Task]:
    """Tasks from numbered rows. Raises DataError naming file and row where a row has no usable prompt.

    A task's id is the file's name and the row's number, without the folder: data that moves stays the same problems.
    """
    short = where.rstrip("/").rpartition("/")[2] or where
    tasks = [task_from(row, f"{where}:{number}", columns, task_id=f"{short}:{number}") for number, row in rows]
    if not tasks:
        raise DataError(f"{where} holds no rows")
    return tasks


def task_from(
    row: Mapping[str, Any], name: str, columns: Mapping[str, str] | None = None, *, task_id: str | None = None
) -> Task:
    """One row as a task.

    Args:
        name: file and row, for errors, and the task's id unless `task_id` gives another.
        columns: which of the row's columns to use by which name.

    Raises:
        DataError: the row has no usable prompt, or a column of the wrong type.
    """
    row = {key: _present(value) for key, value in renamed(row, columns or {}, name).items()}
    for key in IMAGES:
        if _holds(row.get(key)):
            raise DataError(
                f"{name}: the row has an image (`{key}`), and models read text alone here: leave such rows out, or the "
                "column, where the problem can be solved without it"
            )
    found = {k: v for k, v in row.items() if k != "prompt"}
    prompt, solution = row.get("prompt"), row.get("solution")
    if prompt is not None and (not isinstance(prompt, str) or _is_messages(prompt)):
        prompt = _messages(prompt, "prompt", name)
    for key in ("question", "problem", *(["text"] if "test_list" in row else [])):  # MBPP
        if prompt is None and row.get(key) is not None:
            prompt = question(_text(row[key], key, name))
    for key in ("messages", "conversations"):
        if row.get(key) is None or (key == "conversations" and prompt is not None):
            continue
        conversation = _messages(row[key], key, name)
        if key == "conversations" and row.get("system") is not None and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": _text(row["system"], "system", name)}, *conversation]
        if conversation[-1]["role"] == "assistant" and not conversation[-1].get("tool_calls"):
            solution = conversation[-1]["content"] if solution is None else solution
            conversation = conversation[:-1]
        if prompt is None and not conversation:
            raise DataError(
                f"{name}: `{key}` holds the assistant's turn alone; give the row a `prompt` or a `question`"
            )
        prompt = conversation if prompt is None else prompt
    if prompt is None and isinstance(row.get("instruction"), str):
        parts = [row["instruction"], _text(row["input"], "input", name) if row.get("input") is not None else ""]
        prompt = question("\n\n".join(part for part in parts if part))
        solution = row.get("output") if solution is None else solution
    if prompt is None:
        raise DataError(
            f"{name}: the row has no prompt: give it a `prompt` (text or chat messages) or a `question`; its columns are "
            f'{columns_found(row)}, and columns = {{prompt = "…"}} in [task] says which to use'
        )
    _references(found, name)
    if (tools := _tools(found.get("tools"))) is not None:
        found["tools"] = tools
    solution = None if solution is None else _text(solution, "solution", name)
    return Task(name if task_id is None else task_id, prompt, found, solution, _dial(row))


def has_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row has any of the columns that a prompt is read from."""
    return any(row.get(key) is not None for key in PROMPTS)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> dict[str, Any]:
    """The row with its columns also under the names that `columns` gives them; `meta.gold` is the key `gold` of the
    object in `meta`."""
    out = dict(row)
    for wanted, source in columns.items():
        value = _inside(row, source)
        if value is not ...:
            out[wanted] = value
        elif wanted not in row:
            raise DataError(
                f"{name}: the row has no column `{source}`, which is to be `{wanted}`; its columns are {columns_found(row)}"
            )
    return out


def is_empty(prompt: Prompt) -> bool:
    """True for a prompt without any text."""
    return not Task("", prompt).text.strip()


def _inside(row: Any, source: str) -> Any:
    """The value of a column, or of a key inside one; `...` where there is none."""
    if source in row:
        return row[source]
    at = row
    for key in source.split("."):
        at = _decoded(at)
        if not isinstance(at, Mapping) or key not in at:
            return ...
        at = at[key]
    return at


def _present(value: Any) -> Any:
    """A cell, or None for a missing value, which tables of numbers write as NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _holds(value: Any) -> bool:
    """Whether a cell holds anything, or a list of which a member does."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    return value is not None and value != "" and value != {}


def _references(row: dict[str, Any], name: str) -> None:
    """Give a row `answer` or `tests` from where published sets keep them, and take one reference out of a list of one."""
    nested = _decoded(row.get("reward_model"))
    truth = _present(nested.get("ground_truth")) if isinstance(nested, Mapping) else None
    if isinstance(nested, Mapping) and "ground_truth" in nested:
        row["reward_model"] = {**nested, "ground_truth": truth}
    if truth is None:
        truth = row.get("ground_truth")
    if isinstance(truth, Mapping) and truth.keys() == {"target"}:
        truth = truth["target"]
    tests = None if truth is None else _tests(truth)
    if tests is not None:
        if row.get("tests") is None:
            row["tests"] = tests
    elif truth is not None and row.get("answer") is None:
        row["answer"] = truth
    answer = row.get("answer")
    if isinstance(answer, (bytes, bytearray)):
        raise DataError(f"{name}: `answer` must be text or a number, not bytes")
    if isinstance(answer, str) and answer.lstrip()[:1] == "[":
        listed = _decoded(answer)
        if isinstance(listed, list) and listed and all(isinstance(member, str) for member in listed):
            row["answer"] = listed[0] if len(listed) == 1 else listed


def _tests(truth: Any) -> Any:
    """Tests that stand where a reference answer is expected (Eurus, PRIME, DeepCoder), in the layout that they have;
    None for an answer."""
    value = _decoded(truth)
    if isinstance(value, Mapping):
        if {"inputs", "outputs"} <= value.keys():
            return value
        return next((value[key] for key in ("assert_case", "functional", "pytest") if value.get(key)), None)
    if isinstance(value, list) and value:
        if all(isinstance(test, Mapping) and any(key in test for key in TEST_KEYS) for test in value):
            return value
        if all(isinstance(test, str) and test.lstrip().startswith("assert") for test in value):
            return value
    return None


def _decoded(value: Any) -> Any:
    """The parsed value of JSON text of an object or a list; anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return parsed(value)
        except ValueError:
            return value
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, (str, bytes)) else value


def _dial(row: Mapping[str, Any]) -> float | None:
    """The row's difficulty, where it is a number."""
    for key in ("difficulty", "level"):
        value = row.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return None
    return None


def _text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: `{column}` must be text, not {type(value).__name__}")
    return value


def _is_messages(text: str) -> bool:
    """Whether a text is the JSON of chat messages, as tables that hold text alone keep them."""
    if text.lstrip()[:1] != "[":
        return False
    value = _decoded(text)
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _messages(value: Any, column: str, name: str) -> list[Message]:
    value = _decoded(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{name}: `{column}` must be text or a list of chat messages, not {_said(value)}")
    return [_message(m, column, name) for m in value]


def _message(m: Any, column: str, name: str) -> Message:
    """One chat message with every key that a template may read; ShareGPT's names become the usual ones."""
    given, m = m, m if isinstance(m, Mapping) else {}
    message = {key: _without_nulls(v) for key, v in m.items() if v is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        speaker, said = message.pop("from"), message.pop("value", None)
        if speaker == "function_call":
            message |= {"role": "assistant", "tool_calls": _decoded(said)}
        else:
            message |= {"role": SHAREGPT.get(speaker, speaker), "content": said}
    calls = message.get("tool_calls")
    if isinstance(message.get("content"), (list, tuple)):
        message["content"] = _parts(message["content"], column, name)
    if calls is not None:
        message["tool_calls"] = _calls(calls, column, name)
        message.setdefault("content", "")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES or not isinstance(message.get("content"), str):
        raise DataError(
            f'{name}: a chat message must look like {{"role": "user", "content": "…"}}, not {str(given)[:80]} (in `{column}`; roles: '
            f"{', '.join(ROLES)})"
        )
    return message


def _parts(parts: Sequence[Any], column: str, name: str) -> str:
    """The text of a message that is given in parts."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _said(part)
            raise DataError(
                f"{name}: `{column}`: a message holds a part that is not text ({kind}); only text is read: leave the row out"
            )
    return "".join(part["text"] for part in parts)


def _calls(calls: Any, column: str, name: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: a list of functions whose arguments are an object, not its JSON text."""
    out = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(
                f'{name}: `{column}`: a tool call must look like {{"function": {{"name": "…", "arguments": {{…}}}}}}, not {str(call)[:80]}'
            )
        function = {**inner, "arguments": _decoded(inner.get("arguments", {}))}
        out.append(
            {"type": "function", **call, "function": function}
            if "function" in call
            else {"type": "function", "function": function}
        )
    return out


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools` where it describes functions, for the chat template; None where it is something else."""
    value = _decoded(value)
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(t, Mapping) and ("function" in t or "parameters" in t) for t in value):
        return None
    return [_without_nulls(tool) for tool in value]


def _without_nulls(value: Any) -> Any:
    """A nested value without nulls: tables fill keys that a row lacks with null."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value


def _said(value: Any) -> str:
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__


def _hub_rows(name: str, subset: str | None, hub_split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=hub_split)
    except Exception as error:
        raise DataError(f"the dataset {name} cannot be loaded: {first_line(error)}") from error
    yield from enumerate(rows, 1)
