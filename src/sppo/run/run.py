"""A run: its parts put together from a recipe, its state, and what happens around each step of the loop.

`Run.new` and `Run.resume` build the same object; everything random derives from (seed, what, step), so the state is the
weights, the optimisers and a handful of numbers, and a resumed run ends where the uninterrupted one would have.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..audit.monitors import Monitors
from ..audit.verifier import verifier_sha256
from ..audit.work import without_work
from ..errors import DataError, RecipeError, RewardError, UserError
from ..evaluation.evaluate import Evaluation, evaluate, held_out_tasks, mean_measures
from ..evaluation.step_quality import step_checker
from ..experimental.search import Search
from ..learning.batch import Batch
from ..learning.learner import Learner
from ..learning.optimizer import optimiser_class
from ..memory import give_back, keep_memory
from ..models.loading import pick_device
from ..models.mlp import ControlPolicy
from ..models.weights import parameter_count
from ..objective.diagnostics import explained_variance_ceiling
from ..recipe.config import Config, flattened
from ..rewards.base import fitting_reward, load_reward
from ..rewards.combine import MixedReward, adds
from ..rollout.canary import Canary
from ..rollout.collect import collect, overruled
from ..rollout.engine import Engine, Sampling, TreeEngine, load_engine
from ..tasks.base import GIVEN, load_pair
from ..tasks.rows import columns_found
from ..threads import fitted
from ..trackers.base import TrackedRun, Trackers
from ..types import Task
from . import checkpoint
from .bootstrap import bootstrap
from .build import Parts, PromptLimit, load_critic, load_policy, one_control_task, shown_prompt
from .checkpoint import State
from .curriculum import curriculum
from .directory import DATA, RunDirectory
from .observer import Observer, Silent
from .plan import Model, plan, typical_prompt
from .provenance import data_of, moved, must_be_the_same, must_be_there
from .sample import Gathered
from .warnings import Health

BASE_RATE_PROBLEMS = 256
"""Training problems on which the critic's start is measured, at most; no more than two steps' either."""


class Run:
    """Everything that the loop moves."""

    def __init__(
        self, config: Config, directory: RunDirectory, observer: Observer, parts: Parts, saved: Path | None
    ) -> None:
        keep_memory()
        torch.set_num_threads(config.run.threads or fitted(torch.get_num_threads()))
        config, ratio = config.settled()
        self.config, self.directory, self.observer = config, directory, observer
        self.state = State()
        self.interrupted = False
        self.fingerprint = ""  # of the weights at the last sync
        self.tight = False  # the plan takes a good part of the memory that can be had
        self.fresh = False  # made by this process, with nothing in its folder that cannot be made again
        self._clock: dict[str, float] = {}
        for why in config.without_effect():
            observer.note(f"warning: {why}")
        observer.note(f"algorithm {config.objective.algorithm}, {ratio}")
        device = pick_device()
        optimiser_class(config.training.optimizer, device)  # said now, and not after a bootstrap
        self.reward = parts.reward or load_reward(config.reward.use, config.reward.limit)
        self.verifier = verifier_sha256(self.reward)
        if config.reward.anneal and not (isinstance(self.reward, MixedReward) and adds(self.reward.parts)):
            raise RecipeError(
                f"reward.anneal fades what is added to a reward, and reward.use = {config.reward.use!r} adds nothing"
            )
        if parts.train is not None and parts.evaluation is not None:
            self.train_tasks, self.eval_tasks = parts.train, parts.evaluation
        else:
            self.train_tasks, self.eval_tasks = load_pair(
                config.task.train, config.task.eval, config.task.instruction, config.task.columns
            )
        self.data = data_of(config)
        must_be_the_same(directory.path, self.data)
        self.policy = load_policy(config, parts.policy, saved, device, observer.note)
        if config.training.checkpoint_activations:
            self.policy.checkpoint_activations()
        self.reward.check(self.train_tasks[0])  # raises where this machine cannot judge its kind at all
        self.critic = load_critic(config, parts.critic, saved, device, observer.note)
        one_control_task(config, self.policy, self.critic)
        config = self.config = self._planned(config, device)
        if saved is None:
            critic_size = parameter_count(self.critic) if self.critic is not None else 0
            config = self.config = config.with_rates(parameter_count(self.policy.model), critic_size)
        self.engine: Engine = load_engine(config.rollout.engine, self.policy)
        if self.engine.stated:
            observer.note(self.engine.stated)
        if config.rollout.kind == "tree" and not (isinstance(self.engine, TreeEngine) and self.engine.branches):
            raise RecipeError(f"rollout.kind = 'tree' needs an engine that can branch; {self.engine.stated}")
        self.sampling = Sampling.of(config.rollout)
        self.health = Health(config, self.sampling, observer.note)
        self.health.before()
        self.monitors = Monitors(config.monitors, self.reward, config.seed, config.reward.limit)
        self.stopped = ""  # by which alert
        self.too_long = PromptLimit(config, self.policy, self.critic, self.engine.context)
        for which, source in (("training", self.train_tasks), ("held-out", self.eval_tasks)):
            if refused := self.too_long.refusals(source):
                more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
                observer.note(f"warning: {len(refused)} of {len(source)} {which} rows are left out: {refused[0]}{more}")
        held_out = held_out_tasks(self.eval_tasks, config.evaluation.n)
        self.held_out = [t for t in held_out if self.too_long(t) is None]
        if not self.held_out:
            raise RecipeError(f"no held-out problem can be used: {held_out[0].id}: {self.too_long(held_out[0])}")
        if len(self.held_out) < len(held_out):
            observer.note(
                f"{len(held_out) - len(self.held_out)} of {len(held_out)} held-out prompts are over the limit or refused, and left out"
            )
        if not isinstance(self.policy, ControlPolicy):
            observer.note(shown_prompt(self.policy, self.held_out[0]))
        self.curriculum = curriculum(
            config.curriculum,
            self.train_tasks,
            config.seed,
            self.too_long,
            self.critic,
            self.held_out,
            config.training.micro_budget,
        )
        self.searcher = Search(config.search, self) if config.search else None
        self.step_checker = step_checker(config.task.eval or config.task.train, self.held_out[0], self.reward)
        self.canary = Canary(self.policy, config.objective.engine_gap_limit)
        self.canary_gap = 0.0  # at the last sync
        self.resumed_from = saved
        self.trackers = Trackers(config.run.trackers, self._tracked(saved), observer.note)
        self.learner: Learner  # made by begin(): its master weights are copies of what the bootstrap leaves
        if saved is not None:
            self._make_learner()
            self.state = checkpoint.load(saved, self.learner, self.curriculum, self.monitors)
            self.canary.limit = self.state.canary_limit
            if self.searcher is not None:
                self.searcher.recall(self.state.step)

    def _planned(self, config: Config, device: torch.device) -> Config:
        """The recipe with `training.micro_tokens` chosen where it is open; says what the run will need of memory."""
        if isinstance(self.policy, ControlPolicy):  # networks of a few thousand weights
            return config
        prompt = typical_prompt(
            self.train_tasks, lambda task: len(self.policy.prompt_ids(task)), config.task.max_prompt_tokens
        )
        critic = None if self.critic is None else Model(self.critic.backbone, next(self.critic.parameters()).dtype)
        found = plan(config, Model(self.policy.model, self.policy.dtype), critic, device, prompt)
        self.observer.note(found.stated())
        self.tight = found.tight
        if device.type == "cpu":
            keep_memory(found.capacity)
        training = config.training.model_copy(update={"micro_tokens": found.micro_tokens})
        return config.model_copy(update={"training": training})

    @classmethod
    def new(cls, config: Config, observer: Observer | None = None, parts: Parts | None = None) -> Run:
        """A run from its beginning. Raises a UserError before anything expensive when the recipe cannot be obeyed."""
        directory = RunDirectory.create(Path(config.run.out), config)
        try:
            job = cls(config, directory, observer or Silent(), parts or Parts(), None)
            job.fresh = True
            directory.write_recipe(job.config)
            directory.seal_beginning(job.config, job.verifier, job.data)
            return job
        except BaseException:
            directory.discard()  # nothing has happened yet: the next try may use the same folder
            raise

    @classmethod
    def resume(
        cls,
        path: Path,
        observer: Observer | None = None,
        parts: Parts | None = None,
        steps: int | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Run:
        """A run from its newest complete checkpoint (or its beginning, if it never got that far); `data` says where its files of rows are now.
        Raises a UserError, and changes nothing in the run, where it cannot be gone on with."""
        directory, known = RunDirectory.open_existing(path)
        config, job = known, None
        try:
            if data:
                config = moved(config, data)
                must_be_the_same(path, data_of(config))
            must_be_there(config, path)
            found = directory.checkpoints()
            saved = found[-1] if found else None
            done = int(saved.name.removeprefix("step-")) if saved else 0
            if steps is not None:
                tree = config.model_dump()
                tree["training"]["steps"] = steps
                config = Config.validated(tree, "--steps")
                if steps < done:
                    raise RecipeError(
                        f"--steps {steps}: {path} has already done {done}; give more, or leave --steps out"
                    )
            chain = directory.chain  # one that is damaged is said now
            if saved is not None and (why := chain.vouches_for(saved)):
                raise DataError(
                    f"--resume: {saved} is not what was saved: {why}. Put it back as it was, or move it away to go on from an older checkpoint"
                )
            config = config.model_copy(update={"run": config.run.model_copy(update={"out": str(path)})})
            going = f"resuming {path} after step {done}" if saved else f"resuming {path} from its beginning"
            if done >= config.training.steps:
                going = f"{path} has done its {done} steps; to go on, resume it with --steps N above that"
            (observer or Silent()).note(going)
            job = cls(config, directory, observer or Silent(), parts or Parts(), saved)
            # Now that everything is loaded, and not before, the run is changed.
            recipe = job.config.model_copy(update={"run": known.run})  # the folder may have been moved
            if recipe != known:
                directory.write_recipe(recipe)
            directory.forget_from(done)
            directory.seal_beginning(job.config, job.verifier, job.data, after=done)
            return job
        except BaseException:
            if job is not None:
                job.close()
            directory.close()
            raise

    def _tracked(self, saved: Path | None) -> TrackedRun:
        step = int(saved.name.removeprefix("step-")) if saved else 0
        path = self.directory.path
        return TrackedRun(
            path.resolve().name, path, flattened(self.config.model_dump(mode="json", exclude_none=True)), step
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    def _make_learner(self) -> None:
        """The learner, and π_ref, the policy at step 0 (after any bootstrap), if the recipe reads it."""
        self.learner = Learner(self.policy, self.critic, None, self.config)
        self.learner.tight = self.tight
        if self.tight:
            give_back()
        self.learner.progress = lambda done, total: self.within("updating", done, total)
        if not self.config.needs_reference:
            return
        if self.resumed_from is None:
            self.learner.reference = self.policy.as_reference()
            return
        start = self.directory.path / "checkpoints" / "step-000000" / "policy"
        reference, _ = type(self.policy).load(
            str(start), dtype=str(self.policy.dtype).removeprefix("torch."), device=self.policy.device, seed=0,
            chat_template=self.config.policy.chat_template,
        )  # fmt: skip
        if isinstance(reference, ControlPolicy) and isinstance(self.policy, ControlPolicy):
            reference.scorer.states = self.policy.states
        reference.model.requires_grad_(False)
        self.learner.reference = reference

    # -- around the loop ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step: bootstrap, measure the start, set the critic to the base rate, save step 0. A start that fails by the user's
        mistake leaves no folder in the way of the next try."""
        try:
            self._begin()
        except UserError:
            if self.fresh and not self.directory.checkpoints():
                self.directory.discard()
            raise

    def _begin(self) -> None:
        if self.resumed_from is None:
            bootstrap(self)
            if self.interrupted:  # a bootstrap is run again from its beginning, to the same result
                return
            self._make_learner()
            self.sync(self.state.step)
            result = self.evaluate()
            if result.n == 0:
                reasons = {
                    str(r.verdict.evidence.get("reason", r.verdict.outcome)) for r in result.rollouts if r.verdict
                }
                fits = fitting_reward(self.held_out[0])
                hint = "" if fits == self.config.reward.use else f"; these problems look made for reward.use = {fits!r}"
                raise DataError(
                    f"none of the {len(self.held_out)} held-out problems can be graded by {self.config.reward.use!r}: {min(reasons)}{hint}"
                    f"; the columns are {columns_found(self.held_out[0].columns)}"
                )
            self.state.before = result.as_dict()
            self.directory.data(self.data)
            self.directory.start(self.state.before)
            self.observer.evaluation(0, result)
            self.health.evaluated(result)
            if self.critic is not None and not self.critic.trained:
                self.critic.start_at(self._base_rate(result.accuracy))
            self.save()
        else:
            if not (self.directory.path / DATA).exists():  # of a version that kept no hashes: from now on they count
                self.directory.data(self.data)
            self.sync(self.state.step)
        self.observer.stage("train", self.config.training.steps, self.state.step)

    def _base_rate(self, otherwise: float) -> float:
        """The share solved of training problems as the first steps will sample them; `otherwise` where none can be graded."""
        began = time.monotonic()
        before = (
            self.curriculum.state_dict()
        )  # the first step begins with the very problems that it would have begun with
        tasks = self.curriculum.sample(min(BASE_RATE_PROBLEMS, 2 * self.config.rollout.prompts))
        self.curriculum.load_state_dict(before)
        rollouts = collect(
            self.engine, self.policy, self.reward, tasks, self.sampling, seed=(self.config.seed, "base rate"),
            truncated=self.config.rollout.truncated, progress=lambda done: self.within("evaluating", done, len(tasks)),
        )  # fmt: skip
        self.state.seconds_evaluating += time.monotonic() - began
        graded = [r.verdict.correct for r in rollouts if r.verdict and not r.verdict.masked]
        return sum(graded) / len(graded) if graded else otherwise

    def within(self, what: str, done: int, total: int) -> None:
        """Progress inside a step: `what` is `sampling`, `judging`, `updating` or `evaluating`."""
        self.observer.within(what, done, total)

    def sync(self, version: int) -> None:
        """Give the engine the learner's weights, those after `version` steps, and make sure that it has them."""
        self.engine.load(self.policy.weights(), version)
        self.fingerprint = self.policy.fingerprint()
        self.canary_gap = self.canary.check(self.engine, self.policy, self.fingerprint)
        self.state.canary_limit = self.canary.limit

    def inspect(self, step: int, gathered: Gathered) -> Gathered:
        """What the monitors make of a step's verdicts, before anything is learnt from them: some may be masked (monitors.action)."""
        m = self.config.monitors
        if not self.monitors.on:
            return gathered
        n = len(gathered.rollouts)
        seen, metrics = self.monitors.inspect(step, gathered.seen, n)
        rollouts, rest = seen[:n], iter(seen[n:])
        if m.work_every and step % m.work_every == 0:
            with contextlib.suppress(RewardError):  # that cannot judge a response that was cut
                kept = without_work(
                    self.engine, self.policy, self.reward, rollouts, self.sampling, self.config.seed, step
                )
                metrics |= self.monitors.work(step, kept)
        thrown_away = [[next(rest) for _ in group] for group in gathered.thrown_away]
        return replace(gathered, rollouts=rollouts, thrown_away=thrown_away, metrics={**gathered.metrics, **metrics})

    def record(
        self,
        step: int,
        gathered: Gathered,
        batch: Batch,
        advantage: Tensor,
        value_B: Tensor | None,
        metrics: dict[str, Any],
    ) -> None:
        """Write the step down; evaluate and checkpoint when it is time."""
        n = len(gathered.rollouts)  # groups that were thrown away are counted, and not written down
        batch, advantage, value_B = batch.first(n), advantage[:n], None if value_B is None else value_B[:n]
        advantage_B, credit = advantage, advantage[batch.keep_B]
        if advantage.dim() == 2:  # each token's own: the mean over each response's tokens
            own_BT = batch.count_BT > 0
            advantage_B = torch.where(own_BT, advantage, 0.0).sum(1) / own_BT.sum(1)
            credit = advantage[own_BT & batch.keep_B[:, None]]
        verdicts = [r.verdict for r in batch.rollouts if r.verdict]
        discarded = [r.verdict for group in gathered.thrown_away for r in group if r.verdict]
        kept = [(v, r.share) for r, v in zip(batch.rollouts, verdicts, strict=True) if not v.masked]
        graded = sum(share for _, share in kept)
        tokens = batch.tokens
        masked = len(batch) - int(batch.keep_B.sum())
        cut = sum(r.finish == "length" for r in batch.rollouts)
        spent = self._clock
        self._clock = {}
        self.state.step = step + 1
        self.state.seconds += sum(spent.values())
        self.state.generated_tokens += tokens + gathered.beside_tokens
        self.state.responses += len(batch)
        self.state.truncated += cut
        self.state.overruled += sum("paid_before_cut" in v.evidence for v in verdicts)
        self.state.masked += masked + sum(v.masked for v in discarded)
        mean_advantage = float(advantage_B[batch.keep_B].mean()) if masked < len(batch) else None
        if mean_advantage is not None and math.isfinite(mean_advantage):
            self.state.advantage += mean_advantage
            self.state.advantage_steps += 1
        metrics = {
            "reward/mean": sum(v.score * share for v, share in kept) / graded if kept else None,
            "reward/spread": max(v.score for v, _ in kept) - min(v.score for v, _ in kept) if kept else None,
            "reward/correct": sum(v.correct * share for v, share in kept) / graded if kept else None,
            "rollout/masked": masked,
            "rollout/beside_tokens": gathered.beside_tokens,
            "rollout/thrown_away": len(gathered.thrown_away),
            "rollout/thrown_away_masked": sum(v.masked for v in discarded),
            "rollout/tokens": tokens,
            "rollout/mean_tokens": float(batch.response_len_B.float().mean()),
            "rollout/truncated": cut / len(batch),
            "rollout/overruled": overruled(verdicts),
            **{f"outcome/{name}": count for name, count in sorted(Counter(v.outcome for v in verdicts).items())},
            **{f"reward/{name}": value for name, value in mean_measures(verdicts).items()},
            "engine/canary_gap": self.canary_gap,
            "data/position": self.curriculum.position,
            "data/passed_over": self.curriculum.passed_over,
            **self.curriculum.metrics(),
            **gathered.metrics,
            "advantage/mean": mean_advantage,
            "advantage/std": float(advantage_B[batch.keep_B].std()) if len(batch) - masked > 1 else None,
            "advantage/size": float(credit.abs().mean()) if len(credit) else None,
            "advantage/variance": float(credit.var()) if len(credit) > 1 else None,
            **metrics,
            **{f"seconds/{name}": seconds for name, seconds in spent.items()},
            "tokens_per_second": tokens / max(sum(spent.values()), 1e-9),
            "memory/rss_bytes": psutil.Process().memory_info().rss,
        }
        self.health.look(metrics, verdicts + discarded)
        metrics |= self.monitors.look(step, batch.rollouts, metrics)
        alerts, notes = self.monitors.fetch()
        for note in notes:
            self.observer.note(note)
        for alert in alerts:
            self.directory.alert(alert.as_dict())
            self.observer.note(f"warning: alert at step {step}: {alert.what} ({alert.why}); {alert.advice}")
            if alert.action == "stop":
                self.interrupted, self.stopped = True, f"alert: {alert.what}"
        position = self.curriculum.position
        last = step + 1 == self.config.training.steps
        every = self.config.evaluation.every
        if last or (every and (step + 1) % every == 0):
            result = self.evaluate()
            self.state.last = {"step": step + 1, **result.as_dict()}
            self.observer.evaluation(step + 1, result)
            if (decided := self.curriculum.hear(result.rollouts, result.samples)) is not None:
                self.observer.note(decided)
            metrics |= {
                "eval/accuracy": self.state.last["accuracy"], "eval/low": result.low, "eval/high": result.high,
                **{f"eval/{name}": value for name, value in result.measures.items()},
                **{f"eval/{who}_{key}": found[key] for who, found in result.calibration.items() for key in ("ece", "brier", "auc", "aurc")},
                "eval/mean_tokens": result.mean_tokens, "eval/entropy": result.entropy,
                **{f"eval/{name}": value for name, value in result.pass_at_k.items()}, "critic/ev_ceiling": self._ceiling(result),
            }  # fmt: skip
        self.directory.record(
            step, batch.rollouts, None if value_B is None else value_B.tolist(), advantage_B.tolist(),
            self.learner.trace.log_ratio_BT[:n].tolist(), self.learner.trace.clipped_B[:n].tolist(),
        )  # fmt: skip
        self.directory.metrics(step, metrics)
        self.directory.seal(
            step,
            {
                "recipe_sha256": self.config.sha256, "seed": self.config.seed, "data_position": position,
                "policy_fingerprint": self.fingerprint, "verifier_sha256": self.verifier,
            },
        )  # fmt: skip
        self.trackers.log(step, metrics)
        self.observer.step(step + 1, metrics)
        if last or self.interrupted or (step + 1) % self.config.run.checkpoint_every == 0:
            self.save()

    def finish(self) -> dict[str, Any]:
        """Write and return the summary."""
        after = self.state.last  # of the last evaluation; empty when a run was interrupted before one
        done = self.state.step >= self.config.training.steps
        evaluated = {"before": self.state.before, "after": after}
        summary = {
            "accuracy_before": self.state.before.get("accuracy"),
            "accuracy_before_low": self.state.before.get("low"),
            "accuracy_before_high": self.state.before.get("high"),
            "accuracy_after": after.get("accuracy"),
            "accuracy_after_low": after.get("low"),
            "accuracy_after_high": after.get("high"),
            "evaluated_after_step": after.get("step"),
            **{f"entropy_{when}": found.get("entropy") for when, found in evaluated.items()},
            **{f"pass_at_k_{when}": found.get("pass_at_k") for when, found in evaluated.items()},
            "mean_advantage": self.state.advantage / self.state.advantage_steps if self.state.advantage_steps else None,
            "steps": self.state.step,
            "seconds": self.state.seconds,
            "seconds_bootstrap": self.state.seconds_bootstrap,
            "seconds_evaluating": self.state.seconds_evaluating,
            "generated_tokens": self.state.generated_tokens,
            "masked": self.state.masked,
            "truncated": self.state.truncated / max(self.state.responses, 1),
            "overruled": self.state.overruled / max(self.state.responses, 1),
            "alerts": sorted(self.monitors.raised, key=self.monitors.raised.__getitem__),
            "passed_over": self.curriculum.passed_over,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "seed": self.config.seed,
            "recipe_sha256": self.config.sha256,
            "policy_sha256": self.policy.sha256(),
            "stopped": "finished" if done else self.stopped or "interrupted",
            "policy": str(self.directory.checkpoints()[-1] / "policy") if self.directory.checkpoints() else None,
        }
        self.directory.summary(summary)
        self.trackers.close(summary)
        return summary

    def close(self) -> None:
        """Let go of the run directory and the reward's processes."""
        try:
            self.engine.close()
        finally:
            self.reward.close()
            self.monitors.close()
            self.trackers.close({})  # a run that failed
            self.directory.close()

    def evaluate(self, tasks: list[Task] | None = None) -> Evaluation:
        """The held-out (or given) problems, with the current weights; its time is kept apart from training's."""
        began = time.monotonic()
        e = self.config.evaluation
        sampling = Sampling.of(self.config.rollout, e.temperature)
        problems = tasks or self.held_out
        result = evaluate(
            self.engine,
            self.policy,
            self.reward,
            problems,
            sampling,
            samples=e.samples,
            seed=self.config.seed,
            checker=self.step_checker,
            critic=self.critic if tasks is None and self.config.critic_reads == "prompt" else None,
            keep_cut=self.config.rollout.truncated == "keep",
            progress=lambda done: self.within("evaluating", done, len(problems) * e.samples),
        )
        self.state.seconds_evaluating += time.monotonic() - began
        return result

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Time a phase of the step."""
        began = time.monotonic()
        yield
        if self.tight and name == "rollout":
            give_back()
        self._clock[name] = self._clock.get(name, 0.0) + time.monotonic() - began

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """When the reward fails for good, the run is saved as it was before this step: mended, it goes on from there."""
        before = self.curriculum.state_dict()
        try:
            yield
        except RewardError as error:
            self.curriculum.load_state_dict(before)
            if self.state.step:
                self.save()
            how = f"sppo train --resume {self.directory.path}"
            if self.config.reward.use == GIVEN:
                how = "train again with resume_from_checkpoint=True"
            raise RewardError(f"{error}; step {self.state.step} is saved: mend the reward, then {how}") from error

    def interrupt(self) -> None:
        """Finish the step, save, and stop."""
        self.interrupted = True

    def _ceiling(self, result: Evaluation) -> float | None:
        """The explained variance that a perfect critic would reach on the held-out problems; needs two samples each."""
        k = result.samples
        scores = [r.verdict.correct if r.verdict and not r.verdict.masked else None for r in result.rollouts]
        rows = [scores[i : i + k] for i in range(0, len(scores), k)]
        whole = [row for row in rows if None not in row]
        return explained_variance_ceiling(torch.tensor(whole)) if whole and k > 1 else None

    def save(self) -> None:
        """Write a complete checkpoint, atomically."""
        always = frozenset({0}) if self.config.needs_reference else frozenset()
        with self.directory.new_checkpoint(self.state.step, self.config.run.keep, always) as folder:
            checkpoint.save(folder, self.state, self.learner, self.curriculum, self.monitors)
