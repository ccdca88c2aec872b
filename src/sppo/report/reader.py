"""Reads a run directory while it grows or later: its recipe, its numbers, its rollouts (rollouts.py).

Nothing is written. `metrics.jsonl` is followed from the last position, so no line is read twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SPPOError, UserError
from ..files import is_folder, open_regular, read_bytes, read_json_or_nothing, readable
from ..recipe.config import Config
from .rollouts import Rollouts

SUMMARY: dict[str, Any] = {
    "steps": int, "seconds": (int, float), "generated_tokens": int, "peak_rss_bytes": int, "masked": int, "stopped": str, "policy_sha256": str,
    "recipe_sha256": str,
}  # fmt: skip
"""The keys of a summary that are read, and their types."""
MOST = 1e100
"""Larger numbers count as damage."""
UNFINISHED = 5
"""The most tokens that one character may take."""


class RunReader:
    """One run. Every method may be called while the run is in progress, and from any thread."""

    def __init__(self, path: Path, until: int | None = None) -> None:
        """`until` reads its first steps only, as many. Raises UserError where there is no run."""
        if not is_folder(path / "rollouts") or not (path / "recipe.toml").is_file():
            raise UserError(f"{path} is not a run directory (it has no recipe.toml and rollouts/)")
        self.path, self.name, self.until = path, path.resolve().name, until
        self._recipe = (0, Config.recalled(path / "recipe.toml"))  # raises now if it cannot be read
        self.rollouts = Rollouts(path / "rollouts")
        self._following = threading.Lock()
        self._followed = {"metrics.jsonl": _Followed(_numbers), "alerts.jsonl": _Followed(_alert)}
        self._loaded: tuple[tuple[str, int], Any] = (("", 0), None)  # the tokenizer

    @property
    def config(self) -> Config:
        """The recipe as it is now: a resumed run may have more steps."""
        with contextlib.suppress(OSError, SPPOError):  # a deleted run or a half-written recipe keeps the last one
            stamp = (self.path / "recipe.toml").stat().st_mtime_ns
            if self._recipe[0] != stamp:
                self._recipe = (stamp, Config.recalled(self.path / "recipe.toml"))
        return self._recipe[1]

    # -- numbers -----------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """One object per finished step; values that are not numbers are left out."""
        return self._follow("metrics.jsonl")

    def alerts(self) -> list[dict[str, Any]]:
        """What the monitors have raised (audit/monitors.py)."""
        return self._follow("alerts.jsonl")

    def summary(self) -> dict[str, Any]:
        """`summary.json`; empty before the run has ended, after it was resumed, or for a damaged file."""
        found = read_json_or_nothing(self.path / "summary.json")
        kept = _numbers(found) | {k: v for k, v in found.items() if isinstance(v, str)}
        whole = all(isinstance(kept.get(k), kind) for k, kind in SUMMARY.items())
        return kept if whole and kept["steps"] == len(self.metrics()) else {}

    def start(self) -> dict[str, Any]:
        """The held-out evaluation before the first step, or nothing before it was made."""
        start = read_json_or_nothing(self.path / "start.json")
        passes = start.get("pass_at_k")
        found = _numbers(start) | (_numbers(passes) if isinstance(passes, dict) else {})
        if isinstance(found.get("accuracy"), float):
            return found
        s = self.summary()
        known = {
            key: s.get(f"accuracy_before{end}") for key, end in (("accuracy", ""), ("low", "_low"), ("high", "_high"))
        }
        return known if isinstance(known["accuracy"], float) else {}

    def running(self) -> bool:
        """Whether a process owns the run now."""
        try:
            with open_regular(self.path / "run.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _follow(self, name: str) -> list[dict[str, Any]]:
        with self._following:
            lines = self._followed[name].read(self.path / name)
        return lines if self.until is None else [line for line in lines if line["step"] < self.until]

    # -- tokens ------------------------------------------------------------------------------------------------------

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, from the tokenizer of the newest checkpoint; `<17>` where there is none.

        A character that several tokens make is the last one's, and spaces are where the whole text has them: each
        token's text is what it adds to the text of the few before it.
        """
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return [f"<{i}>" for i in ids]
        with contextlib.suppress(UserError), readable("the tokenizer"):
            return self._decoded(tokenizer, ids)
        return [f"<{i}>" for i in ids]

    def _decoded(self, tokenizer: Any, ids: list[int]) -> list[str]:
        out: list[str] = []
        start = read = 0  # tokens from `start` are decoded together; those before `read` are out
        for end in range(1, len(ids) + 1):
            before = tokenizer.decode(ids[start:read], skip_special_tokens=False)
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            if text.endswith("\ufffd") and end - read < UNFINISHED and end < len(ids):
                out.append("")
                continue
            out.append(text[len(before) :])
            start, read = read, end
        return out

    def rendered(self, ids: list[int] | None) -> str | None:
        """The text of ids with special tokens: a prompt as the policy read it. None without a tokenizer or ids."""
        tokenizer = self._tokenizer() if ids else None
        with contextlib.suppress(OverflowError, TypeError):  # ids that no tokenizer has: a damaged file
            return None if tokenizer is None else str(tokenizer.decode(ids, skip_special_tokens=False))
        return None

    def _tokenizer(self) -> Any:
        files = sorted((self.path / "checkpoints").glob("step-*/policy/tokenizer.json"))
        if not files:
            return None
        from tokenizers import Tokenizer

        with contextlib.suppress(UserError), readable("the tokenizer"):  # without it ids are shown
            stamp = (str(files[-1]), files[-1].stat().st_mtime_ns)
            if self._loaded[0] != stamp:
                self._loaded = (stamp, Tokenizer.from_str(read_bytes(files[-1]).decode()))
            return self._loaded[1]
        return None


class _Followed:
    """A file of JSON lines that grows, and is made shorter when a run is resumed."""

    def __init__(self, keep: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        self.at, self.inode, self.lines, self.keep = 0, 0, list[dict[str, Any]](), keep

    def read(self, path: Path) -> list[dict[str, Any]]:
        try:
            with open_regular(path) as file:
                stat = os.fstat(file.fileno())
                if stat.st_size < self.at or stat.st_ino != self.inode:
                    self.at, self.inode, self.lines = 0, stat.st_ino, []
                file.seek(self.at)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]  # half a line is read when it has become one
        fresh = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict) and type(found.get("step")) is int and 0 <= found["step"] < 2**31:
                    fresh.append(self.keep(found))
        self.at += len(whole)
        self.lines = [*self.lines, *fresh]  # a new list: whoever holds the old one reads on undisturbed
        return self.lines


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The values that are numbers and can be drawn."""
    return {
        k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and -MOST < v < MOST
    }


def _alert(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of an alert that have the right type."""
    words = ("what", "why", "advice", "action", "monitor")
    kept = {k: v for k, v in found.items() if k in words and isinstance(v, str)} | _numbers(found)
    evidence = found.get("evidence")
    return kept | {"evidence": [e for e in evidence if isinstance(e, str)] if isinstance(evidence, list) else []}


def open_runs(paths: list[str]) -> list[RunReader]:
    """Readers with names that differ. Raises UserError."""
    runs = []
    for path in paths:
        try:
            runs.append(RunReader(Path(path)))
        except SPPOError as error:
            raise UserError(str(error)) from None
    names = [r.name for r in runs]
    if len(set(names)) < len(names):
        for run, path in zip(runs, paths, strict=True):
            run.name = str(Path(path))
    return runs
