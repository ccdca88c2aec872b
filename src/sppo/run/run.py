"""A run's life: begun or resumed, each step written down, saved, ended.

Everything random derives from (seed, what, step), so the state is the weights, the optimisers and a handful of numbers, and a resumed run
ends where the uninterrupted one would have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError, WorkerLost
from ..learning.batch import Batch
from ..learning.learner import Learner
from ..recipe.config import Config
from ..spec import make
from . import checkpoint
from .accuracy import measure_start
from .ahead import Ahead
from .bootstrap import bootstrap
from .build import Components, build, make_learner
from .checkpoint import State
from .directory import RunDirectory
from .models import Parts
from .observer import Observer, Silent
from .recorder import Clock, Recorder, Step
from .reopen import reopen
from .sample import Sampled, Search
from .sync import WeightSync


class Run:
    """Components, which stay, and what changes from step to step. `Run.new` and `Run.resume` make the same object."""

    def __init__(self, components: Components, saved: Path | None = None, fresh: bool = False) -> None:
        """`saved` is the checkpoint to go on from; a `fresh` run's folder holds nothing yet that cannot be made again."""
        c, self.components, self.fresh = components, components, fresh
        self.stopped = ""  # why it ends before its last step
        self.learner: Learner  # made by begin(): its master weights are copies of what the bootstrap leaves
        self.search: Search | None = None
        if c.config.search is not None:  # it reads both as they are at each step
            now = (lambda: self.learner), (lambda: self.sync.fingerprint)
            self.search = make("search", "sppo.experimental", "search", c.config.search, c, *now)
        self.ahead = Ahead(c, self.search)
        self.recorder = Recorder(c, saved)
        self._initial = copy.deepcopy((c.curriculum.state_dict(), c.monitors.state_dict()))
        self._stand(saved)

    def _stand(self, saved: Path | None) -> None:
        """Where the checkpoint `saved` was written, or at the beginning; with a fresh learner where this one is lost meanwhile."""
        while True:
            try:
                self._placed(saved)
                return
            except WorkerLost as lost:
                self.components.models.restart(lost, saved)

    def _placed(self, saved: Path | None) -> None:
        c, self.saved, self.state, self.clock = self.components, saved, State(), Clock()
        self.sync = WeightSync(c.engine, c.policy, c.config.objective.engine_gap_limit)
        if self.search is not None:
            self.search.recall(0 if saved is None else int(saved.name.removeprefix("step-")))
        if saved is None:
            return
        self.learner = make_learner(c, saved)
        self.state, ahead = checkpoint.load(saved, self.learner, c.curriculum, c.monitors)
        self.ahead.load(ahead, saved)
        self.sync.canary.limit = self.state.canary_limit

    def recover(self, lost: WorkerLost) -> None:
        """Go back to the newest checkpoint, with a fresh learner. Raises RunFailure where too much was lost."""
        c = self.components
        found = c.directory.checkpoints()
        saved = found[-1] if found else None
        self.ahead.drop()
        c.models.restart(lost, saved)
        c.curriculum.load_state_dict(copy.deepcopy(self._initial[0]))
        c.monitors.load_state_dict(copy.deepcopy(self._initial[1]))
        self._stand(saved)
        c.directory.forget_from(self.state.step)
        c.directory.seal_beginning(c.config, c.verifier, c.data, after=self.state.step)

    @classmethod
    def new(cls, config: Config, observer: Observer | None = None, parts: Parts | None = None) -> Run:
        """A run from its beginning. Raises a UserError before anything expensive when the recipe cannot be obeyed."""
        directory, c = RunDirectory.create(Path(config.run.out), config), None
        try:
            c = build(config, directory, observer or Silent(), parts or Parts(), None)
            run = cls(c, fresh=True)
            directory.write_recipe(c.config)
            directory.seal_beginning(c.config, c.verifier, c.data)
            return run
        except BaseException:
            if c is not None:
                c.models.close()
            directory.discard()  # nothing has happened yet: the next try may use the same folder
            raise

    @classmethod
    def resume(
        cls, path: Path, observer: Observer | None = None, parts: Parts | None = None, steps: int | None = None,
        data: Mapping[str, Any] | None = None, memory: Mapping[str, Any] | None = None,
    ) -> Run:  # fmt: skip
        """A run from its newest complete checkpoint, or its beginning; `steps` replaces its number of steps, `data` the places of its files by key,
        `memory` what else may change (`MEMORY_KEYS`, `CLUSTER_KEYS`).
        Raises a UserError, and changes nothing in the folder, where it cannot be resumed."""
        found, run = reopen(path, observer or Silent(), steps, data, memory), None
        try:
            c = build(found.config, found.directory, observer or Silent(), parts or Parts(), found.saved)
            run = cls(c, found.saved)
            found.take_over(c)
            return run
        except BaseException:
            if run is not None:
                run.close()
            found.directory.close()
            raise

    @property
    def interrupted(self) -> bool:
        """Whether the run ends after the present step."""
        return bool(self.stopped)

    @property
    def grace(self) -> float | None:
        """Seconds that a SIGTERM leaves the step to end; None: as long as it takes."""
        section = self.components.config.cluster
        return None if section is None else section.grace

    def interrupt(self) -> None:
        """Finish the step, save, and stop."""
        self.stopped = self.stopped or "interrupted"

    def begin(self) -> None:
        """Before the first step: bootstrap, measure the start, set the critic to the base rate, save step 0. A start that fails by the user's
        mistake removes its folder, so that the next try can use it."""
        c = self.components
        try:
            if self.saved is None:
                bootstrap(c, self.state, self.sync, lambda: self.interrupted)
                if self.interrupted:
                    return  # a bootstrap is run again from its beginning, to the same result
                self.learner = make_learner(c, None)
            self.sync(self.state.step)
            if self.saved is None:
                measure_start(c, self.state)
                self.save()
            self.ahead.recall()
        except UserError:
            if self.fresh and not c.directory.checkpoints():
                c.directory.discard()
            raise
        c.observer.stage("train", c.config.training.steps, self.state.step)

    def record(
        self, step: int, sampled: Sampled, batch: Batch, advantage: Tensor, value_B: Tensor | None, learnt: dict[str, Any],
    ) -> None:  # fmt: skip
        """Write the step down; evaluate and save when it is time."""
        c, done = self.components.config, step + 1
        made = Step.of(step, sampled, batch, advantage, value_B, self.learner.trace)
        metrics = self.recorder.measure(made, learnt, self.clock.lap(), self.sync.gap, self.state)
        self.stopped = self.recorder.alerts(step) or self.stopped
        last = done == c.training.steps
        if last or (c.evaluation.every and done % c.evaluation.every == 0):
            metrics |= self.recorder.evaluate(self.state)
        self.recorder.write(made, metrics, self.sync.fingerprint)
        if last or self.interrupted or done % c.run.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Write a complete checkpoint, atomically."""
        c = self.components
        self.state.canary_limit = self.sync.canary.limit
        always = frozenset({0}) if c.config.needs_reference else frozenset()
        with c.directory.new_checkpoint(self.state.step, c.config.run.keep, always) as folder:
            ahead = self.ahead.save(folder)
            checkpoint.save(folder, self.state, self.learner, c.curriculum, c.monitors, ahead)
        c.models.kept(self.state.step)
        if self.state.step >= c.config.training.steps:
            c.models.finished()

    def close(self) -> None:
        """Let go of the run directory and the reward's processes."""
        c = self.components
        self.ahead.close()
        try:
            c.engine.close()
        finally:
            c.reward.close()  # before Ray ends with the models
            c.models.close()
            c.monitors.close()
            self.recorder.trackers.close({})  # a run that failed
            c.directory.close()
