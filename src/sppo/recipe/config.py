"""The whole recipe as one validated tree: sections in the order in which data flows, unknown keys refused.

A recipe is TOML; `--section.key VALUE` on the command line overrides one key, through the same validation. Every
key's description is its help text. This module imports no torch, so that `sppo train --help` answers at once.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError, model_validator

from ..errors import RecipeError
from ..files import read_bytes, readable, reason
from ..spec import data_path, is_import, located, nearest, nested_beyond, scalar, with_data_path
from .presets import LONG_RATIO, PRESETS, SHORT, chosen, preset, with_algorithm
from .sections import (
    PER_TOKEN,
    BootstrapSection,
    CriticSection,
    CurriculumSection,
    EvaluationSection,
    MonitorsSection,
    ObjectiveSection,
    PolicySection,
    RewardSection,
    RolloutSection,
    RunSection,
    SearchSection,
    Section,
    TaskSection,
    TrainingSection,
)

DATA_KEYS = ("task.train", "task.eval", "bootstrap.task")
"""Keys that may name a file of rows."""
LARGEST, MOST_NESTED, MOST_DOTS = 2**18, 20, 1000
"""A recipe's size in characters, how deep its lists and tables go, and the dots in one of its lines, at most."""


RENAMED = {"objective.stakes": "objective.optimal_baseline"}
"""Keys of earlier versions."""


class Config(Section):
    """A whole recipe. Read one with `Config.load`, write one with `to_toml`."""

    seed: int = Field(1, ge=0, lt=2**31, description="every random choice of the run derives from this")
    policy: PolicySection = Field(default_factory=PolicySection, description="the model that is trained")
    critic: CriticSection = Field(default_factory=CriticSection, description="the prompt-only value model")
    task: TaskSection = Field(default_factory=TaskSection, description="which problems")
    curriculum: CurriculumSection = Field(
        default_factory=CurriculumSection, description="which of the training problems come when"
    )
    reward: RewardSection = Field(default_factory=RewardSection, description="what judges a response")
    bootstrap: BootstrapSection | None = Field(
        None, description="a supervised start; leave it out for a model that can already answer sometimes"
    )
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    search: SearchSection | None = Field(
        None, description="tree search for hard problems; leave it out where sampling solves some of everything"
    )
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="the surrogate")
    training: TrainingSection = Field(default_factory=TrainingSection, description="the update")
    monitors: MonitorsSection = Field(
        default_factory=MonitorsSection, description="what watches for reward hacking and collapse"
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="held-out accuracy")
    run: RunSection = Field(default_factory=RunSection, description="the run directory")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        name = chosen(tree)
        if not isinstance(name, str) or name not in PRESETS:
            return tree  # refused where it is validated
        out = preset(tree, name)
        if isinstance(out["objective"], dict):
            out["objective"]["algorithm"] = name
        return out

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
        self._tree()
        self._search()
        if self.curriculum.kind == "staged" and not self.evaluation.every:
            raise ValueError("curriculum.kind = 'staged' goes on by evaluations: set evaluation.every above 0")
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
        if self.curriculum.kind == "predicted" and self.critic_reads != "prompt":
            raise ValueError(
                f"curriculum.kind = 'predicted' asks the critic, and objective.baseline = {o.baseline!r} has none that reads the prompt: use "
                "'critic', 'centred' or 'beta', or another kind"
            )
        if self.curriculum.kind == "predicted" and self.curriculum.corrected and (o.scale == "batch" or r.resample):
            raise ValueError(
                "curriculum.kind = 'predicted' corrects each advantage for how its problem was chosen, which objective.scale = 'batch' and "
                "rollout.resample undo: leave them out, or set curriculum.corrected = false"
            )
        if o.baseline == "hybrid" and o.phi == "steps":
            self._measures_steps("objective.phi = 'steps'")
        if o.baseline == "beta" and self.training.minibatches * self.training.epochs < 2:
            raise ValueError(
                "objective.baseline = 'beta' needs the policy's movement, which is measured from a step's second minibatch on: "
                "set training.minibatches to 2 or more"
            )
        return self

    def _measures_steps(self, who: str) -> None:
        use = self.reward.use
        if any(is_import(part, "sppo.rewards") for part in use.split()):  # of the user's own: seen when it has judged
            return
        if "steps:" not in use:
            raise ValueError(
                f"{who} reads the scores of a steps reward, and reward.use names none: add `+ 0 * steps:check=…,split=…` to it (0: measured, "
                "not paid)"
            )
        if "split=" not in use.partition("steps:")[2]:
            raise ValueError(
                f"{who} must know where a step ends from what was written so far: name a split in reward.use, e.g. steps:check=…,split=lines"
            )

    def _tree(self) -> None:
        """Trees of responses and the credit that is made for them belong together."""
        r, o = self.rollout, self.objective
        siblings = o.baseline == "hybrid" and o.phi == "siblings"
        if siblings != (r.kind == "tree"):
            raise ValueError(
                "rollout.kind = 'tree' needs the credit made for it: set objective.algorithm = 'sppo-tree'"
                if r.kind == "tree"
                else "objective.phi = 'siblings' compares the branches of trees: set rollout.kind = 'tree' (or algorithm = 'sppo-tree')"
            )
        if r.kind != "tree":
            return
        if r.engine != "local":
            raise ValueError(
                f"rollout.kind = 'tree' needs rollout.engine = 'local', which can branch; it is {r.engine!r}"
            )
        if r.branch > r.leaves:
            raise ValueError(
                f"rollout.branch = {r.branch} ways to go on are more than a tree may have leaves (rollout.leaves = {r.leaves})"
            )
        if r.tree_budget < r.max_tokens:
            raise ValueError(
                f"rollout.budget = {r.tree_budget} tokens a tree is less than one response may take (rollout.max_tokens = {r.max_tokens})"
            )
        if r.samples != 1 or r.resample:
            raise ValueError(
                "rollout.kind = 'tree' makes its samples by branching: leave rollout.samples and rollout.resample out"
            )
        if o.ratio != "token":
            raise ValueError(
                f"rollout.kind = 'tree' has stretches of tokens that several responses share, and objective.ratio = {o.ratio!r} is of a whole response: "
                "set objective.ratio = 'token'"
            )
        if o.scale != "none" or o.average == "responses":
            raise ValueError(
                "rollout.kind = 'tree' counts every shared token once: leave objective.scale and objective.average out"
            )
        if o.engine_correction_level == "sequence":
            raise ValueError(
                "rollout.kind = 'tree' has no whole responses in its loss: set objective.engine_correction_level = 'token'"
            )
        if o.kl > 0 and o.kl_form != "reward" and not o.kl_of_tokens:
            raise ValueError(
                "rollout.kind = 'tree' has no whole responses in its loss: set objective.kl_level = 'token', or kl_form = 'reward'"
            )

    def _search(self) -> None:
        s, o, r = self.search, self.objective, self.rollout
        if s is None:
            return
        if s.budget < r.max_tokens:
            raise ValueError(
                f"search.budget = {s.budget} tokens a problem is less than one response may take (rollout.max_tokens = {r.max_tokens})"
            )
        if r.engine == "control":
            raise ValueError("[search] writes on from prefixes of text, which rollout.engine = 'control' has none of")
        if s.value == "critic" and self.critic_reads != "tokens":
            raise ValueError(
                f"search.value = 'critic' asks a critic that reads prefixes, and that of objective.baseline = {o.baseline!r} does not: use "
                "algorithm = 'sppo-hybrid' or 'ppo', or another value"
            )
        if s.value == "steps":
            self._measures_steps("search.value = 'steps'")

    def _control(self) -> None:
        """The parts of a control recipe (models/mlp.py) are of one and the same task."""
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
        if r.overlong:
            raise ValueError(
                "rollout.overlong is about long responses, and a long episode may be a good one: set it to 0 with rollout.engine = 'control'"
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

    def settled(self) -> tuple[Config, str]:
        """The recipe with `auto` in its objective replaced by what it stands for, and the ratio in words, with the reason where it was open.

        A static rule: it depends on the recipe alone, so a run's recipe says what ran.
        """
        o, length = self.objective, self.rollout.max_tokens
        updates = self.training.minibatches * self.training.epochs
        changes: dict[str, Any] = {}
        because = ""
        if o.ratio == "auto":
            if updates == 1:
                changes, because = {"ratio": "sequence"}, "a step has one update"
            elif length <= SHORT:
                changes = {"ratio": "sequence"}
                because = f"responses have up to {length} tokens, and up to {SHORT} the exact weight can be used"
            else:
                fields = ObjectiveSection.model_fields
                changes = {k: v for k, v in LONG_RATIO.items() if k == "ratio" or getattr(o, k) == fields[k].default}
                because = f"a step has {updates} updates, and up to {length} tokens make the exact weight vary too much"
        ratio = changes.get("ratio", o.ratio)
        if o.engine_correction_level == "auto" and o.engine_correction:
            exact = ratio not in PER_TOKEN and length <= SHORT
            changes["engine_correction_level"] = "sequence" if exact else "token"
        out = self.model_copy(update={"objective": o.model_copy(update=changes)})
        words = f"ratio {ratio}" + (f" with kappa {out.objective.kappa:g}" if ratio == "family" else "")
        return out, words + (f" (auto: {because})" if because else "")

    def as_algorithm(self, name: str, overrides: Mapping[str, Any]) -> Config:
        """This recipe as another algorithm would run it (`algorithms.with_algorithm`), with keys laid over that."""
        tree = self.model_dump(mode="json", exclude_none=True)
        tree = with_algorithm(tree, name, _whole(overrides.get("rollout.samples")))
        for dotted, value in overrides.items():
            _set(tree, dotted, value)
        return Config.validated(tree, f"--algorithms {name}")

    def without_effect(self) -> list[str]:
        """Keys that are not at their defaults and that nothing in this recipe reads, each as a sentence."""
        o, r, c = self.settled()[0].objective, self.rollout, self.curriculum
        of_baseline = {"gae_lambda": "token-critic", "half_life": "beta", "phi": "hybrid"}
        tree, predicted, staged = r.kind == "tree", c.kind == "predicted", c.kind == "staged"
        segments = tree or self.search is not None or (o.baseline == "hybrid" and o.phi == "segments")
        reads: list[tuple[str, bool, str]] = [
            *((f"objective.{key}", o.baseline == name, f"objective.baseline = {name!r}") for key, name in of_baseline.items()),
            ("objective.kappa", o.ratio == "family", "objective.ratio = 'family'"),
            ("objective.gate_temperature", o.surrogate == "sapo", "objective.surrogate = 'sapo'"),
            *((f"objective.engine_correction_{key}", o.engine_correction > 0, "objective.engine_correction above 0") for key in ("level", "beyond")),
            ("objective.kl_form", o.kl > 0, "objective.kl above 0"),
            ("objective.kl_level", o.kl > 0 and o.kl_form != "reward", "a KL in the loss: objective.kl above 0, kl_form other than 'reward'"),
            *((f"rollout.{key}", tree, "rollout.kind = 'tree'") for key in ("branch", "entropy", "budget", "leaves")),
            ("rollout.segments", segments, "rollout.kind = 'tree', objective.phi = 'segments' and [search]"),
            *((f"curriculum.{key}", predicted, "curriculum.kind = 'predicted'") for key in ("floor", "pool", "corrected")),
            *((f"curriculum.{key}", staged, "curriculum.kind = 'staged'") for key in ("clear", "rehearse")),
            ("curriculum.revisit", c.aside > 0, "curriculum.aside above 0"),
            ("monitors.second", self.monitors.sample > 0, "monitors.sample above 0"),
            *((f"monitors.{key}", self.monitors.action != "off", "monitors.action other than 'off'") for key in ("second", "sample")),
        ]  # fmt: skip
        defaults = {name: default for name, default, _ in keys()}
        out = []
        for dotted, read, of in reads:
            section, key = dotted.split(".")
            if not read and getattr(getattr(self, section), key) != defaults[dotted]:
                out.append(f"{dotted} has no effect here: it is of {of}")
        return out

    @property
    def critic_reads(self) -> Literal["prompt", "tokens"] | None:
        """What the critic reads: the prompt alone, or every token; None where the algorithm has no critic."""
        o = self.objective
        if o.baseline == "token-critic" or (o.baseline == "hybrid" and o.phi == "segments"):
            return "tokens"
        return None if o.baseline in ("batch", "others", "group", "greedy") else "prompt"

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
        where, tree = ("the command line", {}) if path is None else (str(path), _read(path))
        overrides = dict(overrides or {})
        other = overrides.get("objective.algorithm")
        if isinstance(other, str) and other in PRESETS:  # the recipe's keys are of its own algorithm
            rollout = tree.setdefault("rollout", {})
            if isinstance(rollout, dict):
                rollout.setdefault("prompts", RolloutSection.model_fields["prompts"].default)
            tree = with_algorithm(tree, other, _whole(overrides.get("rollout.samples")))
        _locate(tree, None if path is None else Path(path).parent)
        for dotted, value in overrides.items():
            _set(tree, dotted, located(value, None) if dotted in DATA_KEYS and isinstance(value, str) else value)
        return cls.validated(tree, where)

    @classmethod
    def recalled(cls, path: str | Path) -> Config:
        """A run's recipe, to be looked at only: one of another version keeps values that are not known here, and loses keys that are not.

        Raises RecipeError for a file that cannot be read, or has a value where a section should be.
        """
        try:
            return cls.load(path)
        except RecipeError:
            tree = _read(path)
            if not all(
                isinstance(tree.get(k, {}), Mapping) for k, f in cls.model_fields.items() if _section_type(f.annotation)
            ):
                raise  # a value where a section should be is no recipe of any version
            with readable(f"{path} cannot be read", RecipeError):
                found: Config = _unchecked(cls, tree)
                found.to_toml()
                return found

    @classmethod
    def validated(cls, tree: Mapping[str, Any], where: str) -> Config:
        """A config from a tree of sections; `where` names its source in the RecipeError."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_sentence(error)}") from None

    def to_toml(self) -> str:
        """The resolved recipe, defaults included, as TOML that `load` reads back."""
        return tomli_w.dumps(self._plain())

    @property
    def sha256(self) -> str:
        """The hash of the resolved recipe less where it is written to and where its data is: the same recipe has the same hash anywhere."""
        tree = self._plain()
        for where in ("out", "anchor"):
            tree["run"].pop(where)
        for key, spec in self.data().items():
            section, _, name = key.partition(".")
            tree[section][name] = with_data_path(spec, Path(data_path(spec) or "").name)
        return hashlib.sha256(tomli_w.dumps(tree).encode()).hexdigest()

    def data(self) -> dict[str, str]:
        """The keys that read files or folders of rows, and their specs."""
        given = {
            "task.train": self.task.train,
            "task.eval": self.task.eval,
            "bootstrap.task": self.bootstrap.task if self.bootstrap else None,
        }
        return {key: spec for key, spec in given.items() if spec and data_path(spec) is not None}

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True, warnings=False)  # one that is recalled would warn


def _read(path: str | Path) -> dict[str, Any]:
    try:
        path = Path(path)
        piped = path.is_relative_to("/dev")  # a pipe in a folder would be waited for in vain
        text = path.read_text(encoding="utf-8") if piped else read_bytes(path).decode()
        if len(text) > LARGEST:
            raise RecipeError(f"{path} has {len(text):,} characters, which no recipe needs")
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):  # tomllib takes the square of a key's parts
            raise RecursionError
        tree = tomllib.loads(text)
        if nested_beyond(tree, MOST_NESTED):
            raise RecursionError
        return tree
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; the ones that come with the project are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {reason(error)}") from None
    except RecursionError:
        raise RecipeError(
            f"{path} is nested too deeply: a recipe has sections, keys and lists, and no more levels"
        ) from None
    except ValueError as error:  # also a number of thousands of digits
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def _locate(tree: dict[str, Any], folder: Path | None) -> None:
    """Make the paths of a recipe's data absolute: they are relative to the recipe, else to the current folder."""
    for dotted in DATA_KEYS:
        name, _, key = dotted.partition(".")
        section = tree.get(name)
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = located(section[key], folder)


def _unchecked(section: type[Section], tree: Mapping[str, Any]) -> Any:
    """A section of values that need not be allowed here, but are of the kind that a default is."""
    values = {}
    for name, field in section.model_fields.items():
        inner, default = _section_type(field.annotation), field.get_default(call_default_factory=True)
        given = tree.get(name, default)
        if inner is not None:
            values[name] = _unchecked(inner, given) if isinstance(given, Mapping) else given
            continue
        kinds = (
            (int, float)
            if type(default) in (int, float)
            else (list, tuple)
            if isinstance(default, tuple)
            else type(default)
        )
        if default is not None and not isinstance(given, kinds):
            raise RecipeError(f"{name} = {str(given)[:60]!r} is not of the kind that it is in a recipe")
        values[name] = given
    return section.model_construct(**values)


def _whole(value: Any) -> int | None:
    """A positive number of samples, or None where there is none (what else was given is refused where it is validated)."""
    return value if isinstance(value, int) and value > 0 else None


def _size_class(parameters: int) -> int:
    return 0 if parameters < 10_000_000 else 1 if parameters < 1_000_000_000 else 2


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe as `{"section.key": value}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


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
    if text.startswith(("[", "{")):
        try:
            value = tomllib.loads(f"v = {text}")["v"]
            return text if nested_beyond(value, MOST_NESTED) else value
        except (ValueError, RecursionError):
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
    dotted = _cut(".".join(str(part) for part in first["loc"]), 200)
    if first["type"] == "extra_forbidden":
        known = [name for name, _, _ in keys()]
        if dotted in RENAMED:
            return f"{dotted!r} has a new name: {RENAMED[dotted]!r}"
        section, _, key = dotted.rpartition(".")
        siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
        if not section:
            siblings = list(Config.model_fields)
        return f"unknown key {dotted!r}: {nearest(key, siblings)}"
    message = _cut(first["msg"].removeprefix("Value error, "), 600)
    shown = f" (got {_shown(first['input'])})" if dotted and not isinstance(first["input"], dict) else ""
    return f"{dotted}: {message[0].lower()}{message[1:]}{shown}" if dotted else message


def _shown(value: Any, most: int = 200) -> str:
    """A value for an error, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
