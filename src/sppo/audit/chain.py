"""`audit.jsonl`: one line a step, each holding the hash of the line before it, so that a changed, missing or reordered
line (or rollouts file) breaks the chain from there on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

GENESIS = "0" * 64


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_file(run: Path, step: int) -> Path:
    """Where a step's rollouts are."""
    return run / "rollouts" / f"step-{step:06d}.parquet"


def hashes(run: Path, step: int) -> dict[str, str]:
    """What a step's line vouches for: its rollouts file, its line of metrics, all alerts up to it, the recipe as it then was."""
    return {
        "rollouts_sha256": file_sha256(step_file(run, step)),
        "metrics_sha256": _bytes_sha256(_line_of(run / "metrics.jsonl", step)),
        "alerts_sha256": _alerts_sha256(run, step),
        "recipe_file_sha256": file_sha256(run / "recipe.toml"),
    }


def _line_of(path: Path, step: int) -> bytes:
    """The line of a step in metrics.jsonl: the last one while a run records, so the file's end is enough then."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        end = file.read().splitlines()
    return next((line for line in reversed(end) if _step_in(line) == step), b"")


def _alerts_sha256(run: Path, step: int) -> str:
    path = run / "alerts.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return _bytes_sha256(b"\n".join(line for line in lines if _step_in(line) <= step))


def _step_in(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1  # counts as an early one, and is missed where it belongs


def _bytes_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _line(body: dict[str, Any]) -> str:
    return json.dumps({**body, "sha256": _sha256(body)})


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class AuditChain:
    """Appends to, or truncates, one run's chain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.head = json.loads(lines[-1])["sha256"] if lines else GENESIS

    def append(self, entry: dict[str, Any]) -> None:
        """Add a step: `entry` plus the hash of what came before, under one hash; on disk before this returns."""
        body = {**entry, "previous": self.head}
        self.head = _sha256(body)
        with self.path.open("a") as file:
            file.write(_line(body) + "\n")
            file.flush()
            os.fsync(file.fileno())


def verify(run: Path) -> Iterator[tuple[int, str]]:
    """What is wrong with a run's chain or its rollouts: (step, what), the first of each kind of damage; nothing for a sound run.

    Checked: every byte of `audit.jsonl`, the order of its lines, every byte of every rollouts file and of `metrics.jsonl`, `alerts.jsonl` and
    `recipe.toml`, files without a line, and whether the chain reaches the last step that `metrics.jsonl` and `summary.json` tell of (what else
    `summary.json` says is not). Runs of older versions vouch for less. Raises DataError where there is no chain.
    """
    path = run / "audit.jsonl"
    # looked at before the chain, which a run that is going on may make longer in the meantime
    told, there = max(_steps_of(run), default=0), sorted(p.name for p in (run / "rollouts").glob("step-*.parquet"))
    told_lines = _lines(run / "metrics.jsonl")
    try:
        raw = path.read_bytes()
    except OSError:
        raise DataError(f"{run} is no run: it has no audit.jsonl") from None
    by_step = {_step_in(line): line for line in told_lines}
    body: dict[str, Any] = {}
    vouched = 0
    step, head = 0, GENESIS
    *lines, rest = raw.split(b"\n")
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            body = {k: v for k, v in entry.items() if k != "sha256"}
            whole = _line(body).encode() == line
        except (ValueError, AttributeError, UnicodeDecodeError):
            whole = False
        if not whole:
            yield number, f"line {number + 1} of audit.jsonl was changed"
            return
        if body.get("step") != step or body.get("previous") != head:
            yield (
                step,
                f"line {number + 1} of audit.jsonl does not follow the one before it: a line is missing, moved or another's",
            )
            return
        if not step_file(run, step).is_file():
            yield step, f"{step_file(run, step).name} is missing"
        elif file_sha256(step_file(run, step)) != body["rollouts_sha256"]:
            yield step, f"{step_file(run, step).name} was changed"
        if "metrics_sha256" in body:
            vouched += 1
            if body["metrics_sha256"] != _bytes_sha256(by_step.get(step, b"")):
                yield step, f"the line of step {step} in metrics.jsonl was changed"
            if body["alerts_sha256"] != _alerts_sha256(run, step):
                yield step, f"alerts.jsonl is not what it was at step {step}"
        step, head = step + 1, entry["sha256"]
    if "recipe_file_sha256" in body and body["recipe_file_sha256"] != _file_or_none(run / "recipe.toml"):
        yield max(step - 1, 0), "recipe.toml is not the recipe of the last step"
    if vouched and vouched == step and len(told_lines) > step:
        yield step, f"metrics.jsonl has {len(told_lines)} lines for {step} steps"
    if vouched and (late := [line for line in _lines(run / "alerts.jsonl") if _step_in(line) >= step]):
        yield step, f"alerts.jsonl tells of {len(late)} alerts after the last step"
    if rest:
        yield step, "audit.jsonl ends in half a line"
    known = {step_file(run, s).name for s in range(step)}
    for extra in (name for name in there if name not in known):
        yield int(extra[5:11]) if extra[5:11].isdigit() else step, f"{extra} has no line in audit.jsonl"
    if told > step:
        yield step, f"audit.jsonl ends after {step} steps, and the run tells of {told}"


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError:
        return []


def _file_or_none(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _steps_of(run: Path) -> Iterator[int]:
    """How many steps the run's other files tell of."""
    unreadable = contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError)
    with unreadable:
        yield int(json.loads((run / "summary.json").read_text())["steps"])
    with unreadable:
        yield int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]) + 1
