"""From a recipe to everything that a run is made of, in one place: `build` says what it chose, and refuses what cannot work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..audit.monitors import Monitors
from ..audit.verifier import verifier_sha256
from ..environments.base import Maker
from ..environments.loading import load_environment
from ..errors import RecipeError
from ..evaluation.evaluate import held_out_tasks
from ..evaluation.step_quality import step_checker
from ..learning.learner import Learner
from ..memory import keep_memory
from ..models.critic import Critic
from ..models.mlp import ControlPolicy
from ..models.policy import Policy
from ..recipe.config import Config
from ..rewards.base import KEPT, Reward
from ..rewards.combine import MixedReward, adds
from ..rewards.loading import load_reward
from ..rewards.steps import Checker
from ..rollout.engine import Engine, Sampling
from ..tasks.base import TaskSource
from ..tasks.loading import load_pair
from ..threads import fitted
from ..types import Task
from .curriculum import Uniform, curriculum
from .directory import RunDirectory
from .models import Models, Note, Parts, one_control_task
from .observer import Observer
from .plan import Plan
from .prompts import PromptLimit, shown_prompt, typical_prompt
from .provenance import data_of, must_be_the_same
from .warnings import Warnings


@dataclass(frozen=True)
class Components:
    """What a run is made of. None of these is replaced while it runs; weights and positions change inside them."""

    config: Config
    """The resolved recipe: nothing in it is left open."""
    observer: Observer
    directory: RunDirectory
    data: Mapping[str, Mapping[str, str]]
    """Path and SHA-256 of each file of rows (provenance.py)."""
    environment: Maker
    reward: Reward
    verifier: str
    """The SHA-256 of the reward's code (audit/verifier.py)."""
    monitors: Monitors
    models: Models
    policy: Policy
    critic: Critic | None
    """The two of `models`."""
    plan: Plan | None
    """Of memory (plan.py); None for networks of a few thousand weights."""
    engine: Engine
    sampling: Sampling
    warnings: Warnings
    prompt_limit: PromptLimit
    train_tasks: TaskSource
    held_out: Sequence[Task]
    """The problems of every evaluation."""
    curriculum: Uniform
    checker: Checker | None
    """Checks the steps of a response, where these tasks or this reward can."""

    @property
    def tight(self) -> bool:
        """Whether freed memory goes back to the machine at once."""
        return self.plan is not None and self.plan.tight


def build(config: Config, directory: RunDirectory, observer: Observer, parts: Parts, saved: Path | None) -> Components:
    """The components of a new run, or of one that goes on from the checkpoint `saved`.

    Raises a UserError before anything expensive where the recipe cannot be obeyed.
    """
    keep_memory()
    torch.set_num_threads(config.run.threads or fitted(torch.get_num_threads()))
    note = observer.note
    config = _settled(config, note)
    environment, reward = parts.environment or load_environment(config.environment), _reward(config, parts)
    train_tasks, eval_tasks = _tasks(config, parts)
    data = data_of(config)
    must_be_the_same(directory.path, data)
    if not config.reward.workers:
        reward.check(train_tasks[0])  # raises where this machine cannot judge its kind at all
    if callable(keep := getattr(reward, "keep", None)):
        keep(directory.path / KEPT)
    if saved is None and callable(begin := getattr(reward, "begin", None)):
        begin([train_tasks[i] for i in range(min(len(train_tasks), 3))], note)
    models = _models(config, directory.path, parts, saved, note)
    with contextlib.ExitStack() as undo:
        undo.callback(models.close)
        made = _around(models, directory, observer, saved, environment, reward, (train_tasks, eval_tasks), data)
        undo.pop_all()
    return made


def _around(
    models: Models,
    directory: RunDirectory,
    observer: Observer,
    saved: Path | None,
    environment: Maker,
    reward: Reward,
    tasks: tuple[TaskSource, TaskSource],
    data: Mapping[str, Mapping[str, str]],
) -> Components:
    """The components of a run with these models; `tasks` are training and held-out problems."""
    note, (train_tasks, eval_tasks) = observer.note, tasks
    config, policy, critic = models.config, models.policy, models.critic
    one_control_task(config, policy, critic)
    prompt = typical_prompt(train_tasks, lambda task: len(policy.prompt_ids(task)), config.task.max_prompt_tokens)
    config, planned = models.planned(config, prompt, note)
    if saved is None:
        config = models.rated(config)
    judging = models.judging(reward, train_tasks[0])
    engine = models.engine(config)
    if engine.stated:
        note(engine.stated)
    sampling = Sampling.of(config.rollout)
    warnings = Warnings(config, sampling, note)
    warnings.before()
    monitors = Monitors(config.monitors, judging, config.seed, config.reward.limit)
    limit = PromptLimit(config, policy, critic, engine.context)
    held_out = _usable(config, train_tasks, eval_tasks, limit, note)
    if not isinstance(policy, ControlPolicy):
        note(shown_prompt(policy, held_out[0]))
    problems = curriculum(
        config.curriculum, train_tasks, config.seed, limit, critic, held_out, config.training.micro_budget
    )
    return Components(
        config=config, observer=observer, directory=directory, data=data, environment=environment, reward=judging, verifier=verifier_sha256(judging),
        monitors=monitors, models=models, policy=policy, critic=critic, plan=planned, engine=engine, sampling=sampling, warnings=warnings,
        prompt_limit=limit, train_tasks=train_tasks, held_out=held_out, curriculum=problems,
        checker=step_checker(config.task.eval or config.task.train, held_out[0], reward),
    )  # fmt: skip


def _settled(config: Config, note: Note) -> Config:
    """The recipe with `auto` replaced by what it stands for; says which ratio that is, and which keys have no effect."""
    config, ratio = config.settled()
    for why in config.without_effect():
        note(f"warning: {why}")
    note(f"algorithm {config.objective.algorithm}, {ratio}")
    return config


def _models(config: Config, path: Path, parts: Parts, saved: Path | None, note: Note) -> Models:
    """The models: in this process, or on the ranks of a cluster."""
    if config.cluster is None:
        return Models(config, parts, saved, note, base=path / "base")
    from .on_cluster import OnCluster  # which needs Ray

    return OnCluster(config, parts, saved, note, run=path)


def _reward(config: Config, parts: Parts) -> Reward:
    reward = parts.reward or load_reward(config.reward.use, config.reward.limit, elsewhere=config.reward.workers > 0)
    if config.reward.anneal and not (isinstance(reward, MixedReward) and adds(reward.parts)):
        raise RecipeError(
            f"reward.anneal fades what is added to a reward, and reward.use = {config.reward.use!r} adds nothing"
        )
    return reward


def _tasks(config: Config, parts: Parts) -> tuple[TaskSource, TaskSource]:
    """Training and held-out problems."""
    if parts.train is not None and parts.evaluation is not None:
        return parts.train, parts.evaluation
    return load_pair(config.task.train, config.task.eval, config.task.instruction, config.task.columns)


def _usable(
    config: Config, train_tasks: TaskSource, eval_tasks: TaskSource, limit: PromptLimit, note: Note
) -> list[Task]:
    """The held-out problems that can be used; says which rows are left out. Raises RecipeError where no problem remains."""
    for which, source in (("training", train_tasks), ("held-out", eval_tasks)):
        if refused := limit.refusals(source):
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            note(f"warning: {len(refused)} of {len(source)} {which} rows are left out: {refused[0]}{more}")
    chosen = held_out_tasks(eval_tasks, config.evaluation.n)
    usable = [t for t in chosen if limit(t) is None]
    if not usable:
        raise RecipeError(f"no held-out problem can be used: {chosen[0].id}: {limit(chosen[0])}")
    if len(usable) < len(chosen):
        left_out = len(chosen) - len(usable)
        note(f"{left_out} of {len(chosen)} held-out prompts are over the limit or refused, and left out")
    return usable


def make_learner(c: Components, saved: Path | None) -> Learner:
    """The learner of these models as they are now."""
    learner = c.models.learner(c.config, c.directory.path, saved, tight=c.tight)
    learner.progress = partial(c.observer.within, "updating")
    return learner
