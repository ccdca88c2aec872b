"""Training from Python: `SPPOTrainer` and `SPPOConfig`, shaped like TRL's trainers.

    trainer = SPPOTrainer(model="HuggingFaceTB/SmolLM2-135M-Instruct", reward_funcs=my_reward, train_dataset=rows,
                          args=SPPOConfig(output_dir="runs/mine", max_steps=100))
    trainer.train()

The same loop, files and guarantees as `sppo train`; objects given here are not named in the recipe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .environments.loading import given_environment
from .errors import DataError, ModelError, RecipeError, UserError
from .recipe.config import Config
from .report.progress import ProgressDisplay
from .rewards.base import Reward
from .rewards.loading import load_reward
from .rewards.user_reward import LIMIT
from .run.build import Components
from .run.loop import train
from .run.models import Models, Parts
from .run.run import Run
from .spec import GIVEN
from .tasks.base import HELD_OUT, ListSource, TaskSource, in_split, with_instruction
from .tasks.loading import load_pair, load_tasks
from .tasks.records import tasks_from
from .trl_names import translated

RewardLike = str | Callable[..., Any] | Reward


def _by_trl_names(cls: type) -> type:
    """Make a settings class also accept TRL's names that it has no field for (trl_names.py); they become keys of its `recipe`."""
    by_fields = cls.__init__  # type: ignore[misc]
    names = [f.name for f in fields(cls)]

    @functools.wraps(by_fields)
    def initialise(self: Any, *args: Any, **settings: Any) -> None:
        others = {name: settings.pop(name) for name in list(settings) if name not in names}
        by_fields(self, *args, **settings)
        if others:
            self.recipe = translated(others, names) | dict(self.recipe)

    cls.__init__ = initialise  # type: ignore[misc]
    return cls


@_by_trl_names
@dataclass
class SPPOConfig:
    """Settings under the names that other trainers use. Anything else goes into `recipe`, by dotted key.

    `SPPOConfig(max_steps=50, recipe={"objective.ratio": "token", "critic.model": "tiny"})`

    Arguments of TRL's GRPOConfig that have an exact equivalent are accepted (`bf16=True`, `use_vllm=True`, `weight_decay=0.1`); for the others a
    RecipeError names ours.

    `beta` weighs TRL's KL to the start (k3 of each token times its ratio, averaged as the loss is; without the ratio, which is GRPO's own, with
    `use_bias_correction_kl=False`), and `entropy_coef` its entropy bonus; what `recipe` says of `objective.kl_form` and `kl_level` wins.

    `reward_weights`: one for each of `reward_funcs`. The score is their mean by these weights; 0 measures a reward and pays nothing.
    """

    output_dir: str = "runs/sppo"
    seed: int = 1
    max_steps: int | None = None
    prompts_per_step: int | None = None
    num_generations: int | None = None
    num_minibatches: int | None = None
    num_iterations: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    learning_rate: float | None = None
    critic_learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    warmup_steps: int | None = None
    max_grad_norm: float | None = None
    gradient_checkpointing: bool | None = None
    beta: float | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    report_to: str | list[str] | None = None
    reward_weights: Sequence[float] | None = None
    resume_from_checkpoint: bool = False
    disable_progress: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def overrides(self) -> dict[str, Any]:
        """These settings as recipe keys."""
        names = {
            "max_steps": "training.steps", "prompts_per_step": "rollout.prompts", "num_generations": "rollout.samples",
            "num_minibatches": "training.minibatches", "num_iterations": "training.epochs",
            "max_prompt_length": "task.max_prompt_tokens", "max_completion_length": "rollout.max_tokens",
            "temperature": "rollout.temperature", "top_k": "rollout.top_k", "top_p": "rollout.top_p", "min_p": "rollout.min_p",
            "gradient_checkpointing": "training.checkpoint_activations", "learning_rate": "training.lr", "critic_learning_rate": "training.critic_lr",
            "lr_scheduler_type": "training.schedule", "warmup_steps": "training.warmup", "max_grad_norm": "training.max_grad_norm",
            "beta": "objective.kl", "eval_steps": "evaluation.every", "save_steps": "run.checkpoint_every",
        }  # fmt: skip
        out: dict[str, Any] = {"run.out": self.output_dir, "seed": self.seed}
        out |= {key: getattr(self, name) for name, key in names.items() if getattr(self, name) is not None}
        if self.beta:
            out |= {"objective.kl_form": "k3-weighted", "objective.kl_level": "token"}
        if (given := out.get("training.schedule")) is not None:
            schedule = getattr(given, "value", given)  # TRL's are members of an enumeration
            out["training.schedule"] = "constant" if schedule == "constant_with_warmup" else schedule
        if self.epsilon is not None or self.epsilon_high is not None:
            low = 0.2 if self.epsilon is None else self.epsilon
            out["objective.clip"] = [low, low if self.epsilon_high is None else self.epsilon_high]
        if self.report_to is not None:
            if not isinstance(self.report_to, str | list | tuple):
                raise RecipeError(f"report_to = {self.report_to!r}: name a tracker or a list of them, or 'none'")
            named = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
            out["run.trackers"] = [] if named == ["none"] else named
        return out | dict(self.recipe)


class SPPOTrainer:
    """Sequence-level PPO on a model, problems and a verifier.

    Args:
        model: a folder, a hub name, `tiny:…`, or a loaded causal LM (then `processing_class` is its tokenizer). A folder may
            hold an adapter, and a loaded model may be a PeftModel: its adapter is trained, in the model's dtype.
        reward_funcs: a callable `f(prompts, completions, **columns) -> list[float | None]`, an object with
            `judge(rollouts)`, the name of a built-in (`answer`, `math`, `gym`) or of your own (`package.module:object`), or a list of
            these (their mean, weighted by `SPPOConfig(reward_weights=[…])`; the first is the critic's target).
        train_dataset: a `datasets.Dataset`, any iterable of rows, a file or a task spec such as `chain:steps=3`.
        eval_dataset: the same, held out; by default a tenth of the training rows, chosen by the hash of the prompt.
        critic: a folder, a hub name, `tiny:…`, or a (backbone, tokenizer) pair; a tiny one by default. "policy": a second
            adapter on the policy's frozen weights.
        args: settings.
        processing_class: the tokenizer of a loaded model.
        peft_config: a LoraConfig: train such an adapter, and leave the model's own weights as they are.
        quantization_config: a BitsAndBytesConfig for a model that is named: `load_in_8bit`, or four bits as QLoRA has
            them (`nf4`, double quantisation); needs `peft_config`.
        tools: functions with types and a docstring that the policy may call, or classes whose public methods are tools.
        environment_factory: what makes an object for each trajectory, as TRL has it: its public methods are tools,
            `reset(**row)` may return a text that is added to the prompt, and `get_reward()` pays where no `reward_funcs`
            are given, which may read the objects as `environments`.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardLike | list[RewardLike] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        critic: Any = None,
        args: SPPOConfig | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Callable[[], Any] | None = None,
    ) -> None:
        self.args = args or SPPOConfig()
        changes = self.args.overrides()
        weights = self.args.reward_weights
        if train_dataset is None:
            raise DataError("train_dataset is missing: rows, a file, or a task such as 'chain:steps=3'")
        if reward_funcs is None:
            if not callable(getattr(environment_factory, "get_reward", None)):
                raise RecipeError(
                    "reward_funcs is missing, and environment_factory has no get_reward() that would pay instead"
                )
            reward_funcs = "environment"
        if tools or environment_factory is not None:
            changes["environment.use"] = GIVEN
        self.parts = Parts(reward=_reward(reward_funcs, float(changes.get("reward.limit", LIMIT)), weights))
        changes["reward.use"] = reward_funcs if isinstance(reward_funcs, str) else GIVEN
        if isinstance(model, str):
            changes["policy.model"] = model
        elif processing_class is None:
            raise ModelError("a loaded model needs its tokenizer: pass processing_class=tokenizer")
        else:
            changes["policy.model"], self.parts.policy = GIVEN, (model, processing_class)
        if isinstance(critic, str):
            changes["critic.model"] = critic
        elif critic is not None:
            changes["critic.model"], self.parts.critic = GIVEN, critic
        changes |= self._adapter(model, changes, peft_config, quantization_config)
        changes["task.train"] = train_dataset if isinstance(train_dataset, str) else GIVEN
        if eval_dataset is not None:
            changes["task.eval"] = eval_dataset if isinstance(eval_dataset, str) else GIVEN
        self.config = Config.load(None, changes)
        if tools or environment_factory is not None:
            self.parts.environment = given_environment(tools or (), environment_factory, self.config.environment)
        self.parts.train, self.parts.evaluation = self._sources(train_dataset, eval_dataset)
        self.run: Run | None = None
        self._loaded: Models | None = None
        self.summary: dict[str, Any] | None = None

    def _adapter(
        self, model: Any, changes: Mapping[str, Any], peft_config: Any, quantization_config: Any
    ) -> dict[str, Any]:
        """The keys of a recipe for what peft and bitsandbytes are to do. Raises ModelError where they cannot."""
        from .models.adapters import need_peft, section_of

        given = getattr(model, "active_peft_config", None)  # of a PeftModel
        if given is not None and (peft_config is not None or any(key.startswith("adapter.") for key in changes)):
            raise ModelError(
                "model is a PeftModel, whose own adapter is trained: leave peft_config (and recipe's 'adapter.…') out, or "
                "give model.merge_and_unload()"
            )
        out = {} if quantization_config is None else {"policy.quantize": _quantize(model, quantization_config)}
        if peft_config is not None:
            need_peft("peft_config")
            if not hasattr(peft_config, "peft_type"):
                raise ModelError(f"peft_config is a {type(peft_config).__name__}; give peft's LoraConfig")
            self.parts.adapter, given = peft_config, peft_config
        section = {} if given is None else section_of(given).model_dump()
        return out | {f"adapter.{key}": value for key, value in section.items()}

    def train(self) -> dict[str, Any]:
        """Train; returns the summary (`accuracy_before`, `accuracy_after`, …). `policy`, `tokenizer` then hold the result."""
        display = ProgressDisplay(quiet=self.args.disable_progress)
        path, self._loaded = Path(self.config.run.out), None
        try:
            if self.args.resume_from_checkpoint and (path / "recipe.toml").exists():
                self.run = Run.resume(path, display, self.parts, steps=self.args.max_steps)
                display.note(
                    "warning: resuming with the run's own recipe; of the settings given here only max_steps counts"
                )
            else:
                self.run = Run.new(self.config, display, self.parts)
            self.summary = train(self.run)
        finally:
            display.stop()
            if self.run is not None:
                self.run.close()
        return self.summary

    @property
    def policy(self) -> Any:
        """The trained transformers model; with an adapter the PeftModel around it."""
        policy = self._trained().policy
        return policy.model if policy.adapters is None else policy.adapters.peft

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._trained().policy.tokenizer

    def predicted_chance(self, prompts: Iterable[str | Sequence[Mapping[str, str]] | Mapping[str, Any]]) -> list[float]:
        """The critic's predicted chance that the policy solves each problem, in order.

        A problem is a question (text), chat messages, or a row as those of `train_dataset`; `task.instruction` is added as in training.
        Raises UserError where there is no critic that reads prompts, DataError for what is no problem.
        """
        critic = self._trained().critic
        if critic is None or self.config.critic_reads != "prompt":
            raise UserError(
                f"objective.algorithm = {self.config.objective.algorithm!r} trains no critic that reads prompts"
            )
        if isinstance(prompts, str | Mapping):
            raise DataError("predicted_chance takes a list of problems, not one: write predicted_chance([problem])")
        tasks = tasks_from(_numbered(map(_as_row, prompts), "prompts"), "prompts")
        source = with_instruction(ListSource(tasks), self.config.task.instruction)
        asked = [source[i] for i in range(len(source))]
        for number, task in enumerate(asked, 1):
            length = len(critic.prompt_ids(task))
            if not 0 < length <= (critic.context or length):
                raise DataError(f"prompts:{number}: it has {length} tokens; the critic reads 1 to {critic.context}")
        return critic.logits(asked).sigmoid().tolist()

    def save_model(self, folder: str) -> None:
        """Write policy and tokenizer as an ordinary model folder; an adapter as one that `PeftModel.from_pretrained`
        loads (`sppo export --merged` writes its sum with the model's weights)."""
        self._trained().policy.save(Path(folder))

    def _trained(self) -> Components | Models:
        """What was trained: policy and critic."""
        if self.run is None:
            raise UserError("call train() first")
        c = self.run.components
        if c.config.cluster is None:
            return c
        if self._loaded is None:  # its ranks have ended: from the newest checkpoint
            base, saved = c.directory.path / "base", c.directory.checkpoints()
            if not saved:
                raise UserError("nothing is saved of this run yet")
            self._loaded = Models(c.config, Parts(), saved[-1], lambda said: None, base=base)
        return self._loaded

    def _sources(self, train_rows: Any, eval_rows: Any) -> tuple[TaskSource, TaskSource]:
        """(training, held-out) sources from rows or specs; without held-out rows a tenth of the training rows is held out, by hash."""
        instruction, columns = self.config.task.instruction, self.config.task.columns
        if isinstance(train_rows, str) and (eval_rows is None or isinstance(eval_rows, str)):
            return load_pair(train_rows, eval_rows, instruction, columns)
        held_out = _source(eval_rows, "eval_dataset", instruction, columns) if eval_rows is not None else None
        if held_out is not None:
            return _source(train_rows, "train_dataset", instruction, columns), held_out
        tasks = tasks_from(_numbered(train_rows, "train_dataset"), "train_dataset", columns)
        train, rest = ([t for t in tasks if in_split(t.text, split)] for split in ("train", "held-out"))
        if not train or not rest:
            raise DataError(
                f"train_dataset has {len(tasks)} rows, too few to hold {HELD_OUT:.0%} out; pass eval_dataset"
            )
        return with_instruction(ListSource(train), instruction), with_instruction(ListSource(rest), instruction)


def _quantize(model: Any, config: Any) -> str:
    """`policy.quantize` for a BitsAndBytesConfig. Raises ModelError where the recipe has no equal."""
    if not isinstance(model, str):
        raise ModelError("quantization_config is for models that are named; load the given model quantised instead")
    if getattr(config, "load_in_8bit", False):
        return "int8"
    if getattr(config, "bnb_4bit_quant_type", "") == "nf4" and config.load_in_4bit and config.bnb_4bit_use_double_quant:
        return "nf4"
    raise ModelError(
        "quantization_config must be BitsAndBytesConfig(load_in_8bit=True), or load_in_4bit=True, bnb_4bit_quant_type="
        "'nf4', bnb_4bit_use_double_quant=True; for another, load the model with it and pass model=…"
    )


def _as_row(problem: Any) -> Any:
    """A question or chat messages as a row of data; a row as it is."""
    if isinstance(problem, str):
        return {"question": problem}
    return {"prompt": list(problem)} if isinstance(problem, Sequence) else problem


def _numbered(rows: Any, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            hint = f" (a DatasetDict? pass one of its splits, {list(rows)})" if isinstance(rows, Mapping) else ""
            raise DataError(f"{name}:{number}: a row must be a mapping of columns, not {type(row).__name__}{hint}")
        yield number, row


def _source(rows: Any, name: str, instruction: str, columns: Mapping[str, str] | None) -> TaskSource:
    if isinstance(rows, str):
        return load_tasks(rows, instruction=instruction, columns=columns)
    return with_instruction(ListSource(tasks_from(_numbered(rows, name), name, columns)), instruction)


def _reward(rewards: RewardLike | list[RewardLike], limit: float, weights: Sequence[float] | None) -> Reward:
    from .rewards.combine import MixedReward, Part

    several = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not several:
        raise UserError("reward_funcs is empty; give at least one reward")
    checked = _weights(weights, len(several))
    loaded = [load_reward(r, limit) for r in several]
    if len(loaded) == 1:
        return loaded[0]
    names = [r if isinstance(r, str) else getattr(r, "__name__", type(r).__name__) for r in several]
    return MixedReward([Part(n, r, weight=w) for n, r, w in zip(names, loaded, checked, strict=True)])


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """Raises UserError where they are not one number of 0 or more for each reward."""
    found = [1.0] * n if weights is None else [float(w) if isinstance(w, int | float) else math.nan for w in weights]
    if len(found) != n:
        raise UserError(f"reward_weights has {len(found)} weights for {n} rewards (reward_funcs); give one each")
    if not all(0 <= w < math.inf for w in found):
        raise UserError(
            f"reward_weights = {list(weights or [])}: a weight is a number of 0 or more (0: measured, pays nothing)"
        )
    if not sum(found):
        raise UserError("reward_weights: at least one weight must be above 0")
    return found
