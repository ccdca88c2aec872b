"""The rollouts of a run, by filter or one by one, read from the steps' files as they appear.

Only the narrow columns are kept in memory (about 60 bytes per rollout); texts and token ids are read from one step's
file on request.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import open_regular, readable
from ..run.rollouts import ROLLOUT_SCHEMA

NARROW = (
    "task_id",
    "sample",
    "finish",
    "score",
    "correct",
    "outcome",
    "masked",
    "difficulty",
    "value",
    "advantage",
    "tokens",
    "clipped",
)
NARROW_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in NARROW])
ALWAYS = ("task_id", "sample", "finish", "score", "correct", "outcome", "masked")
"""Columns that have no gaps."""
STEP_FILE = re.compile(r"step-[0-9]{6,9}\.parquet")
Stamp = tuple[int, int]
SURPRISED = 0.8
"""The critic is surprised where outcome and prediction differ by this much."""
ORDERS = {
    "newest": [("step", "descending"), ("row", "ascending")],
    "oldest": [("step", "ascending"), ("row", "ascending")],
    "advantage": [("advantage", "descending")],
    "-advantage": [("advantage", "ascending")],
    "tokens": [("tokens", "descending")],
    "-tokens": [("tokens", "ascending")],
    "surprise": [("surprise", "descending")],
}


@dataclass(frozen=True)
class Filter:
    """A filter of rollouts; every bound is optional."""

    first: int | None = None
    last: int | None = None
    outcome: str = ""
    task: str = ""
    shortest: int | None = None
    longest: int | None = None
    lowest: float | None = None
    highest: float | None = None
    surprised: bool = False
    clipped: bool = False
    order: str = "newest"


class Rollouts:
    """The rollouts of one run's directory. Every method may be called while the run is in progress, and from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._narrow: dict[int, tuple[Stamp, pa.Table]] = {}
        self._rows: dict[int, tuple[Stamp, int]] = {}
        self._joined: tuple[int, pa.Table] = (-1, pa.table({}))
        self._changes = 0

    def steps(self) -> list[int]:
        """Steps whose rollouts are on disk."""
        return sorted(map(_step_of, self._files()))

    def _files(self) -> list[Path]:
        return [p for p in self.folder.glob("step-*.parquet") if STEP_FILE.fullmatch(p.name)]

    def index(self) -> pa.Table:
        """The narrow columns of every rollout, with `step`, `row` and `surprise` (|outcome − prediction|)."""
        return self._narrow_of(None)

    def recent(self, steps: int) -> pa.Table:
        """The same for the last steps only, which is fast."""
        return self._narrow_of(self.steps()[-steps:])

    def _narrow_of(self, steps: list[int] | None) -> pa.Table:
        with self._lock:
            there = self._stamps()
            for step in [s for s, (stamp, _) in self._narrow.items() if there.get(s) != stamp]:
                del self._narrow[step]
                self._changes += 1
            wanted = sorted(there if steps is None else there.keys() & set(steps))
            missing = [s for s in wanted if s not in self._narrow]
            with ThreadPoolExecutor(4) as pool:  # Arrow reads outside Python's lock
                for step, table in zip(missing, pool.map(self._read_narrow, missing), strict=True):
                    if table is not None:
                        self._narrow[step] = (there[step], table)
                        self._changes += 1
            tables = [self._narrow[s][1] for s in wanted if s in self._narrow]
            if steps is not None:
                return pa.concat_tables(tables) if tables else _nothing()
            if self._joined[0] != self._changes:
                self._joined = (self._changes, pa.concat_tables(tables).combine_chunks() if tables else _nothing())
            return self._joined[1]

    def _stamps(self) -> dict[int, Stamp]:
        """Each step file's modification time and size, which show that a resumed run has rewritten it."""
        there = {}
        for path in self._files():
            with contextlib.suppress(OSError):
                stat = path.stat()
                there[_step_of(path)] = (stat.st_mtime_ns, stat.st_size)
        return there

    def counts(self) -> list[tuple[int, int]]:
        """(step, rollouts) in order, from the files' footers."""
        with self._lock:
            there = self._stamps()
            for step, stamp in there.items():
                if self._rows.get(step, (None, 0))[0] != stamp:
                    rows = 0  # a damaged file
                    with contextlib.suppress(UserError), self._reading(step) as file:
                        rows = pq.read_metadata(file).num_rows
                    self._rows[step] = (stamp, rows)
            return [(s, self._rows[s][1]) for s in sorted(there) if self._rows[s][1]]

    def find(self, want: Filter, start: int = 0, count: int = 50) -> tuple[int, list[dict[str, Any]]]:
        """The number of rollouts that pass a filter, and some of them with the beginnings of their texts."""
        if want == Filter(want.first, want.last):
            return self._newest(want, start, count)
        table = self.index()
        keep = pa.scalar(True)
        bounds = (
            ("step", want.first, pc.greater_equal), ("step", want.last, pc.less_equal),
            ("tokens", want.shortest, pc.greater_equal), ("tokens", want.longest, pc.less_equal),
            ("advantage", want.lowest, pc.greater_equal), ("advantage", want.highest, pc.less_equal),
            ("surprise", SURPRISED if want.surprised else None, pc.greater_equal),
            ("clipped", 0.0 if want.clipped else None, pc.greater),
        )  # fmt: skip
        for column, bound, compare in bounds:
            if bound is not None:
                keep = pc.and_(keep, pc.fill_null(compare(table[column], bound), False))
        if want.outcome:
            keep = pc.and_(keep, pc.equal(table["outcome"], want.outcome))
        if want.task:
            keep = pc.and_(keep, pc.match_substring(table["task_id"], want.task, ignore_case=True))
        if not isinstance(keep, pa.Scalar):
            table = table.filter(keep)
        if want.order != "newest" and table.num_rows:
            table = table.sort_by(ORDERS[want.order])
            rows = table.slice(start, count).to_pylist()
        else:
            rows = _newest_first(table, start, count)
        return table.num_rows, self.with_texts(rows)

    def _newest(self, want: Filter, start: int, count: int) -> tuple[int, list[dict[str, Any]]]:
        """Without a filter but on steps, only the steps that are shown are read."""
        inside = [(s, n) for s, n in self.counts() if (want.first or 0) <= s and (want.last is None or s <= want.last)]
        shown, before = [], 0
        for step, n in reversed(inside):
            if before < start + count and before + n > start:
                shown.append(step)
            before += n
        skipped = sum(n for s, n in inside if shown and s > shown[0])
        return sum(n for _, n in inside), self.with_texts(_newest_first(self._narrow_of(shown), start - skipped, count))

    def with_texts(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the narrow columns, and the beginnings of their prompts and responses."""
        for step in {r["step"] for r in rows}:
            texts = self._texts(step)
            for r in rows:
                if r["step"] == step:
                    r["prompt"], r["response"] = texts[r["row"]] if r["row"] < len(texts) else ("", "")
        return rows

    def beside(self, step: int, row: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """The rollouts before and after one, over the ends of its step."""
        counts = self.counts()
        at = next((i for i, (s, n) in enumerate(counts) if s == step and row < n), None)
        if at is None:
            return None, None
        before = (step, row - 1) if row else (counts[at - 1][0], counts[at - 1][1] - 1) if at else None
        after = (step, row + 1) if row + 1 < counts[at][1] else (counts[at + 1][0], 0) if at + 1 < len(counts) else None
        return before, after

    def one(self, step: int, row: int) -> dict[str, Any] | None:
        """Everything recorded of one rollout, or None where there is none that can be read."""
        with contextlib.suppress(UserError), self._reading(step) as opened:
            file = pq.ParquetFile(opened)
            before = 0
            for group in range(file.num_row_groups):
                inside = file.metadata.row_group(group).num_rows
                if row < before + inside:
                    table = _as_recorded(file.read_row_group(group).slice(row - before, 1), ROLLOUT_SCHEMA)
                    found: dict[str, Any] = table.to_pylist()[0]
                    if not _whole(found):
                        return None
                    return {**found, "tokens": len(found["response_ids"]), "step": step, "row": row}
                before += inside
        return None

    def text(self, step: int, row: int) -> str | None:
        """A response, whole."""
        with contextlib.suppress(UserError), self._reading(step) as file:
            column = pq.read_table(file, columns=["response"])["response"].cast(pa.string())
            text: str | None = column[row].as_py() if row < len(column) else None
            return text
        return None

    def _texts(self, step: int) -> list[tuple[str, str]]:
        with contextlib.suppress(UserError), self._reading(step) as file:
            table = pq.read_table(file, columns=["prompt", "response"])
            columns = [table[name].cast(pa.string()).fill_null("") for name in ("prompt", "response")]
            cut = [pc.utf8_slice_codeunits(column, 0, 400).to_pylist() for column in columns]
            return list(zip(*cut, strict=True))
        return []

    def _read_narrow(self, step: int) -> pa.Table | None:
        with contextlib.suppress(UserError), self._reading(step) as opened:
            file = pq.ParquetFile(opened)
            names = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in NARROW if name in names])
            if "tokens" not in names:  # a run of an older version
                lengths = pc.list_value_length(file.read(columns=["response_ids"])["response_ids"])
                table = table.append_column("tokens", lengths.cast(pa.int32()))
            if "clipped" not in names:
                table = table.append_column("clipped", pa.nulls(table.num_rows, pa.float32()))
            table = table.select(list(NARROW)).cast(NARROW_SCHEMA)
            if any(table[name].null_count for name in ALWAYS):
                return None
            surprise = pc.abs(pc.subtract(table["correct"], table["value"]))
            surprise = pc.if_else(table["masked"], pa.scalar(None, pa.float32()), surprise)
            table = table.append_column("surprise", surprise)
            table = table.append_column("step", pa.array([step] * table.num_rows, pa.int32()))
            return table.append_column("row", pa.array(range(table.num_rows), pa.int32()))
        return None  # being replaced, or damaged: `sppo audit verify` says which

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Any]:
        """A step's file, opened. Raises UserError for whatever is wrong with it."""
        path = self._file(step)
        with readable(f"{path} cannot be read"), open_regular(path) as file:
            yield file

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.parquet"


def _step_of(path: Path) -> int:
    return int(path.stem[5:])


def _as_recorded(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table's columns as a schema has them; what it lacks is null. Raises pyarrow's errors."""
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    return pa.table(columns, schema=schema)


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row has all that a rollout always has."""
    tokens, ratios = row["response_ids"], row["log_ratios"]
    if any(row[name] is None for name in (*ALWAYS, "prompt", "response", "response_ids", "logps")):
        return False
    return (
        len(row["logps"]) == len(tokens)
        and None not in (*tokens, *row["logps"], *(ratios or ()))
        and len(ratios or tokens) == len(tokens)
    )


def _newest_first(table: pa.Table, start: int, count: int) -> list[dict[str, Any]]:
    """The table is in the order of the steps already: only the steps that are shown are turned round, not a quarter of
    a million rows."""
    rows: list[dict[str, Any]] = []
    if not table.num_rows:
        return rows
    steps = table["step"].to_numpy()
    end = table.num_rows
    while end > 0 and len(rows) < count:
        first = int(steps.searchsorted(steps[end - 1]))
        inside = end - first
        if start < inside:
            rows += table.slice(first + start, min(inside - start, count - len(rows))).to_pylist()
        start, end = max(0, start - inside), first
    return rows


def _nothing() -> pa.Table:
    beside = [("surprise", pa.float32()), ("step", pa.int32()), ("row", pa.int32())]
    return pa.schema([*NARROW_SCHEMA, *(pa.field(*field) for field in beside)]).empty_table()
