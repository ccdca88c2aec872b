"""Files of rows: JSON lines, a JSON list, CSV, TSV, parquet, or a folder that `datasets` saved. Errors name file and
row.

Text files may be compressed (.gz, .bz2, .xz, .zst), must be UTF-8 (with or without a byte-order mark) and are read line
by line. A row's number is its line in a text file, and its place from 1 elsewhere.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from ..files import first_line
from ..spec import COMPRESSED, ROW_FILES, exists, nested_beyond

Rows = Iterator[tuple[int, dict[str, Any]]]
Broken = list[tuple[int, str]]
MOST_NESTED = 100
"""Levels of lists and objects in one row: deeper nesting is no data, and would exhaust a reader's stack."""
KINDS = ", ".join(ROW_FILES)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a cell that Arrow holds and Python cannot."""

    reason: str


def read_rows(path: Path, broken: Broken | None = None) -> Rows:
    """Numbered rows of a file, or of a folder written by `datasets.Dataset.save_to_disk`.

    Args:
        broken: unreadable rows are noted here as (number, reason) and left out; without it the first one raises.

    Raises:
        DataError: no such file, a file of another kind than its name says, or an unreadable row.
    """
    reader = _Reader(path, broken)
    if not exists(path):
        raise DataError(f"there is no file {path}")
    if path.is_dir():
        return reader.folder()
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return reader.parquet()
    if kind in (".csv", ".tsv"):
        return reader.table("," if kind == ".csv" else "\t")
    return reader.json() if kind == ".json" else reader.json_lines()


class _Reader:
    """One file, and where its unreadable rows go."""

    def __init__(self, path: Path, broken: Broken | None) -> None:
        self.path, self.broken = path, broken

    def refuse(self, number: int, why: str) -> None:
        """Note a row that cannot be read, or raise DataError."""
        if self.broken is None:
            raise DataError(f"{self.path}:{number}: {why}")
        self.broken.append((number, why))

    # -- text ----------------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[tuple[int, str]]:
        """Numbered lines, ends kept."""
        try:
            with _open(self.path) as file:
                for number, raw in enumerate(file, 1):
                    if number == 1:
                        raw = raw.removeprefix(codecs.BOM_UTF8)
                    try:
                        yield number, raw.decode()
                    except UnicodeDecodeError as error:
                        self.refuse(number, f"not UTF-8 text: {error.reason} at byte {error.start} of the line")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def json_lines(self) -> Rows:
        for number, line in self.lines():
            if not line.strip():
                continue
            try:
                row = _object(parsed(line))
            except ValueError as error:
                self.refuse(number, str(error))
                continue
            yield number, row

    def json(self) -> Rows:
        """A list of rows; a file of JSON lines by this name is read too."""
        text = "".join(line for _, line in self.lines())
        if text.lstrip()[:1] == "{" and "\n" in text.strip():
            try:
                json.loads(text)
            except (ValueError, RecursionError):
                yield from self.json_lines()
                return
        if not text.strip():
            return
        try:
            rows = parsed(text, by_line=True)
        except ValueError as error:
            raise DataError(f"{self.path}: {error}") from None
        if not isinstance(rows, list):
            raise DataError(
                f"{self.path} must hold a list of rows, not {_kind(rows)} (or be named .jsonl, with one row per line)"
            )
        for number, row in enumerate(rows, 1):
            try:
                yield number, _object(row)
            except ValueError as error:
                self.refuse(number, str(error))

    def table(self, delimiter: str) -> Rows:
        """CSV or TSV with a header; an empty cell is a missing value. A row's number is the line on which it begins."""
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = csv.reader((line for _, line in self.lines()), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                self.refuse(number, f"broken {self.path.suffix.lstrip('.').upper()}: {error}")
                continue
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if (twice := _twice(header)) is not None:
                    raise DataError(f"{self.path}:{number}: the header names the column `{twice}` twice")
            elif len(cells) != len(header):
                named = _listed(header)
                self.refuse(number, f"the row has {len(cells)} cells, and the header names {len(header)}: {named}")
            else:
                yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}

    # -- Arrow ---------------------------------------------------------------------------------------------------------

    def parquet(self) -> Rows:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                yield from self._batches(file.iter_batches(), mapped=False)
        except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{self.path} is not a readable parquet file: {first_line(error)}") from None

    def folder(self) -> Rows:
        """What `save_to_disk` wrote; several splits in one folder are named, and one of them must be chosen."""
        inside = sorted(p.name for p in self.path.iterdir())
        if "dataset_dict.json" in inside:
            splits = [name for name in inside if (self.path / name / "dataset_info.json").exists()]
            if len(splits) == 1:
                return _Reader(self.path / splits[0], self.broken).folder()
            raise DataError(
                f"{self.path} holds the splits {_listed(splits)}; name one, e.g. {self.path}/{(splits or ['train'])[0]}"
            )
        if "state.json" not in inside:
            files = [n for n in inside if n.lower().removesuffix(".gz").removesuffix(".zst").endswith(ROW_FILES)]
            named = f": {_listed(files)}" if files else f" ({KINDS})"
            raise DataError(f"{self.path} is a folder; name a file in it{named}, or a folder that `save_to_disk` wrote")
        return self._saved()

    def _saved(self) -> Rows:
        import datasets

        try:
            found = datasets.load_from_disk(str(self.path)).with_format("arrow")
            yield from self._batches(found.iter(1000), mapped=True)
        except DataError:
            raise
        except Exception as error:  # datasets raises whatever its parts raise
            raise DataError(f"{self.path} cannot be read as a saved dataset: {first_line(error)}") from None

    def _batches(self, batches: Iterable[Any], mapped: bool) -> Rows:
        """Rows of Arrow's batches; `mapped` ones are memory-mapped files that nothing has validated yet."""
        first = 1
        for batch in batches:
            names = batch.schema.names
            if (twice := _twice(names)) is not None:
                raise DataError(f"{self.path} has two columns named `{twice}`")
            columns = [_cells(batch.column(i), mapped) for i in range(len(names))]
            for i in range(batch.num_rows):
                row = {name: column[i] for name, column in zip(names, columns, strict=True)}
                bad = next((name for name, cell in row.items() if isinstance(cell, _Unreadable)), None)
                if bad is not None:
                    self.refuse(first + i, f"column `{bad}` cannot be read: {row[bad].reason}")
                else:
                    yield first + i, row
            first += batch.num_rows


def columns_found(row: Iterable[str]) -> str:
    """The names of a row's columns, for an error message: `question`, `answer`."""
    return _listed(list(row)) or "none"


def _open(path: Path) -> BinaryIO:
    kind = path.suffix.lower()
    if kind == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(kind, open)
    file: BinaryIO = opener(path, "rb")
    return file


def parsed(text: str, by_line: bool = False) -> Any:
    """JSON as Python values.

    Raises ValueError with a reason: syntax, a key given twice, half a surrogate pair, nesting without end.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if by_line else f"column {error.colno}"
        raise ValueError(f"broken JSON: {error.msg} at {where}; rows are read from {KINDS}") from None
    except RecursionError:
        value = ...
    if value is ... or (text.count("[") + text.count("{") > MOST_NESTED and nested_beyond(value, MOST_NESTED)):
        raise ValueError(f"JSON nested over {MOST_NESTED} levels deep")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key `{_twice([key for key, _ in pairs])}` is given twice")
    return found


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object such as {{"question": "…", "answer": "…"}}, not {_kind(row)}')
    return row


def _cells(column: Any, mapped: bool) -> list[Any]:
    """An Arrow column as Python values; where one has none (text that is not UTF-8, a date out of range), it alone is
    lost.

    A damaged file on the disk may hold lengths that lead out of its memory: a mapped column is validated first, and
    lost as a whole.
    """
    try:
        if mapped:
            column.validate(full=True)
    except Exception as error:
        return [_Unreadable(first_line(error))] * len(column)
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception:
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _Unreadable("it is not UTF-8 text")
    except Exception as error:
        return _Unreadable(first_line(error))


def _twice(names: list[str]) -> str | None:
    """The first name that comes twice."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(f"`{name[:60]}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _kind(value: Any) -> str:
    """The name of a JSON value's type, for error messages."""
    return {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}.get(
        type(value).__name__, "a number"
    )
