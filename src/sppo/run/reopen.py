"""A run directory as it is when its run goes on: what is there is verified, and nothing in it is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError
from ..recipe.config import Config
from .build import Components
from .directory import DATA, RunDirectory
from .observer import Observer
from .provenance import data_of, moved, must_be_the_same, must_be_there


@dataclass(frozen=True)
class Reopened:
    """A run that can go on."""

    directory: RunDirectory
    recorded: Config
    """The recipe in its folder."""
    config: Config
    """The recipe that it goes on with: more steps, its data elsewhere, or what needs less memory."""
    saved: Path | None
    """The newest complete checkpoint; None for a run that never got that far."""

    @property
    def done(self) -> int:
        """Steps that the checkpoint holds."""
        return int(self.saved.name.removeprefix("step-")) if self.saved else 0

    @property
    def stated(self) -> str:
        """Where it goes on, for the user."""
        path = self.directory.path
        if self.done >= self.config.training.steps:
            return f"{path} has done its {self.done} steps; to go on, resume it with --steps N above that"
        return f"resuming {path} after step {self.done}" if self.saved else f"resuming {path} from its beginning"

    def take_over(self, c: Components) -> None:
        """Change the folder, now that everything is loaded: what later steps left behind goes, and the chain says who goes on."""
        recipe = c.config.model_copy(update={"run": self.recorded.run})  # the folder may have been moved
        if recipe != self.recorded:
            self.directory.write_recipe(recipe)
        if not (self.directory.path / DATA).exists():  # of a version that kept no hashes: from now on they count
            self.directory.data(c.data)
        self.directory.forget_from(self.done)
        self.directory.seal_beginning(c.config, c.verifier, c.data, after=self.done)


def reopen(
    path: Path,
    observer: Observer,
    steps: int | None,
    data: Mapping[str, Any] | None,
    memory: Mapping[str, Any] | None = None,
) -> Reopened:
    """The run in a folder, locked for this process; `steps`, `data` and `memory` (by recipe key) replace what its recipe says.

    Raises a UserError where it cannot be resumed: files missing or changed, a damaged chain, fewer steps than it has done.
    """
    directory, recorded = RunDirectory.open_existing(path)
    config = recorded
    try:
        if data:
            config = moved(config, data)
            must_be_the_same(path, data_of(config))
        must_be_there(config, path)
        found = directory.checkpoints()
        saved = found[-1] if found else None
        if steps is not None:
            config = _changed(config, {"training.steps": steps}, "--steps")
        if memory:
            config = _changed(config, memory, ", ".join(f"--{key}" for key in memory))
        out = Reopened(directory, recorded, _in_folder(config, path), saved)
        if steps is not None and steps < out.done:
            raise RecipeError(f"--steps {steps}: {path} has already done {out.done}; give more, or leave --steps out")
        chain = directory.chain  # a damaged one is refused now
        if saved is not None and (why := chain.vouches_for(saved)):
            raise DataError(
                f"--resume: {saved} is not what was saved: {why}. Put it back as it was, or move it away to resume from an older checkpoint"
            )
        observer.note(out.stated)
        return out
    except BaseException:
        directory.close()
        raise


def _changed(config: Config, changes: Mapping[str, Any], options: str) -> Config:
    """With other values of some keys, together."""
    tree = config.model_dump()
    for dotted, value in changes.items():
        section, _, key = dotted.partition(".")
        tree[section] = {**(tree[section] or {}), key: value}
    return Config.validated(tree, options)


def _in_folder(config: Config, path: Path) -> Config:
    """With `run.out` as its folder is called now."""
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(path)})})
