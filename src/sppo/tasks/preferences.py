"""Rows for training a reward model: which of two responses is better, or whether one is good.

    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}                        a preference pair
    {"chosen": [{"role": "user", …}, {"role": "assistant", …}], "rejected": […]}   whole conversations; the prompt is what they share
    {"prompt": "2+2?", "response": "4", "label": true}                        a label: true or false, or a number in [0, 1]

`question` stands for `prompt`, and `completion` for `response`, as everywhere. One file holds one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..types import Prompt
from .records import has_prompt, task_from
from .rows import columns_found, read_rows


@dataclass(frozen=True, slots=True)
class Pair:
    """A preferred response and a rejected one to the same prompt."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A response and how good it is, in [0, 1]."""

    prompt: Prompt
    response: str
    label: float


def read_preferences(path: Path) -> list[Pair] | list[Labelled]:
    """The rows of a file (rows.py). Raises DataError naming the file, the row and the remedy."""
    pairs: list[Pair] = []
    labelled: list[Labelled] = []
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if "chosen" in row and "rejected" in row:
            pairs.append(_pair(row, where))
        elif "label" in row:
            labelled.append(_labelled(row, where))
        else:
            raise DataError(
                f"{where}: the row has neither `chosen` and `rejected` nor a `label`; its columns are {columns_found(row)}"
            )
        if pairs and labelled:
            raise DataError(f"{where}: the file mixes preference pairs with labels; give each a file of its own")
    if not pairs and not labelled:
        raise DataError(f"{path} holds no rows")
    return pairs or labelled


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    chosen, rejected = _said(row["chosen"], "chosen", where), _said(row["rejected"], "rejected", where)
    if chosen == rejected:
        raise DataError(
            f"{where}: `chosen` and `rejected` are the same, so nothing can be learnt from the row; leave it out"
        )
    if not has_prompt(row) and isinstance(row["chosen"], list):
        row = {**row, "prompt": row["chosen"][:-1]}
        if not row["prompt"]:
            raise DataError(f"{where}: `chosen` holds the answer alone; give the row a `prompt`")
    return Pair(
        task_from({k: v for k, v in row.items() if k not in ("chosen", "rejected")}, where).prompt, chosen, rejected
    )


def _labelled(row: Mapping[str, Any], where: str) -> Labelled:
    response = row.get("response", row.get("completion"))
    label = row["label"]
    if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
        raise DataError(f"{where}: `label` must be true, false or a number in [0, 1], not {label!r}")
    return Labelled(task_from(row, where).prompt, _said(response, "response", where), float(label))


def _said(value: Any, column: str, where: str) -> str:
    """A response given as text, or as the last message of a conversation."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise DataError(f"{where}: `{column}` must be text or chat messages that end with the answer")
    return value
