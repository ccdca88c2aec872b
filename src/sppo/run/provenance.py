"""Which data a run learns from: the SHA-256 of every file that its recipe names, kept in `data.json`.

A resumed run goes on with the same rows, wherever they are by then.

    {"task.train": {"path": "/data/problems.jsonl", "sha256": "…"}}

A hub dataset, a task that makes its problems and rows given in Python have no file, and no line here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError
from ..recipe.config import Config
from ..spec import data_path, exists, located, with_data_path
from .directory import DATA


def data_of(config: Config) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of each file that a recipe names, by key. Raises DataError where one cannot be read."""
    return {
        key: {"path": str(data_path(spec)), "sha256": sha256_of(Path(str(data_path(spec))))}
        for key, spec in config.data().items()
    }


def must_be_there(config: Config, run: Path) -> None:
    """Raises DataError where a file that the recipe names is gone."""
    for key, spec in config.data().items():
        if not exists(Path(str(data_path(spec)))):
            raise DataError(
                f"{key}: there is no file {data_path(spec)} any more; say where it is now: sppo train --resume {run} --{key} FILE"
            )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, or of the names and hashes of all files in a folder."""
    try:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            listed = "".join(f"{p.relative_to(path).as_posix()} {sha256_of(p)}\n" for p in inside)
            return hashlib.sha256(listed.encode()).hexdigest()
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file: a run reads its rows more than once, so put them into one")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        hint = (
            "" if path.is_absolute() else " (a path is relative to the recipe that names it, or to the current folder)"
        )
        raise DataError(f"there is no file {path}{hint}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def must_be_the_same(run: Path, now: Mapping[str, Mapping[str, str]]) -> None:
    """Raises DataError where a resumed run's data is not what the run began with. A run of an older version has kept no hashes."""
    try:
        then: Any = json.loads((run / DATA).read_text())
        known = {key: (str(of["path"]), str(of["sha256"])) for key, of in then.items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{run / DATA} cannot be read; put it back as it was, or remove it to go on with the data as it is now"
        ) from None
    for key, (path, sha256) in known.items():
        if key in now and now[key]["sha256"] != sha256:
            raise DataError(
                f"{key}: {now[key]['path']} does not hold what this run began with (it was {path}, SHA-256 {sha256[:16]}…, and is now "
                f"{now[key]['sha256'][:16]}…): put the old rows back, name where they are with --{key} FILE, or begin a new run"
            )


def moved(config: Config, places: Mapping[str, Any]) -> Config:
    """The recipe with its data elsewhere; options of the specs stay. Raises RecipeError where a key does not name a file, here or there."""
    tree = config.model_dump()
    here = config.data()
    for key, place in places.items():
        path = data_path(place) if isinstance(place, str) else None
        if key not in here or path is None:
            was = f"{here[key]!r} is" if key in here else "the run reads no file there, so nothing can be"
            raise RecipeError(
                f"--{key} {place}: with --resume this says where {was} now, and must be a file or a folder of rows"
            )
        section, _, name = key.partition(".")
        tree[section][name] = with_data_path(here[key], str(data_path(located(path, None))))
    return Config.validated(tree, "--resume")
