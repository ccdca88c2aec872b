"""`records`: the rows of a JSONL, JSON or parquet file, or of a hub dataset, in the layouts that people have.

A row needs a prompt and something to grade by:

    {"question": "2+2?", "answer": "4"}                                       a question (or `problem`): becomes a user's chat message
    {"prompt": "2+2=", "answer": "4"}                                         text: used as it is
    {"prompt": [{"role": "user", "content": "2+2?"}], "tests": ["…"]}         chat messages
    {"prompt": [...], "reward_model": {"ground_truth": "4"}}                  the nested layout of published RL sets

`solution` (text) or `messages` (a conversation that ends with the assistant's turn) are worked solutions for supervised
training. A number in `difficulty` (or `level`) is a curriculum's dial. Any other column is passed to the rewards by name.

`records:path=problems.jsonl,split=train`, a bare path, or `hub:openai/gsm8k,subset=main,hub_split=train`
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..types import Prompt, Task
from .base import ListSource, in_split, question

ROLES = {"system", "user", "assistant", "tool"}


def build(
    path: str | None = None,
    split: str = "all",
    hub: str | None = None,
    subset: str | None = None,
    hub_split: str = "train",
) -> ListSource:
    """The source for `records:path=…` or `hub:…`; `split` is by hash of the prompt: train (90%), held-out or all."""
    if (path is None) == (hub is None):
        raise DataError("records needs a path (records:path=FILE) or a hub dataset (hub:NAME)")
    where = str(path if path is not None else hub)
    rows = read_rows(Path(where)) if path is not None else _hub_rows(where, subset, hub_split)
    return ListSource([t for t in tasks_from(rows, where) if in_split(t.text, split)])


def tasks_from(rows: Iterable[tuple[int, Mapping[str, Any]]], where: str) -> list[Task]:
    """Tasks from numbered rows. Raises DataError naming file and row where a row has no usable prompt."""
    tasks = [task_from(row, f"{where}:{number}") for number, row in rows]
    if not tasks:
        raise DataError(f"{where} holds no rows")
    return tasks


def task_from(row: Mapping[str, Any], name: str) -> Task:
    """One row as a task; `name` (file and row) becomes its id. Raises DataError where it has no usable prompt."""
    columns = {k: v for k, v in row.items() if k != "prompt"}
    solution = row.get("solution")
    messages = row.get("messages")
    prompt = row.get("prompt")
    for key in ("question", "problem"):
        if prompt is None and row.get(key) is not None:
            prompt = question(_text(row[key], key, name))
    if messages is not None:
        conversation = _messages(messages, "messages", name)
        if conversation[-1]["role"] == "assistant":
            solution = conversation[-1]["content"] if solution is None else solution
            conversation = conversation[:-1]
        prompt = conversation if prompt is None else prompt
    if prompt is None:
        raise DataError(f"{name}: the row has no prompt: give it a `prompt` (text or chat messages) or a `question`")
    if not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt", name)
    nested = columns.get("reward_model")
    if "answer" not in columns and isinstance(nested, dict) and nested.get("ground_truth") is not None:
        columns["answer"] = nested["ground_truth"]
    dial = next((row[k] for k in ("difficulty", "level") if isinstance(row.get(k), int | float)), None)
    return Task(name, prompt, columns, None if solution is None else _text(solution, "solution", name), dial)


def is_empty(prompt: Prompt) -> bool:
    """True for a prompt without any text."""
    return not (prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt)).strip()


def _text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: `{column}` must be text, not {type(value).__name__}")
    return value


def _messages(value: Any, column: str, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: `{column}` must be text or a list of chat messages, not {type(value).__name__}")
    for m in value:
        if not isinstance(m, Mapping) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise DataError(
                f'{name}: a chat message must look like {{"role": "user", "content": "…"}}, not {str(m)[:80]}'
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def read_rows(path: Path, broken: list[tuple[int, str]] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a .jsonl (also gzipped), .json (a list) or .parquet file; the first row or line is 1.

    A broken line raises DataError, or is noted in `broken` as (number, reason) where a list is given.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a .jsonl, .json or .parquet file in it")
    if not path.exists():
        raise DataError(f"there is no file {path}")
    suffixes = path.suffixes
    if ".parquet" in suffixes:
        yield from _parquet_rows(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if ".json" in suffixes:
                yield from _json_rows(path, file.read())
            else:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = _object(line, f"{path}:{number}")
                    except DataError as error:
                        if broken is None:
                            raise
                        broken.append((number, str(error).removeprefix(f"{path}:{number}: ")))
                        continue
                    yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _object(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: broken JSON: {error.msg} at column {error.colno}; files are .jsonl, .json or .parquet"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{name}: JSON that cannot be read: {type(error).__name__}: {error}") from None
    if "\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{name}: the row holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            ) from None
    if not isinstance(row, dict):
        raise DataError(
            f'{name}: a row must be an object such as {{"question": "…", "answer": "…"}}, not {type(row).__name__}'
        )
    return row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows (or be named .jsonl with one row a line)")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} must be an object, not {type(row).__name__}")
        yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def _hub_rows(name: str, subset: str | None, hub_split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=hub_split)
    except Exception as error:
        raise DataError(f"the dataset {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    yield from enumerate(rows, 1)
