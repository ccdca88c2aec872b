"""The run directory: what a run writes, for people and for other tools.

    recipe.toml  metrics.jsonl  rollouts/step-NNNNNN.parquet  checkpoints/step-NNNNNN/{policy,critic}  summary.json
    data.json  where the rows are, and the SHA-256 of their files
    audit.jsonl  what vouches for all the others (audit/chain.py)    audit.head  its last line's number and hash
    start.json  held-out accuracy before the first step    alerts.jsonl  what the monitors raised, one object per alert
    buffer.jsonl  what [search] has found: state of the run, read back when it goes on

Every file is complete or absent: written under another name, then renamed. One process owns a run at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import __version__
from ..audit.chain import FORMAT, AuditChain, files_of, hashes
from ..errors import RecipeError, RunFailure, SPPOError, UserError
from ..files import file_sha256, read_bytes, sync_folder, write_atomic
from ..recipe.config import Config, flattened

__all__ = ["RunDirectory", "newest_policy", "no_space", "step_name", "sync_folder", "write_atomic"]

DATA = "data.json"
CHECKPOINT = re.compile(r"step-[0-9]{6,9}")
STEP_FILE = re.compile(r"step-[0-9]{6,9}\.(parquet|tmp)")


def step_name(step: int) -> str:
    """`step-000020`: names that sort."""
    return f"step-{step:06d}"


class RunDirectory:
    """One run's files. Make one with `create` or `open_existing`."""

    def __init__(self, path: Path, anchor: str = "") -> None:
        self.path, self.anchor = path, anchor
        self._lock: IO[str] | None = None
        self._chain: AuditChain | None = None  # read once, when it is needed first

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """A new run. Raises RecipeError when the folder holds a run or anything else, except what a start left that was killed before its
        recipe was written: that is taken over."""
        if path.exists() and not path.is_dir():
            raise RecipeError(f"run.out: {path} is a file; choose another --out")
        run = cls(path, config.run.anchor)
        try:
            run._must_be_free()
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"run.out: {path} cannot be made: {error.strerror}; choose another --out") from None
        with no_space(path):
            run._acquire()
            run._must_be_free()  # now that nobody else can begin here
            (path / "rollouts").mkdir(exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            run.write_recipe(config)
        return run

    def _must_be_free(self) -> None:
        if not self.path.exists() or _left_by_a_killed_start(self.path):
            return
        self.close()
        if (self.path / "recipe.toml").exists():
            raise RecipeError(
                f"run.out: {self.path} already holds a run; go on with it (sppo train --resume {self.path}) or choose another --out"
            )
        raise RecipeError(f"run.out: {self.path} is not empty and not a run; choose another --out")

    @classmethod
    def open_existing(cls, path: Path) -> tuple[RunDirectory, Config]:
        """The run in a folder, and its resolved recipe, for resuming. Nothing in it is changed. Raises RecipeError where it cannot be resumed:
        no run, one that is in use, parts of it missing or not writable."""
        try:
            return cls._open(path)
        except OSError as error:
            raise RecipeError(f"--resume: {path} cannot be read or written: {error.strerror}") from None

    @classmethod
    def _open(cls, path: Path) -> tuple[RunDirectory, Config]:
        if not (path / "recipe.toml").exists():
            if path.is_dir() and any(path.iterdir()) and _left_by_a_killed_start(path):
                raise RecipeError(
                    f"--resume: {path} was killed before its recipe was written, so there is nothing to go on with; start it again with the "
                    f"same command (sppo train RECIPE --out {path})"
                )
            raise RecipeError(f"--resume: {path} holds no run (it has no recipe.toml)")
        config = Config.load(path / "recipe.toml")
        run = cls(path, config.run.anchor)
        run._must_be_whole()
        run._acquire()
        return run, config

    def _must_be_whole(self) -> None:
        for folder in ("rollouts", "checkpoints"):
            if not (self.path / folder).is_dir():
                raise RecipeError(
                    f"--resume: {self.path} has no folder {folder}/; put it back, or make an empty one to go on without what was in it"
                )
        files = [
            self.path / n
            for n in ("recipe.toml", "metrics.jsonl", "alerts.jsonl", "buffer.jsonl", "audit.jsonl", "audit.head")
        ]
        for file in files:
            if os.path.lexists(file) and not file.is_file():
                raise RecipeError(f"--resume: {file} is no regular file; put the run's own back")
        for path in (self.path, self.path / "rollouts", self.path / "checkpoints", *(f for f in files if f.exists())):
            if not os.access(path, os.W_OK):
                raise RecipeError(f"--resume: {path} cannot be written; make it writable, or resume a copy of the run")

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

    def rollouts(self, step: int, table: pa.Table) -> None:
        """Write a step's rollouts."""
        path = self.path / "rollouts" / f"{step_name(step)}.parquet"
        with no_space(self.path):
            part = path.with_suffix(".tmp")
            pq.write_table(table, part, compression="zstd")
            os.replace(part, path)

    @property
    def chain(self) -> AuditChain:
        """What vouches for the run. Raises DataError where it is damaged."""
        self._chain = self._chain or AuditChain(self.path, self.anchor)
        return self._chain

    def seal(self, step: int, audit: dict[str, Any]) -> None:
        """Add the step's line to the audit chain, which vouches for its rollouts, its metrics, the alerts so far and the recipe."""
        with no_space(self.path):
            self.chain.append({"step": step, **hashes(self.path, step), **audit})

    def seal_beginning(
        self, config: Config, verifier: str, data: Mapping[str, Mapping[str, str]], after: int | None = None
    ) -> None:
        """Add the recipe, verifier and data (`provenance.data_of`) to the chain with which a run begins, or goes on `after` a step."""
        dumped = config.model_dump(mode="json", exclude_none=True, exclude={"run": {"out"}})  # a folder may be moved
        recipe = flattened(dumped)
        begins = {
            "recipe": recipe, "recipe_sha256": config.sha256,
            "recipe_file_sha256": file_sha256(self.path / "recipe.toml"), "verifier_sha256": verifier, "sppo": __version__,
            "data": {key: of["sha256"] for key, of in data.items()},
        }  # fmt: skip
        with no_space(self.path):
            if after is None or not self.chain.count:
                self.chain.append({"event": "begin", "format": FORMAT, **begins})
            if after is not None:
                self.chain.append({"event": "resume", "after": after, **begins})

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one step's object to metrics.jsonl; what is not finite is null, so that the file stays JSON."""
        metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with no_space(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")

    def start(self, evaluation: dict[str, Any]) -> None:
        """Write start.json: held-out accuracy before the first step, for anyone who looks at the run while it trains."""
        with no_space(self.path):
            write_atomic(self.path / "start.json", json.dumps(evaluation) + "\n")
            self.chain.append({"event": "start", "start_sha256": file_sha256(self.path / "start.json")})

    def data(self, data: Mapping[str, Mapping[str, str]]) -> None:
        """Write data.json: where the files of rows are, and their SHA-256 (provenance.py)."""
        with no_space(self.path):
            write_atomic(self.path / DATA, json.dumps(data, indent=2) + "\n")

    def alert(self, alert: dict[str, Any]) -> None:
        """Append what a monitor raised to alerts.jsonl."""
        with no_space(self.path), (self.path / "alerts.jsonl").open("a") as file:
            file.write(json.dumps(alert) + "\n")

    def forget_from(self, step: int) -> None:
        """Drop what steps ≥ `step` left behind: they will be run again, to the same result. The audit chain keeps its lines about them."""
        for name in ("metrics.jsonl", "buffer.jsonl", "alerts.jsonl"):
            path = self.path / name
            if path.exists():
                lines = read_bytes(path).decode(errors="replace").split("\n")
                kept = [line for line in lines if line and _step_of(line, step) < step]
                write_atomic(path, "".join(line + "\n" for line in kept))
        for path in (self.path / "rollouts").iterdir():
            if (
                STEP_FILE.fullmatch(path.name)
                and path.is_file()
                and (path.suffix == ".tmp" or path.stem >= step_name(step))
            ):
                path.unlink()
        for path in (self.path / "checkpoints").iterdir():
            if path.name.startswith(".") and path.is_dir():
                shutil.rmtree(path)

    def summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        with no_space(self.path):
            write_atomic(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            self.chain.append({"event": "end", "summary_sha256": file_sha256(self.path / "summary.json")})

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)) if folder.is_dir() else []

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
            spare = {step_name(s) for s in always}
            names = sorted({final.name, *(p.name for p in self.checkpoints())})
            doomed = [n for n in names if n not in spare][:-keep]
            # The chain first: a run never resumes from a checkpoint that it does not know.
            kept = [n for n in names if n not in doomed]
            self.chain.append({"event": "checkpoint", "name": final.name, "files": files_of(part), "kept": kept})
            if final.exists():
                _remove_whole(final)
            os.replace(part, final)
            sync_folder(folder)
        for name in doomed:
            _remove_whole(folder / name)


def _remove_whole(folder: Path) -> None:
    """Renamed first: a removal that is cut short must not leave half a checkpoint under a good name."""
    if folder.is_symlink() or not folder.is_dir():  # somebody has put something else there
        folder.unlink()
        return
    doomed = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _left_by_a_killed_start(path: Path) -> bool:
    """Whether all that is in a folder is what `create` makes before the recipe: the lock, two empty folders, half a recipe."""
    for inside in path.iterdir():
        if inside.name in ("rollouts", "checkpoints"):
            if inside.is_symlink() or not inside.is_dir() or any(inside.iterdir()):
                return False
        elif inside.name not in ("run.lock", ".recipe.toml.tmp") or not inside.is_file():
            return False
    return True


def newest_policy(path: Path) -> Path:
    """A model folder from a model folder, a checkpoint or a run directory."""
    if (path / "checkpoints").is_dir():
        found = RunDirectory(path).checkpoints()
        if not found:
            raise RecipeError(f"{path} is a run without a checkpoint yet")
        return found[-1] / "policy"
    kinds = ("config.json", "adapter_config.json")
    return path / "policy" if any((path / "policy" / kind).exists() for kind in kinds) else path


@contextlib.contextmanager
def no_space(path: Path) -> Iterator[None]:
    """Turn the operating system's error about a disk into a sentence about this run."""
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
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return unreadable  # a line cut off by a crash belongs to the step that is run again
