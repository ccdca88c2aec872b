"""`audit.jsonl`: the record of a run, one JSON object per line, each with the hash of the line before it.

A line with `step` holds the hashes of a step: its rollouts, its line of metrics, the alerts and the search buffer up to
it, the recipe. Other lines have `event`:

    begin       the recipe, the verifier's code and the data that the run began with
    start       start.json, the accuracy before the first step
    checkpoint  every file of a checkpoint, and which checkpoints are then kept
    resume      the step after which the run continued, its recipe and verifier; later steps before it no longer count
    end         summary.json

Lines are never removed. `audit.head` holds the number and the hash of the last line, so a chain that was cut short is
noticed. Whoever can write to the run can forge all of it; only a hash that is kept elsewhere shows that (`run.anchor`,
`sppo audit verify --head`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import file_sha256, read_bytes, read_json_or_nothing, write_atomic

GENESIS = "0" * 64
FORMAT = 2
"""Version of the lines; version 1 had lines of steps only."""
CHAIN, HEAD = "audit.jsonl", "audit.head"


def step_file(run: Path, step: int) -> Path:
    """The file of a step's rollouts."""
    return run / "rollouts" / f"step-{step:06d}.parquet"


def hashes(run: Path, step: int) -> dict[str, Any]:
    """The hashes that a step's line holds: of its rollouts file, its line of metrics, all alerts up to it, the recipe
    at that time, and the search buffer with its length in bytes."""
    found: dict[str, Any] = {
        "rollouts_sha256": file_sha256(step_file(run, step)),
        "metrics_sha256": bytes_sha256(_line_of(run / "metrics.jsonl", step)),
        "alerts_sha256": alerts_sha256(lines_of(run / "alerts.jsonl"), step),
        "recipe_file_sha256": file_sha256(run / "recipe.toml"),
    }
    if (run / "buffer.jsonl").exists():
        buffer = read_bytes(run / "buffer.jsonl")
        found |= {"buffer_bytes": len(buffer), "buffer_sha256": bytes_sha256(buffer)}
    return found


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path inside; anything but a regular file has none, and is listed
    all the same."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        found[path.relative_to(folder).as_posix()] = file_or_none(path) or "no regular file"
    return found


@dataclass
class Record:
    """The lines of a chain, up to the first that does not follow from the one before."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    half: bool = False  # it ends in half a line, as after a crash
    problem: str = ""  # why the lines beyond these are not believed
    at: int = 0  # the step at which that is

    @property
    def head(self) -> str:
        """The hash of the last line."""
        return str(self.entries[-1]["sha256"]) if self.entries else GENESIS

    @property
    def begun(self) -> bool:
        """Whether all of the run is recorded in the present format."""
        return bool(self.entries) and self.entries[0].get("event") == "begin"


def read(run: Path) -> Record:
    """The chain of a run. Raises DataError where there is none."""
    try:
        raw = read_bytes(run / CHAIN)
    except OSError:
        raise DataError(f"{run} has no {CHAIN} that can be read, so nothing vouches for it") from None
    record, step = Record(), 0
    *lines, rest = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            whole = _line({k: v for k, v in entry.items() if k != "sha256"}).encode() == line
        except (ValueError, AttributeError, TypeError, RecursionError):
            whole = False
        if not whole:
            record.problem, record.at = f"line {number} of {CHAIN} was changed", step
            return record
        following = _following(entry, step) if entry.get("previous") == record.head else None
        if following is None:
            record.problem = (
                f"line {number} of {CHAIN} does not follow the one before it: a line is missing, moved or another's"
            )
            record.at = step
            return record
        step = following
        record.entries.append(entry)
    record.half = bool(rest)
    return record


def lines_of_steps(run: Path) -> dict[int, dict[str, Any]]:
    """The line of each step, as far as the chain is intact; empty without a chain."""
    with contextlib.suppress(DataError):
        return {e["step"]: e for e in read(run).entries if "event" not in e}  # of a step that was done again the last
    return {}


def _following(entry: Mapping[str, Any], step: int) -> int | None:
    """The step after a line, or None for a line that does not belong here or that this version does not write."""
    match entry:
        case {"event": "begin", "recipe": dict()} if entry["previous"] == GENESIS:
            return 0
        case {"event": "start", "start_sha256": str()} | {"event": "end", "summary_sha256": str()}:
            return step
        case {"event": "checkpoint", "name": str(), "files": dict(), "kept": list()}:
            return step
        case {"event": "resume", "after": int(after), "recipe": dict()} if after >= 0:
            return after
        case {"step": int(here), "rollouts_sha256": str()} if here == step and "event" not in entry:
            return step + 1
    return None


def _line(body: dict[str, Any]) -> str:
    return json.dumps({**body, "sha256": _sha256(body)})


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class AuditChain:
    """Appends to one run's chain, writes `audit.head`, and appends each new head to the anchor, a file outside the run."""

    def __init__(self, run: Path, anchor: str = "") -> None:
        """Raises DataError where the existing chain is damaged."""
        self.run, self.anchor = run, Path(anchor).expanduser() if anchor else None
        self.record = read(run) if (run / CHAIN).exists() else Record()
        if problem := self.record.problem or cut_off(run, self.record):
            raise DataError(
                f"{run} cannot be continued: {problem}. Restore the file, or move {CHAIN} and {HEAD} away to continue without "
                "the record of what was done so far"
            )
        self.count, self.head = len(self.record.entries), self.record.head
        self.first = str(self.record.entries[0]["sha256"]) if self.record.entries else ""

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line: `entry` plus the hash of what came before, under one hash; on disk before this returns."""
        path = self.run / CHAIN
        if self.record.half:  # what a crash left of a line
            whole = read_bytes(path)
            os.truncate(path, whole.rfind(b"\n") + 1)
            self.record.half = False
        body = {**entry, "previous": self.head}
        self.head = _sha256(body)
        self.first = self.first or self.head
        self.count += 1
        _append(path, _line(body))
        write_atomic(self.run / HEAD, json.dumps({"lines": self.count, "sha256": self.head}) + "\n")
        if self.anchor is not None:
            self.anchor.parent.mkdir(parents=True, exist_ok=True)
            _append(self.anchor, json.dumps({"chain": self.first, "line": self.count, "sha256": self.head}))

    def vouches_for(self, checkpoint: Path, part: str = "") -> str:
        """Why the chain does not vouch for a checkpoint (or a folder in it), or nothing.

        A chain of an older version says nothing against any.
        """
        known = [
            e["files"] for e in self.record.entries if e.get("event") == "checkpoint" and e["name"] == checkpoint.name
        ]
        if not known:
            return f"{CHAIN} has no line about it" if self.record.begun else ""
        inside = f"{part}/" if part else ""
        known = [{n: sha256 for n, sha256 in files.items() if n.startswith(inside)} for files in known]
        return difference(known, {inside + n: sha256 for n, sha256 in files_of(checkpoint / part).items()})


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_off(run: Path, record: Record) -> str:
    """Why `audit.head` shows that lines are missing at the end, or nothing.

    It may be one line behind: a run was killed between the two.
    """
    recorded = any("event" in e for e in record.entries)
    if not (run / HEAD).exists() and not (run / HEAD).is_symlink():
        return f"{HEAD} is missing, so lines may have been cut from the end of {CHAIN}" if recorded else ""
    head = read_json_or_nothing(run / HEAD)
    lines, sha256 = head.get("lines"), head.get("sha256")
    if not isinstance(lines, int) or lines < 1:
        return f"{HEAD} was changed"
    if lines > len(record.entries):
        return f"{CHAIN} has {len(record.entries)} lines, and {HEAD} says that it had {lines}: the end was cut off"
    return f"{HEAD} is of another chain" if record.entries[lines - 1]["sha256"] != sha256 else ""


def difference(known: list[dict[str, str]], there: dict[str, str]) -> str:
    """How a folder differs from its last recorded state; empty where it equals any recorded state."""
    if there in known:
        return ""
    was = known[-1]
    for name in sorted(was.keys() | there.keys()):
        if name not in there:
            return f"{name} is missing"
        if name not in was:
            return f"{name} was added"
        if was[name] != there[name]:
            return f"{name} was changed"
    return ""


def _line_of(path: Path, step: int) -> bytes:
    """The line of a step in metrics.jsonl: the last one while a run records, so the file's end is enough then."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        end = file.read().splitlines()
    return next((line for line in reversed(end) if step_in(line) == step), b"")


def alerts_sha256(lines: list[bytes], step: int) -> str:
    return bytes_sha256(b"\n".join(line for line in lines if step_in(line) <= step))


def step_in(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return -1  # counts as an early one, and is missed where it belongs


def bytes_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lines_of(path: Path) -> list[bytes]:
    try:
        return read_bytes(path).splitlines()
    except OSError:
        return []


def file_or_none(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None
