"""Files: written in one step, so that each is whole or absent, and read as what they are, which may be anything.

A run or a model folder is data from elsewhere: cut off, of another version, changed by hand. `readable` is the one place that turns what its
readers raise (there are dozens of kinds) into a sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import DataError, SPPOError, UserError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def readable(what: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """Turn whatever goes wrong inside into `kind`, one sentence that begins with `what` ("policy.model: x cannot be loaded").

    Errors that are sentences already pass. Only for code that reads: a mistake of ours would be reported as the file's.
    """
    try:
        yield
    except (SPPOError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # libraries in Rust panic with a class beside Exception
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why something could not be read, on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = first_line(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return f"it needs more memory than is free ({text})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, KeyError):
        return f"it has no {text}"
    return text


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return line if len(line) <= 300 else line[:299] + "…"


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read. Raises OSError for anything else: a pipe would never end, and neither would /dev/zero."""
    file = open(path, "rb", opener=_opener)  # noqa: SIM115 - handed on
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path.name} is no regular file")
    return file


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, ValueError (no JSON, no object, not UTF-8) or RecursionError."""
    found = json.loads(read_bytes(path).decode())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def read_json_or_nothing(path: Path) -> dict[str, Any]:
    """The same; nothing where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return read_json(path)
    return {}


def is_folder(path: Path) -> bool:
    """Whether there is a folder that may be looked at: `Path.is_dir` raises where a folder above it may not be entered."""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file's bytes. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe that nobody writes to would wait for ever


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's text in one step, on disk before this returns."""
    part = path.with_name(f".{path.name}.tmp")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
