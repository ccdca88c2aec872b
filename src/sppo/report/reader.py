"""A run directory as a reader sees it, while it grows or long after: its recipe, its numbers, its rollouts (rollouts.py).

Nothing is written, and nothing read twice: `metrics.jsonl` is followed from where it was left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import SPPOError, UserError
from .rollouts import Rollouts

UNFINISHED = 5
"""Tokens that a character may need; beyond that it is no character."""


class RunReader:
    """One run. Every method may be called while the run goes on, and from any thread."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is no run."""
        if not (path / "recipe.toml").is_file() or not (path / "rollouts").is_dir():
            raise UserError(f"{path} is no run directory (it has no recipe.toml and rollouts/)")
        self.path, self.name = path, path.resolve().name
        self._recipe = (0, Config.recalled(path / "recipe.toml"))  # one that cannot be read is said now
        self.rollouts = Rollouts(path / "rollouts")
        self._following = threading.Lock()
        self._followed = {"metrics.jsonl": _Followed(_numbers), "alerts.jsonl": _Followed()}
        self._loaded: tuple[tuple[str, int], Any] = (("", 0), None)  # the tokenizer

    @property
    def config(self) -> Config:
        """The recipe as it is now: a resumed run may have more steps."""
        with contextlib.suppress(
            OSError, SPPOError
        ):  # a run that is gone, or a recipe half written, keeps the one it had
            stamp = (self.path / "recipe.toml").stat().st_mtime_ns
            if self._recipe[0] != stamp:
                self._recipe = (stamp, Config.recalled(self.path / "recipe.toml"))
        return self._recipe[1]

    # -- numbers -----------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """One object a step, as far as the run has come; what is no number is left out."""
        return self._follow("metrics.jsonl")

    def alerts(self) -> list[dict[str, Any]]:
        """What the monitors have raised (audit/monitors.py)."""
        return self._follow("alerts.jsonl")

    def summary(self) -> dict[str, Any]:
        """`summary.json`; nothing while the run has not ended, or has gone on since it did."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
            return found if found.get("steps") == len(self.metrics()) else {}
        return {}

    def start(self) -> dict[str, Any]:
        """The held-out evaluation before the first step, or nothing before it was made."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.path / "start.json").read_text())
            if isinstance(found, dict) and isinstance(found.get("accuracy"), float):
                return _numbers(found)
        s = self.summary()
        known = {
            key: s.get(f"accuracy_before{end}") for key, end in (("accuracy", ""), ("low", "_low"), ("high", "_high"))
        }
        return known if isinstance(known["accuracy"], float) else {}

    def running(self) -> bool:
        """Whether a process owns the run now."""
        try:
            with (self.path / "run.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _follow(self, name: str) -> list[dict[str, Any]]:
        with self._following:
            return self._followed[name].read(self.path / name)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, from the tokenizer of the newest checkpoint; `<17>` where there is none.

        A character that several tokens make is the last one's, and spaces are where the whole text has them: each token's text is what it
        adds to the text of the few before it.
        """
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return [f"<{i}>" for i in ids]
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

    def _tokenizer(self) -> Any:
        files = sorted((self.path / "checkpoints").glob("step-*/policy/tokenizer.json"))
        if not files:
            return None
        from tokenizers import Tokenizer

        with contextlib.suppress(Exception):  # tokenizers raises bare Exceptions
            stamp = (str(files[-1]), files[-1].stat().st_mtime_ns)
            if self._loaded[0] != stamp:
                self._loaded = (stamp, Tokenizer.from_file(stamp[0]))
            return self._loaded[1]
        return None


class _Followed:
    """A file of JSON lines that grows, and is made shorter when a run is resumed."""

    def __init__(self, keep: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        self.at, self.inode, self.lines, self.keep = 0, 0, list[dict[str, Any]](), keep

    def read(self, path: Path) -> list[dict[str, Any]]:
        try:
            with path.open("rb") as file:
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
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and isinstance(found.get("step"), int):
                    fresh.append(self.keep(found))
        self.at += len(whole)
        self.lines = [*self.lines, *fresh]  # a new list: whoever holds the old one reads on undisturbed
        return self.lines


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


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
