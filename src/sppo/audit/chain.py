"""`audit.jsonl`: what happened in a run, one JSON object a line, each with the hash of the line before it.

A line with `step` vouches for a step: its rollouts, its line of metrics, the alerts and the search buffer up to it, the recipe. The others have
`event`, and come where they happened:

    begin       the recipe, the verifier's code and the data that the run began with
    start       start.json, the accuracy before the first step
    checkpoint  every file of a checkpoint, and which checkpoints are then kept
    resume      after which step the run went on, with which recipe and verifier; what had been done beyond it counts no more
    end         summary.json

Nothing is ever taken out. `audit.head` holds the number and the hash of the last line, so that a chain cut short is noticed. Whoever can write
the run can write all of this anew; only a hash that is kept elsewhere shows that (`run.anchor`, `sppo audit verify --head`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import file_sha256, read_bytes, read_json_or_nothing, write_atomic
from ..recipe.removed import is_neutral

GENESIS = "0" * 64
FORMAT = 2
"""Of the lines; the first format had lines of steps only."""
CHAIN, HEAD = "audit.jsonl", "audit.head"


def step_file(run: Path, step: int) -> Path:
    """Where a step's rollouts are."""
    return run / "rollouts" / f"step-{step:06d}.parquet"


def hashes(run: Path, step: int) -> dict[str, Any]:
    """What a step's line vouches for: its rollouts file, its line of metrics, all alerts up to it, the recipe as it then was, and the search
    buffer with its length in bytes."""
    found: dict[str, Any] = {
        "rollouts_sha256": file_sha256(step_file(run, step)),
        "metrics_sha256": _bytes_sha256(_line_of(run / "metrics.jsonl", step)),
        "alerts_sha256": _alerts_sha256(_lines(run / "alerts.jsonl"), step),
        "recipe_file_sha256": file_sha256(run / "recipe.toml"),
    }
    if (run / "buffer.jsonl").exists():
        buffer = read_bytes(run / "buffer.jsonl")
        found |= {"buffer_bytes": len(buffer), "buffer_sha256": _bytes_sha256(buffer)}
    return found


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path inside; what is no regular file has none, and is named all the same."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        found[path.relative_to(folder).as_posix()] = _file_or_none(path) or "no regular file"
    return found


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The lines of a chain, as far as each follows from the one before."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    half: bool = False  # it ends in half a line, as a crash leaves it
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
    """The line of each step, as far as the chain can be believed; nothing where there is none."""
    with contextlib.suppress(DataError):
        return {e["step"]: e for e in read(run).entries if "event" not in e}  # of a step that was done again the last
    return {}


def _following(entry: Mapping[str, Any], step: int) -> int | None:
    """The step that comes after a line, or None where the line does not belong here or is not what this version writes."""
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


# -- writing ---------------------------------------------------------------------------------------------------------


class AuditChain:
    """Appends to one run's chain, keeps `audit.head`, and tells the anchor (a file outside the run) each new head."""

    def __init__(self, run: Path, anchor: str = "") -> None:
        """Raises DataError where what is there cannot be gone on from."""
        self.run, self.anchor = run, Path(anchor).expanduser() if anchor else None
        self.record = read(run) if (run / CHAIN).exists() else Record()
        if problem := self.record.problem or _cut(run, self.record):
            raise DataError(
                f"{run} cannot be gone on with: {problem}. Put the file back as it was, or move {CHAIN} and {HEAD} away to go on without "
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

    def vouches_for(self, checkpoint: Path) -> str:
        """Why the chain does not vouch for a checkpoint, or nothing. A chain of an older version says nothing against any."""
        known = [
            e["files"] for e in self.record.entries if e.get("event") == "checkpoint" and e["name"] == checkpoint.name
        ]
        if not known:
            return f"{CHAIN} has no line about it" if self.record.begun else ""
        return _difference(known, files_of(checkpoint))


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _cut(run: Path, record: Record) -> str:
    """Why `audit.head` shows that lines are missing at the end, or nothing. It may be one line behind: a run was killed between the two."""
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


def _difference(known: list[dict[str, str]], there: dict[str, str]) -> str:
    """How a folder differs from what it was the last time that the chain told of it, or nothing where it is what it was at any of them."""
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


# -- verifying -------------------------------------------------------------------------------------------------------

FREE = ("training.steps", "run.")
"""Of a recipe, what may change when a run is resumed without making it another one."""


@dataclass
class Findings:
    """What `verify` found."""

    steps: int = 0
    lines: int = 0
    head: str = GENESIS
    damage: list[tuple[int, str]] = field(default_factory=list)
    """(step, what is not as it was recorded), the first of each kind; nothing for a sound run."""
    notes: list[str] = field(default_factory=list)
    """What else is to be known: what could not be checked, resumptions, another verifier."""

    def bad(self, step: int, what: str) -> None:
        """Add damage."""
        self.damage.append((step, what))


def verify(run: Path, head: str = "", anchor: Path | None = None) -> Findings:
    """Is the run what its record says, and is the record the one that was written?

    Checked: every byte of `audit.jsonl` and `audit.head`, the order of the lines, and every byte of what they vouch for (rollouts, metrics, alerts,
    the search buffer, `recipe.toml`, `start.json`, `summary.json`, all files of the checkpoints); rollouts and checkpoints that no line tells of;
    a recipe that changed on the way. Runs of older versions vouch for less, and `notes` says for what.

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
    if cut := _cut(run, record):
        found.bad(end, cut)
    _steps(look, state, found)
    _files(look, state, found, record.begun)
    _checkpoints(look, state, found, record.begun)
    if look.told > found.steps:
        found.bad(found.steps, f"{CHAIN} ends after {found.steps} steps, and the run tells of {look.told}")
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
        self.told = max(_steps_of(run), default=0)
        self.rollouts = sorted(p.name for p in (run / "rollouts").iterdir()) if (run / "rollouts").is_dir() else []
        self.metrics, self.alerts = _lines(run / "metrics.jsonl"), _lines(run / "alerts.jsonl")


class _State:
    """What the lines so far amount to."""

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
        before = {k: v for k, v in before.items() if k in now or not is_neutral(k, v, before)}
        changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
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
    """Hold the chain against what was kept outside the run."""
    hashes_of_lines = [e["sha256"] for e in record.entries]
    if head and head not in hashes_of_lines:
        found.bad(
            found.steps, f"the head {head[:16]}… is not in {CHAIN}: lines were cut off, or the chain was written anew"
        )
    if anchor is None:
        return
    try:
        lines = [json.loads(line) for line in read_bytes(anchor).splitlines()]
        told = [(e["line"], e["sha256"]) for e in lines if hashes_of_lines and e["chain"] == hashes_of_lines[0]]
        lost = [n for n, sha256 in told if not 1 <= n <= len(hashes_of_lines) or hashes_of_lines[n - 1] != sha256]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"--anchor: {anchor} cannot be read as a list of heads: {error}") from None
    if not told:
        found.bad(0, f"{anchor} knows nothing of this chain: it was written anew, or the anchor is of other runs")
    elif lost:
        found.bad(
            found.steps,
            f"{len(lost)} of {len(told)} lines that {anchor} knows, from line {min(lost)} on, are not in {CHAIN} as they were",
        )


def _steps(look: _Look, state: _State, found: Findings) -> None:
    """Rollouts, metrics, alerts and the buffer, step by step."""
    by_step, vouched = {_step_in(line): line for line in look.metrics}, 0
    for step, entry in state.steps.items():
        path = step_file(look.run, step)
        if path.name not in look.rollouts:
            found.bad(step, f"{path.name} is missing")
        elif _file_or_none(path) != entry["rollouts_sha256"]:
            found.bad(step, f"{path.name} was changed")
        if "metrics_sha256" in entry:
            vouched += 1
            if entry["metrics_sha256"] != _bytes_sha256(by_step.get(step, b"")):
                found.bad(step, f"the line of step {step} in metrics.jsonl was changed")
            if entry.get("alerts_sha256") != _alerts_sha256(look.alerts, step):
                found.bad(step, f"alerts.jsonl is not what it was at step {step}")
    count = state.next
    if vouched and vouched == count and len(look.metrics) > count:
        found.bad(count, f"metrics.jsonl has {len(look.metrics)} lines for {count} steps")
    late = [line for line in look.alerts if _step_in(line) >= count]
    under_way = not state.ended and all(
        _step_in(line) == count for line in late
    )  # the line of their step is yet to come
    if vouched and late and not under_way:
        found.bad(count, f"alerts.jsonl tells of {len(late)} alerts after the last step")
    known = {step_file(look.run, s).name for s in state.steps}
    if not state.ended:
        known.add(step_file(look.run, count).with_suffix(".tmp").name)
    for extra in (name for name in look.rollouts if name not in known):
        number = extra[5:11]
        found.bad(
            int(number) if number.isascii() and number.isdigit() else count, f"{_shown(extra)} has no line in {CHAIN}"
        )


def _files(look: _Look, state: _State, found: Findings, begun: bool) -> None:
    """The files that are there once."""
    run, end = look.run, max(found.steps - 1, 0)
    if state.recipe_sha256 and state.recipe_sha256 != _file_or_none(run / "recipe.toml"):
        found.bad(end, "recipe.toml is not the recipe of the last step")
    for name, sha256, step in (("start.json", state.start, 0), ("summary.json", state.summary, end)):
        there = _file_or_none(run / name)
        if sha256 is not None and sha256 != there:
            found.bad(step, f"{name} was changed" if there else f"{name} is missing")
        elif sha256 is None and begun and (run / name).exists():
            found.bad(step, f"{name} has no line in {CHAIN}")
    if state.start is not None and state.data != _data(run / "data.json", state.data):
        found.bad(0, "data.json is not what the run began with, or went on with")
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
    if late and begun and (state.ended or any(_step_in(line) != found.steps for line in late)):
        found.bad(found.steps, f"buffer.jsonl has {len(late)} lines that {CHAIN} does not tell of")


def _checkpoints(look: _Look, state: _State, found: Findings, begun: bool) -> None:
    folder = look.run / "checkpoints"
    there = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    for path in there:
        number = path.name.removeprefix("step-")
        step = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else found.steps
        if path.name in state.known:
            if not path.is_dir() or path.is_symlink():
                found.bad(step, f"checkpoints/{path.name} is no folder")
            elif why := _difference(state.known[path.name], files_of(path)):
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
    """A file's name, which may hold what terminals obey."""
    return name if name.isprintable() else ascii(name)


def _line_of(path: Path, step: int) -> bytes:
    """The line of a step in metrics.jsonl: the last one while a run records, so the file's end is enough then."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        end = file.read().splitlines()
    return next((line for line in reversed(end) if _step_in(line) == step), b"")


def _alerts_sha256(lines: list[bytes], step: int) -> str:
    return _bytes_sha256(b"\n".join(line for line in lines if _step_in(line) <= step))


def _step_in(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return -1  # counts as an early one, and is missed where it belongs


def _bytes_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _lines(path: Path) -> list[bytes]:
    try:
        return read_bytes(path).splitlines()
    except OSError:
        return []


def _file_or_none(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _steps_of(run: Path) -> Iterator[int]:
    """How many steps the run's other files tell of."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        yield int(read_json_or_nothing(run / "summary.json").get("steps", 0))
    yield max(map(_step_in, _lines(run / "metrics.jsonl")[-1:]), default=-1) + 1
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isascii() and number.isdigit() and len(number) < 10:
            yield int(number)
