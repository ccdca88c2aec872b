"""The run directory: what a run writes, for people and for other tools.

    recipe.toml  metrics.jsonl  rollouts/step-NNNNNN.parquet  audit.jsonl  checkpoints/step-NNNNNN/{policy,critic}  summary.json
    start.json  held-out accuracy before the first step    alerts.jsonl  what the monitors raised, one object an alert
    buffer.jsonl  what [search] has found: state of the run, read back when it goes on

Every file is complete or absent: written beside its name, then renamed. One process owns a run at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..audit.chain import AuditChain, hashes
from ..config import Config
from ..errors import RecipeError, RunFailure, SPPOError, UserError
from ..types import Rollout, Task

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("task_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logps", pa.list_(pa.float32())),
        ("finish", pa.string()),
        ("score", pa.float32()),
        ("correct", pa.float32()),
        ("outcome", pa.string()),
        ("masked", pa.bool_()),
        ("evidence", pa.string()),
        ("difficulty", pa.float32()),
        ("value", pa.float32()),
        ("advantage", pa.float32()),
        ("forks", pa.list_(pa.list_(pa.int32()))),
        ("task", pa.string()),
        ("tokens", pa.int32()),
        ("log_ratios", pa.list_(pa.float32())),
        ("clipped", pa.float32()),
    ]
)


def step_name(step: int) -> str:
    """`step-000020`: names that sort."""
    return f"step-{step:06d}"


class RunDirectory:
    """One run's files. Make one with `create` or `open_existing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._chain: AuditChain | None = None  # read once, at the first step that is recorded

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """A new run; raises RecipeError when the folder already holds one or anything else."""
        if path.exists() and not path.is_dir():
            raise RecipeError(f"run.out: {path} is a file; choose another --out")
        if path.exists() and any(p.name != "run.lock" for p in path.iterdir()):
            if (path / "recipe.toml").exists():
                raise RecipeError(
                    f"run.out: {path} already holds a run; go on with it (sppo train --resume {path}) or choose another --out"
                )
            raise RecipeError(f"run.out: {path} is not empty and not a run; choose another --out")
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"run.out: {path} cannot be made: {error.strerror}; choose another --out") from None
        with no_space(path):
            run._acquire()
            (path / "rollouts").mkdir(exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            run.write_recipe(config)
        return run

    @classmethod
    def open_existing(cls, path: Path) -> tuple[RunDirectory, Config]:
        """The run in a folder, and its resolved recipe, for resuming."""
        if not (path / "recipe.toml").exists():
            raise RecipeError(f"--resume: {path} holds no run (it has no recipe.toml)")
        run = cls(path)
        run._acquire()
        return run, Config.load(path / "recipe.toml")

    def _acquire(self) -> None:
        lock = (self.path / "run.lock").open("a+")
        for last in (False, False, True):  # `sppo view` asks who holds it, and holds it itself for a moment
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not last:
                time.sleep(0.1)
        else:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise RecipeError(
                f"run.out: {self.path} is in use by process {holder}; wait for it, or choose another --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def write_recipe(self, config: Config) -> None:
        """Write the resolved recipe."""
        write_atomic(self.path / "recipe.toml", config.to_toml())

    def discard(self) -> None:
        """Remove a run that never began: its folder was empty before, so all that is in it is the run's."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let another process use the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- steps -------------------------------------------------------------------------------------------------------

    def record(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        values: Sequence[float] | None,
        advantages: Sequence[float],
        log_ratios: Sequence[Sequence[float]],
        clipped: Sequence[float],
    ) -> None:
        """Write a step's rollouts."""
        columns: dict[str, list[Any]] = {name: [] for name in ROLLOUT_SCHEMA.names}
        made = zip(rollouts, values or (None,) * len(rollouts), advantages, log_ratios, clipped, strict=True)
        for r, value, advantage, ratios, cut in made:
            verdict = r.verdict
            assert verdict is not None
            trained = not verdict.masked
            row = (
                step, r.task.id, r.sample, r.task.text, r.text, list(r.prompt_ids), list(r.response_ids), list(r.logps), r.finish,
                verdict.score, verdict.correct, verdict.outcome, verdict.masked, json.dumps(dict(verdict.evidence), default=str),
                r.task.difficulty, value, advantage if trained else None, [list(fork) for fork in r.forks],
                task_json(r.task), len(r.response_ids), ratios[: len(r.response_ids)] if trained else None, cut if trained else None,
            )  # fmt: skip
            for name, cell in zip(columns, row, strict=True):
                columns[name].append(cell)
        path = self.path / "rollouts" / f"{step_name(step)}.parquet"
        with no_space(self.path):
            part = path.with_suffix(".tmp")
            pq.write_table(pa.table(columns, schema=ROLLOUT_SCHEMA), part, compression="zstd")
            os.replace(part, path)

    def seal(self, step: int, audit: dict[str, Any]) -> None:
        """Add the step's line to the audit chain, which vouches for its rollouts, its metrics, the alerts so far and the recipe."""
        with no_space(self.path):
            self._chain = self._chain or AuditChain(self.path / "audit.jsonl")
            self._chain.append({"step": step, **hashes(self.path, step), **audit})

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one step's object to metrics.jsonl; what is not finite is null, so that the file stays JSON."""
        metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with no_space(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")

    def start(self, evaluation: dict[str, Any]) -> None:
        """Write start.json: held-out accuracy before the first step, for whoever looks at the run while it goes on."""
        with no_space(self.path):
            write_atomic(self.path / "start.json", json.dumps(evaluation) + "\n")

    def alert(self, alert: dict[str, Any]) -> None:
        """Append what a monitor raised to alerts.jsonl."""
        with no_space(self.path), (self.path / "alerts.jsonl").open("a") as file:
            file.write(json.dumps(alert) + "\n")

    def forget_from(self, step: int) -> None:
        """Drop what steps ≥ `step` left behind: they will be run again, to the same result."""
        self._chain = None
        for name in ("metrics.jsonl", "audit.jsonl", "buffer.jsonl", "alerts.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line, step) < step]
                write_atomic(path, "".join(line + "\n" for line in kept))
        for path in (self.path / "rollouts").iterdir():
            if path.suffix == ".tmp" or path.stem >= step_name(step):
                path.unlink()
        for path in (self.path / "checkpoints").iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path)

    def summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        with no_space(self.path):
            write_atomic(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.iterdir() if p.name.startswith("step-")) if folder.is_dir() else []

    @contextlib.contextmanager
    def new_checkpoint(self, step: int, keep: int, always: frozenset[int] = frozenset()) -> Iterator[Path]:
        """A folder to fill; it gets its name, and older ones go, only once everything in it is on disk."""
        folder = self.path / "checkpoints"
        part, final = folder / f".{step_name(step)}", folder / step_name(step)
        with no_space(self.path):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            sync_folder(folder)
        spare = {step_name(s) for s in always}
        for old in [p for p in self.checkpoints() if p.name not in spare][:-keep]:
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a good name.
            doomed = old.with_name(f".old-{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def task_json(task: Task) -> str | None:
    """What a task's verdict can be replayed from, its prompt and columns; None where JSON would change them."""
    whole = {"prompt": task.prompt, "columns": dict(task.columns)}
    try:
        text = json.dumps(whole)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == whole else None


def newest_policy(path: Path) -> Path:
    """A model folder from a model folder, a checkpoint or a run directory."""
    if (path / "checkpoints").is_dir():
        found = RunDirectory(path).checkpoints()
        if not found:
            raise RecipeError(f"{path} is a run without a checkpoint yet")
        return found[-1] / "policy"
    return path / "policy" if (path / "policy" / "config.json").exists() else path


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


@contextlib.contextmanager
def no_space(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a disk into a sentence about this run."""
    try:
        yield
    except SPPOError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {path}; free some and go on with: sppo train --resume {path}"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
        raise RunFailure(f"{path} can no longer be written: {error}") from error
    except Exception as error:
        # safetensors and torch report a full disk as errors of their own, with the cause only in the text
        if any(
            sign in str(error) for sign in ("No space left", "os error 28", "PytorchStreamWriter", "unexpected pos")
        ):
            raise UserError(
                f"no space left on the disk of {path}; free some and go on with: sppo train --resume {path}"
            ) from error
        raise


def _step_of(line: str, unreadable: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return unreadable  # a line cut off by a crash belongs to the step that is run again
