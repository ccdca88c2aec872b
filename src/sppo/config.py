"""The whole recipe as one validated tree: sections in the order in which data flows, unknown keys refused.

A recipe is TOML; `--section.key VALUE` on the command line overrides one key, through the same validation. Every
key's description is its help text. This module imports no torch, so that `sppo train --help` answers at once.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .algorithms import PRESETS, preset, with_algorithm
from .errors import RecipeError
from .spec import nearest, scalar


class Section(BaseModel):
    """One table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicySection(Section):
    """The model that is trained."""

    model: str = Field(
        "tiny",
        description="a model folder, a hub name, or 'tiny:hidden=128,layers=3,heads=4' (made here, from scratch)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="weights during rollouts and updates; auto: bfloat16 for 50M parameters or more on hardware that "
        "multiplies it natively, else float32 (master weights, head and log-softmax are always float32)",
    )
    chat_template: Literal["auto", "off"] = Field(
        "auto", description="auto: chat messages go through the tokenizer's template if it has one; off: plain text"
    )


class CriticSection(Section):
    """The prompt-only value model V(x): any family, any size, its own tokenizer."""

    model: str = Field(
        "tiny:hidden=64,layers=2,heads=4", description="as policy.model; any transformers model, encoder or decoder"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="as policy.dtype")


class TaskSection(Section):
    """Which problems."""

    train: str = Field("chain:steps=4-6", description="training problems: 'name:key=value,…' or a .jsonl/.parquet file")
    eval: str | None = Field(
        None, description="held-out problems; default: the held-out share of the training problems"
    )
    instruction: str = Field("", description="text added after every question, e.g. how to mark the answer")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are left out and counted, never cut")


class RewardSection(Section):
    """What judges a response."""

    use: str = Field(
        "answer",
        description="a file of rewards/ with options ('answer:extract=boxed', 'math', 'code'), package.module:object, or several: "
        "'code + 0.2 * mine:style', 'math and mine:checked', 'math gate mine:format'",
    )
    limit: float = Field(
        600.0,
        gt=0,
        description="seconds that one call of your own reward may take; then its samples are judged one by one, and masked where they hang",
    )


class BootstrapSection(Section):
    """A supervised start on worked solutions; a recipe without this section starts from the model as it is."""

    task: str | None = Field(None, description="problems with worked solutions; default: the training problems")
    steps: int = Field(300, ge=1, description="optimiser updates, at most")
    until: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="stop as soon as this share of training problems is solved: reinforcement needs some success, not all",
    )
    batch: int = Field(64, ge=1, description="solutions an update")
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate; default by size: 2e-3 below 10M parameters, 1e-4 below 1B, 1e-5 above",
    )
    warmup: int = Field(50, ge=0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")


class RolloutSection(Section):
    """How responses are sampled."""

    engine: str = Field(
        "local",
        description="what samples: 'local' (here, on the learner's weights), 'vllm:key=value,…', or package.module:object",
    )
    prompts: int = Field(128, ge=1, description="prompts a step")
    samples: int = Field(1, ge=1, description="responses a prompt; SPPO needs one, group baselines two or more")
    resample: int = Field(
        0,
        ge=0,
        description="replace prompts whose samples all score the same, in at most so many more rounds (DAPO's dynamic sampling); 0: keep them",
    )
    max_tokens: int = Field(256, ge=1, description="response limit, EOS included")
    temperature: float = Field(1.0, gt=0, description="divides the logits in rollouts and in every log-probability")
    top_k: int = Field(0, ge=0, description="draw among so many of the likeliest tokens; 0: all of them")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw among the fewest tokens that hold this much of the probability; 1: all of them",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="draw among tokens at least so many times as likely as the likeliest; 0: all of them",
    )
    stop: tuple[str, ...] = Field(
        (), description="a response ends once it holds one of these strings; EOS always ends it"
    )
    batch: int = Field(128, ge=1, description="sequences decoded together; changes speed and memory, not the samples")
    truncated: Literal["penalise", "mask"] = Field(
        "penalise", description="a response cut at max_tokens scores 0, or is masked and leaves every denominator"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every response at once")
        return value


class ObjectiveSection(Section):
    """The clipped sequence-level surrogate, or a peer's."""

    algorithm: str = Field(
        "sppo",
        description="a preset for the keys below and rollout.samples, where they are not given: " + ", ".join(PRESETS),
    )
    baseline: Literal["critic", "beta", "regressed", "token-critic", "batch", "others", "group", "greedy"] = Field(
        "critic",
        description="what the reward is compared with: V(x); beta: V(x) with the prompt's past and other samples; regressed: V(x) as a control "
        "variate; token-critic: a value for every token and GAE; batch, others, group: the mean of the batch's other rewards, of the prompt's "
        "other samples, of all its samples; greedy: the greedy response's reward",
    )
    scale: Literal["none", "group", "batch"] = Field(
        "none",
        description="divide the advantage by the deviation of its group's rewards, or whiten it over the batch (both biased)",
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of baseline = 'token-critic'")
    half_life: float = Field(
        1.0, gt=0, description="of baseline = 'beta': nats by which the policy moves until a past reward counts half"
    )
    surrogate: Literal["clip", "cispo", "plain"] = Field(
        "clip",
        description="clip: PPO's; cispo: a clipped weight on the log-probability; plain: the log-probability alone (REINFORCE)",
    )
    average: Literal["auto", "tokens", "responses", "constant"] = Field(
        "auto",
        description="what a loss of token ratios averages over: all tokens (auto), each response's tokens and then responses, or "
        "responses times rollout.max_tokens; sequence ratios: responses (auto)",
    )
    ratio: Literal["sequence", "geometric", "token", "family"] = Field(
        "sequence", description="importance ratio: exp(l), exp(l/T) (GSPO), per token, or exp(l/T^kappa)"
    )
    kappa: float = Field(0.5, ge=0, le=1, description="the family's exponent; 0 is sequence, 1 is geometric")
    clip: tuple[float, float] = Field((0.2, 0.2), description="[low, high]: the ratio is clipped to [1-low, 1+high]")
    dual_clip: float = Field(
        3.0, ge=0, description="bound on the ratio where the advantage is negative; 0 turns it off"
    )
    anchor: Literal["behaviour", "reference"] = Field(
        "behaviour",
        description="the ratio's denominator: the sampling policy (exact), or the frozen start (see docs/algorithm.md)",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL to the frozen start; 0 holds no reference model")
    kl_form: Literal["reward", "k2", "k3"] = Field(
        "reward",
        description="reward: exact, inside the reward; k2: exact reverse-KL gradient on policy; k3: gradient of KL(ref||policy)",
    )
    ev_gate: bool = Field(
        False,
        description="use the mean of the other rewards instead of V(x) while V explains no variance (arXiv 2604.19485)",
    )
    engine_correction: float = Field(
        2.0, ge=0, description="cap of the importance weight that corrects engine-learner mismatch; 0 turns it off"
    )
    engine_gap_limit: float = Field(
        0.1,
        gt=0,
        description="stop when engine and learner log-probabilities differ by more than this a token, on average",
    )

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be above 1, or 0 to turn it off")
        return value

    @field_validator("clip")
    @classmethod
    def _clip_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (0 < low <= 1 and high > 0):
            raise ValueError("low must lie in (0, 1] and high above 0")
        return value

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(nearest(value, list(PRESETS)))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ObjectiveSection:
        if self.baseline == "token-critic" and self.ratio != "token":
            raise ValueError("baseline = 'token-critic' gives every token an advantage of its own: set ratio = 'token'")
        if self.average != "auto" and self.ratio != "token":
            raise ValueError(
                f"average = {self.average!r} is about tokens, and ratio is {self.ratio!r}: set ratio = 'token' (or leave it to the preset of "
                f"algorithm = {self.algorithm!r}), or average = 'auto'"
            )
        if self.ev_gate and self.baseline != "critic":
            raise ValueError("ev_gate is about baseline = 'critic'")
        return self


class TrainingSection(Section):
    """The update."""

    steps: int = Field(200, ge=1, description="rollout-and-update steps")
    minibatches: int = Field(2, ge=1, description="optimiser updates an epoch over one step's rollouts")
    epochs: int = Field(1, ge=1, description="passes over one step's rollouts")
    lr: float | None = Field(
        None,
        gt=0,
        description="policy learning rate; default by size: 2e-4 below 10M parameters, 1e-5 below 1B, the paper's 1e-6 above",
    )
    critic_lr: float | None = Field(
        None,
        gt=0,
        description="critic learning rate; default by size: 1e-3 below 10M parameters, 5e-5 below 1B, the paper's 5e-6 above",
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up, to zero at the last step"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's"
    )
    micro_tokens: int = Field(16384, ge=1, description="tokens a micro-batch; memory only, not the result")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw",
        description="of the policy: AdamW, or with 8-bit moments (bitsandbytes): 6 bytes a weight less, not the same bits",
    )
    checkpoint_activations: bool = Field(
        False,
        description="compute each layer again in the backward pass instead of keeping it: less memory for one more forward pass",
    )
    measure_noise: bool = Field(
        False,
        description="measure the variance of the policy's gradient from a step's first two minibatches (holds a copy of the gradient)",
    )
    max_bad_updates: int = Field(
        3, ge=1, description="stop after this many non-finite updates in a row (each is skipped and counted)"
    )


class EvaluationSection(Section):
    """Held-out accuracy along the way."""

    every: int = Field(20, ge=0, description="steps between evaluations; 0: only before and after")
    n: int = Field(256, ge=1, description="held-out problems")
    samples: int = Field(
        1, ge=1, description="responses a problem (two or more also give the ceiling of explained variance)"
    )
    temperature: float | None = Field(None, ge=0, description="default: rollout.temperature; 0 is greedy")


class RunSection(Section):
    """The run directory."""

    out: str = Field("runs/sppo", description="where the run is written")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest first")
    threads: int = Field(0, ge=0, description="CPU threads; 0: all cores. Bit-identical results need the same number")


class Config(Section):
    """A whole recipe. Read one with `Config.load`, write one with `to_toml`."""

    seed: int = Field(1, ge=0, lt=2**31, description="every random choice of the run derives from this")
    policy: PolicySection = Field(default_factory=PolicySection, description="the model that is trained")
    critic: CriticSection = Field(default_factory=CriticSection, description="the prompt-only value model")
    task: TaskSection = Field(default_factory=TaskSection, description="which problems")
    reward: RewardSection = Field(default_factory=RewardSection, description="what judges a response")
    bootstrap: BootstrapSection | None = Field(
        None, description="a supervised start; leave it out for a model that can already answer sometimes"
    )
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="the surrogate")
    training: TrainingSection = Field(default_factory=TrainingSection, description="the update")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="held-out accuracy")
    run: RunSection = Field(default_factory=RunSection, description="the run directory")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        name = (
            (tree.get("objective") or {}).get("algorithm", "sppo")
            if isinstance(tree.get("objective", {}), Mapping)
            else None
        )
        return preset(tree, name) if isinstance(name, str) and name in PRESETS else tree

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        rollouts = self.rollout.prompts * self.rollout.samples
        if self.training.minibatches > rollouts:
            raise ValueError(
                f"training.minibatches is {self.training.minibatches}, but a step has only {rollouts} rollouts"
            )
        r = self.rollout
        if r.engine.startswith("vllm") and (r.top_k or r.top_p < 1 or r.min_p):
            raise ValueError("rollout.top_k, top_p and min_p need rollout.engine = 'local'")
        self._control()
        o = self.objective
        if o.baseline == "greedy" and r.resample:
            raise ValueError(
                "rollout.resample looks at groups of samples: leave it out with objective.baseline = 'greedy'"
            )
        grouped = "objective.baseline" if o.baseline in ("others", "group") else "objective.scale"
        if r.samples < 2 and (o.baseline in ("others", "group") or o.scale == "group"):
            chosen = o.baseline if grouped == "objective.baseline" else o.scale
            raise ValueError(f"{grouped} = {chosen!r} compares samples of one prompt: set rollout.samples to 2 or more")
        if r.samples < 2 and r.resample:
            raise ValueError("rollout.resample looks at the samples of one prompt: set rollout.samples to 2 or more")
        if o.baseline == "beta" and self.training.minibatches * self.training.epochs < 2:
            raise ValueError(
                "objective.baseline = 'beta' needs the policy's movement, which is measured from a step's second minibatch on: "
                "set training.minibatches to 2 or more"
            )
        return self

    def _control(self) -> None:
        """The parts of a control recipe (models/control.py) are of one and the same task."""
        kinds = {"policy.model": "mlp", "critic.model": "mlp", "task.train": "control", "task.eval": "control"}
        given = {
            "policy.model": self.policy.model, "task.train": self.task.train, "task.eval": self.task.eval,
            "critic.model": self.critic.model if self.critic_reads else None,
        }  # fmt: skip
        names = {
            key: text.partition(":")[2].partition(",")[0]
            for key, text in given.items()
            if text and text.startswith(f"{kinds[key]}:")
        }
        r = self.rollout
        if not names and r.engine != "control":
            return
        if r.engine != "control":
            raise ValueError(f"rollout.engine = {r.engine!r} runs no control tasks: set rollout.engine = 'control'")
        one, name = next(iter(names.items()), ("task.train", "NAME"))
        for key, text in given.items():
            if text and key not in names and not ("model" in key and Path(text).exists()):
                raise ValueError(f"{key} = {text!r} is of no control task: set {key} = '{kinds[key]}:{name}'")
            if key in names and names[key] != name:
                raise ValueError(f"{one} is of the control task {name!r}, but {key} of {names[key]!r}")
        if r.top_k or r.top_p < 1 or r.min_p or r.stop:
            raise ValueError(
                "rollout.top_k, top_p, min_p and stop are about text: leave them out with rollout.engine = 'control'"
            )
        if r.resample > 2:
            raise ValueError(
                "rollout.engine = 'control' holds a step's last few blocks of episodes only: set rollout.resample to 2 at most"
            )

    def with_rates(self, policy_parameters: int, critic_parameters: int) -> Config:
        """The recipe with the learning rates that it left open, by the sizes of its models."""
        policy, critic = _size_class(policy_parameters), _size_class(critic_parameters)
        training = {
            "lr": self.training.lr or (2e-4, 1e-5, 1e-6)[policy],
            "critic_lr": self.training.critic_lr or (1e-3, 5e-5, 5e-6)[critic],
        }
        changes: dict[str, Any] = {"training": self.training.model_copy(update=training)}
        if self.bootstrap is not None:
            rate = self.bootstrap.lr or bootstrap_rate(policy_parameters)
            changes["bootstrap"] = self.bootstrap.model_copy(update={"lr": rate})
        return self.model_copy(update=changes)

    def as_algorithm(self, name: str, overrides: Mapping[str, Any]) -> Config:
        """This recipe as another algorithm would run it (`algorithms.with_algorithm`), with keys laid over that."""
        tree = self.model_dump(mode="json", exclude_none=True)
        tree = with_algorithm(tree, name, _whole(overrides.get("rollout.samples")))
        for dotted, value in overrides.items():
            _set(tree, dotted, value)
        return Config.validated(tree, f"--algorithms {name}")

    @property
    def critic_reads(self) -> Literal["prompt", "tokens"] | None:
        """What the critic reads: the prompt alone, or every token; None where the algorithm has no critic."""
        if self.objective.baseline == "token-critic":
            return "tokens"
        return "prompt" if self.objective.baseline in ("critic", "beta", "regressed") else None

    @property
    def needs_reference(self) -> bool:
        """True when something in the recipe reads the frozen reference policy."""
        return self.objective.kl > 0 or self.objective.anchor == "reference"

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
        """Read a recipe and lay `{"section.key": value}` over it.

        Raises RecipeError for a missing file, broken TOML (with its line), an unknown key (with the nearest known one)
        or a value out of range.
        """
        where, tree = "the command line", {}
        if path is not None:
            where = str(path)
            try:
                tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise RecipeError(f"no recipe at {path}; the ones that come with the project are in recipes/") from None
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"{path} cannot be read: {error}") from None
            except tomllib.TOMLDecodeError as error:
                raise RecipeError(f"{path} is not valid TOML: {error}") from None
        overrides = dict(overrides or {})
        other = overrides.get("objective.algorithm")
        if isinstance(other, str) and other in PRESETS:  # the recipe's keys are of its own algorithm
            rollout = tree.setdefault("rollout", {})
            if isinstance(rollout, dict):
                rollout.setdefault("prompts", RolloutSection.model_fields["prompts"].default)
            tree = with_algorithm(tree, other, _whole(overrides.get("rollout.samples")))
        for dotted, value in overrides.items():
            _set(tree, dotted, value)
        return cls.validated(tree, where)

    @classmethod
    def validated(cls, tree: Mapping[str, Any], where: str) -> Config:
        """A config from a tree of sections; `where` names its source in the RecipeError."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_sentence(error)}") from None

    def to_toml(self) -> str:
        """The resolved recipe, defaults included, as TOML that `load` reads back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def sha256(self) -> str:
        """The hash of the resolved recipe less where it is written to: the same recipe has the same hash anywhere."""
        tree = self.model_dump(mode="json", exclude_none=True)
        tree["run"].pop("out")
        return hashlib.sha256(tomli_w.dumps(tree).encode()).hexdigest()


def _whole(value: Any) -> int | None:
    """A positive number of samples, or None where there is none (what else was given is refused where it is validated)."""
    return value if isinstance(value, int) and value > 0 else None


def _size_class(parameters: int) -> int:
    return 0 if parameters < 10_000_000 else 1 if parameters < 1_000_000_000 else 2


def bootstrap_rate(parameters: int) -> float:
    """The supervised learning rate for a model of this size, where none is given."""
    return (2e-3, 1e-4, 1e-5)[_size_class(parameters)]


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of a recipe as (dotted name, default, description), in order."""
    for name, field in section.model_fields.items():
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.get_default(call_default_factory=True), field.description or ""


def parse_value(text: str) -> Any:
    """A command-line value: a TOML list or number or boolean where it is one, else the text itself."""
    if text.startswith("["):
        try:
            return tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            return text
    return scalar(text)


def _section_type(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{dotted}: {section!r} is a value, not a section")
    tree[key] = value


def _sentence(error: ValidationError) -> str:
    """The first validation error as one sentence; an unknown key with the nearest known one."""
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [name for name, _, _ in keys()]
        section, _, key = dotted.rpartition(".")
        siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
        if not section:
            siblings = list(Config.model_fields)
        return f"unknown key {dotted!r}: {nearest(key, siblings)}"
    message = first["msg"].removeprefix("Value error, ")
    shown = f" (got {first['input']!r})" if dotted and not isinstance(first["input"], dict) else ""
    return f"{dotted}: {message[0].lower()}{message[1:]}{shown}" if dotted else message
