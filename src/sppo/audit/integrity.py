"""Is a run what its audit chain says, and is the chain the one that was written? `sppo audit verify`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_bytes, read_json_or_nothing
from ..recipe.config import keys
from ..recipe.removed import is_neutral
from .chain import (
    CHAIN,
    GENESIS,
    Record,
    alerts_sha256,
    bytes_sha256,
    cut_off,
    difference,
    file_or_none,
    files_of,
    lines_of,
    read,
    step_file,
    step_in,
)

FREE = ("training.steps", "run.")
"""Of a recipe, what may change when a run is resumed without making it another one."""


@dataclass
class Findings:
    """The result of `verify`."""

    steps: int = 0
    lines: int = 0
    head: str = GENESIS
    damage: list[tuple[int, str]] = field(default_factory=list)
    """(step, what differs from the record), the first of each kind; empty for an intact run."""
    notes: list[str] = field(default_factory=list)
    """Remarks: what could not be checked, resumptions, another verifier."""

    def bad(self, step: int, what: str) -> None:
        """Add damage."""
        self.damage.append((step, what))


def verify(run: Path, head: str = "", anchor: Path | None = None) -> Findings:
    """Is the run what its record says, and is the record the one that was written?

    Checked: every byte of `audit.jsonl` and `audit.head`, the order of the lines, and every byte of what they hash
    (rollouts, metrics, alerts, the search buffer, `recipe.toml`, `start.json`, `summary.json`, all files of the
    checkpoints); rollouts and checkpoints without a line; a recipe that changed on the way. The record of runs of older
    versions covers less; `notes` says what is missing.

    Args:
        head: the hash of a line, kept from an earlier look; the chain must still hold it.
        anchor: a file that `run.anchor` named; every line that it holds of this chain must still be there.

    Raises DataError where there is no chain.
    """
    look = _Look(run)  # before the chain, which a run that is going on may make longer in the meantime
    record = read(run)
    found = Findings(lines=len(record.entries), head=record.head)
    state = _State(found)
    for entry in record.entries:
        state.take(entry)
    found.steps = state.next
    _kept_elsewhere(record, head, anchor, found)
    if record.problem:
        found.bad(record.at, record.problem)
        return found
    end = max(found.steps - 1, 0)
    if record.half:
        found.bad(found.steps, f"{CHAIN} ends in half a line")
    if cut := cut_off(run, record):
        found.bad(end, cut)
    _steps(look, state, found)
    _files(look, state, found, record.begun)
    _checkpoints(look, state, found, record.begun)
    if look.steps > found.steps:
        found.bad(found.steps, f"{CHAIN} ends after {found.steps} steps, and the run has {look.steps}")
    if record.entries and not record.begun:
        found.notes.append(
            "the run began with an older version of sppo, which recorded its steps alone: start.json, checkpoints, summary.json, buffer.jsonl and the "
            "end of the chain could not be checked for what it did"
        )
    return found


class _Look:
    """The run's files, as they are before the chain is read."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.steps = max(_steps_of(run), default=0)
        self.rollouts = sorted(p.name for p in (run / "rollouts").iterdir()) if (run / "rollouts").is_dir() else []
        self.metrics, self.alerts = lines_of(run / "metrics.jsonl"), lines_of(run / "alerts.jsonl")


class _State:
    """The state of the run after the lines so far."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.steps: dict[int, dict[str, Any]] = {}
        self.next = 0  # the step that is to come
        self.begun = False  # in the present format: of older versions' lines less can be said
        self.recipe: dict[str, Any] | None = None
        self.recipe_sha256, self.verifier = "", ""
        self.data: dict[str, str] = {}
        self.start: str | None = None
        self.summary: str | None = None
        self.ended = False
        self.known: dict[str, list[dict[str, str]]] = {}
        self.kept: list[str] = []

    def take(self, entry: dict[str, Any]) -> None:
        """One line more."""
        event, step = entry.get("event"), self.next
        self.ended = event == "end"
        if event == "resume":
            self._resume(entry)
        elif event == "begin":
            self.recipe, self.begun = entry["recipe"], True
        elif event == "start":
            self.start = entry["start_sha256"]
        elif event == "end":
            self.summary = entry["summary_sha256"]
        elif event == "checkpoint":
            self.known.setdefault(entry["name"], []).append(entry["files"])
            self.kept = [str(name) for name in entry["kept"]]
        else:
            self.steps[step] = entry
            self.next = step + 1
        self.data = entry.get("data", self.data)
        if (sha256 := entry.get("recipe_file_sha256")) is not None:
            if event is None and self.recipe_sha256 and sha256 != self.recipe_sha256:
                what = "recipe.toml was changed before this step"
                if self.begun:
                    self.found.bad(step, f"{what}, and the run was not resumed")
                else:
                    self.found.notes.append(f"step {step}: {what}, and older versions did not record how")
            self.recipe_sha256 = sha256
        if (verifier := entry.get("verifier_sha256")) is not None:
            if self.verifier and verifier != self.verifier:
                self.found.notes.append(f"from step {step if event is None else self.next} on another verifier judged")
            self.verifier = verifier

    def _resume(self, entry: dict[str, Any]) -> None:
        after = entry["after"]
        again = f" (steps {after} to {self.next - 1} were done again)" if after < self.next else ""
        self.found.notes.append(f"resumed after step {after}{again}")
        self.steps = {step: e for step, e in self.steps.items() if step < after}
        self.next = after
        self.kept = [name for name in self.kept if name <= f"step-{after:06d}"]
        now, before = entry["recipe"], self.recipe
        self.recipe = now
        if before is None:
            return
        # a removed key at a neutral value is no change: the recipe of an older version held it
        before = {k: v for k, v in before.items() if k in now or not is_neutral(k, v, before)}
        # a new key at its default neither: that is what the older version did
        defaults = {k: list(d) if isinstance(d, tuple) else d for k, d, _ in keys()}
        new = {k for k in now.keys() - before.keys() if k in defaults and now[k] == defaults[k]}
        changed = [k for k in sorted((now.keys() | before.keys()) - new) if now.get(k) != before.get(k)]
        said = ", ".join(f"{k} {_value(before.get(k))} → {_value(now.get(k))}" for k in changed)
        moved = tuple(self.data) if entry.get("data") == self.data else ()  # the same rows in another place
        if any(not k.startswith(FREE) and k not in moved for k in changed):
            self.found.bad(after, f"from here on it is another recipe: {said}")
        elif changed:
            self.found.notes.append(f"after step {after}: {said}")


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:59] + "…"


def _kept_elsewhere(record: Record, head: str, anchor: Path | None, found: Findings) -> None:
    """Compare the chain with what was kept outside the run."""
    hashes_of_lines = [e["sha256"] for e in record.entries]
    if head and head not in hashes_of_lines:
        found.bad(
            found.steps, f"the head {head[:16]}… is not in {CHAIN}: lines were cut off, or the chain was written anew"
        )
    if anchor is None:
        return
    try:
        lines = [json.loads(line) for line in read_bytes(anchor).splitlines()]
        known = [(e["line"], e["sha256"]) for e in lines if hashes_of_lines and e["chain"] == hashes_of_lines[0]]
        lost = [n for n, sha256 in known if not 1 <= n <= len(hashes_of_lines) or hashes_of_lines[n - 1] != sha256]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"--anchor: {anchor} cannot be read as a list of heads: {error}") from None
    if not known:
        found.bad(0, f"{anchor} knows nothing of this chain: it was written anew, or the anchor is of other runs")
    elif lost:
        found.bad(
            found.steps,
            f"{len(lost)} of {len(known)} lines that {anchor} knows, from line {min(lost)} on, are not in {CHAIN} as they were",
        )


def _steps(look: _Look, state: _State, found: Findings) -> None:
    """Rollouts, metrics, alerts and the buffer, step by step."""
    by_step, vouched = {step_in(line): line for line in look.metrics}, 0
    for step, entry in state.steps.items():
        path = step_file(look.run, step)
        if path.name not in look.rollouts:
            found.bad(step, f"{path.name} is missing")
        elif file_or_none(path) != entry["rollouts_sha256"]:
            found.bad(step, f"{path.name} was changed")
        if "metrics_sha256" in entry:
            vouched += 1
            if entry["metrics_sha256"] != bytes_sha256(by_step.get(step, b"")):
                found.bad(step, f"the line of step {step} in metrics.jsonl was changed")
            if entry.get("alerts_sha256") != alerts_sha256(look.alerts, step):
                found.bad(step, f"alerts.jsonl is not what it was at step {step}")
    count = state.next
    if vouched and vouched == count and len(look.metrics) > count:
        found.bad(count, f"metrics.jsonl has {len(look.metrics)} lines for {count} steps")
    late = [line for line in look.alerts if step_in(line) >= count]
    under_way = not state.ended and all(
        step_in(line) == count for line in late
    )  # the line of their step is yet to come
    if vouched and late and not under_way:
        found.bad(count, f"alerts.jsonl has {len(late)} alerts after the last step")
    known = {step_file(look.run, s).name for s in state.steps}
    if not state.ended:
        known.add(step_file(look.run, count).with_suffix(".tmp").name)
    for extra in (name for name in look.rollouts if name not in known):
        number = extra[5:11]
        found.bad(
            int(number) if number.isascii() and number.isdigit() else count, f"{_shown(extra)} has no line in {CHAIN}"
        )


def _files(look: _Look, state: _State, found: Findings, begun: bool) -> None:
    """The files that exist once per run."""
    run, end = look.run, max(found.steps - 1, 0)
    if state.recipe_sha256 and state.recipe_sha256 != file_or_none(run / "recipe.toml"):
        found.bad(end, "recipe.toml is not the recipe of the last step")
    for name, sha256, step in (("start.json", state.start, 0), ("summary.json", state.summary, end)):
        there = file_or_none(run / name)
        if sha256 is not None and sha256 != there:
            found.bad(step, f"{name} was changed" if there else f"{name} is missing")
        elif sha256 is None and begun and (run / name).exists():
            found.bad(step, f"{name} has no line in {CHAIN}")
    if state.start is not None and state.data != _data(run / "data.json", state.data):
        found.bad(0, "data.json is not what the run started or resumed with")
    _buffer(look, state, found, begun)


def _data(path: Path, unless: dict[str, str]) -> object:
    """The hashes in data.json, or `unless` where a run of an older version has none."""
    if not unless and not path.exists():
        return unless
    try:
        return {key: of["sha256"] for key, of in json.loads(read_bytes(path)).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _buffer(look: _Look, state: _State, found: Findings, begun: bool) -> None:
    path = look.run / "buffer.jsonl"
    wanted = {s: e for s, e in state.steps.items() if isinstance(e.get("buffer_bytes"), int)}
    try:
        raw = read_bytes(path)
    except OSError:
        if wanted or path.exists():
            found.bad(found.steps, "buffer.jsonl is missing" if not path.exists() else "buffer.jsonl cannot be read")
        return
    digest, at = hashlib.sha256(), 0
    for step, entry in wanted.items():
        digest.update(raw[at : entry["buffer_bytes"]])
        at = max(at, entry["buffer_bytes"])
        if digest.hexdigest() != entry.get("buffer_sha256"):
            found.bad(step, f"buffer.jsonl is not what it was at step {step}")
            return
    late = [line for line in raw[at:].split(b"\n") if line]
    if late and begun and (state.ended or any(step_in(line) != found.steps for line in late)):
        found.bad(found.steps, f"buffer.jsonl has {len(late)} lines without a line in {CHAIN}")


def _checkpoints(look: _Look, state: _State, found: Findings, begun: bool) -> None:
    folder = look.run / "checkpoints"
    there = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    for path in there:
        number = path.name.removeprefix("step-")
        step = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else found.steps
        if path.name in state.known:
            if not path.is_dir() or path.is_symlink():
                found.bad(step, f"checkpoints/{path.name} is not a folder")
            elif why := difference(state.known[path.name], files_of(path)):
                found.bad(step, f"checkpoints/{path.name}: {_shown(why)}")
        elif begun:
            found.bad(step, f"checkpoints/{_shown(path.name)} has no line in {CHAIN}")
        elif state.known:
            found.notes.append(f"checkpoints/{_shown(path.name)} was not recorded")
    names = {p.name for p in there}
    for name in state.kept:
        if name not in names:
            found.bad(found.steps, f"checkpoints/{_shown(name)} is missing")


def _shown(name: str) -> str:
    """A file's name without control characters, which terminals obey."""
    return name if name.isprintable() else ascii(name)


def _steps_of(run: Path) -> Iterator[int]:
    """The numbers of steps that the run's other files show."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        yield int(read_json_or_nothing(run / "summary.json").get("steps", 0))
    yield max(map(step_in, lines_of(run / "metrics.jsonl")[-1:]), default=-1) + 1
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isascii() and number.isdigit() and len(number) < 10:
            yield int(number)
