"""Reading, overriding and writing a recipe: one validated tree, unknown keys refused.

A recipe is TOML; `--section.key VALUE` on the command line overrides one key, through the same validation. Every key's
description is its help text. The package imports no torch, so that `sppo train --help` answers at once.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import ValidationError, model_validator

from ..errors import RecipeError
from ..files import read_bytes, readable, reason
from ..spec import data_path, located, nearest, nested_beyond, scalar, with_data_path
from .checks import RULES
from .presets import DEFAULT, PRESETS, preset, with_algorithm
from .recipe import Recipe
from .removed import refusal, without_removed
from .sections import ClusterSection, RolloutSection, Section

DATA_KEYS = ("task.train", "task.eval", "bootstrap.task")
"""Keys that may name a file of rows."""
MEMORY_KEYS = ("training.micro_tokens", "training.checkpoint_activations", "rollout.batch")
"""Keys that decide how much memory a run needs, and nothing that is learnt but rounding: they may change when it is resumed."""
CLUSTER_KEYS = (*(f"cluster.{name}" for name in ClusterSection.model_fields if name != "lag"), "reward.workers")
"""Where and on how many processes a run is computed: may change when it is resumed. What is learnt differs in rounding at most."""
LARGEST, MOST_NESTED, MOST_DOTS = 2**18, 20, 1000
"""Limits of a recipe: its characters, how deep its lists and tables go, and the dots in one of its lines."""


class Config(Recipe):
    """A whole recipe. Read one with `Config.load`, write one with `to_toml`."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        if (sentence := refusal(flattened(tree))) is not None:
            raise ValueError(sentence)
        tree = without_removed(tree)
        objective = tree.get("objective", {})
        name = objective.get("algorithm", DEFAULT) if isinstance(objective, Mapping) else DEFAULT
        if not isinstance(name, str) or name not in PRESETS:
            return tree  # refused by validation
        out = preset(tree, name)
        if isinstance(out["objective"], dict):
            out["objective"]["algorithm"] = name
        return out

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for rule in RULES:
            for sentence in rule(self):
                raise ValueError(sentence)
        return self

    def as_algorithm(self, name: str, overrides: Mapping[str, Any]) -> Config:
        """This recipe as another algorithm runs it (`presets.with_algorithm`), with `overrides` by dotted key."""
        tree = self.model_dump(mode="json", exclude_none=True)
        tree = with_algorithm(tree, name, _whole(overrides.get("rollout.samples")))
        for dotted, value in overrides.items():
            _set(tree, dotted, value)
        return Config.validated(tree, f"--algorithms {name}")

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
        """A run's recipe, for reading only: of another version's, unknown values stay and unknown keys go.

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
        """The hash of the resolved recipe without the places of its run and data: the same on every machine."""
        return hashlib.sha256(self.without_places().encode()).hexdigest()

    def without_places(self) -> str:
        """The resolved recipe as TOML, without the places of its run and data."""
        tree = self._plain()
        for where in ("out", "anchor"):
            tree["run"].pop(where)
        for key, spec in self.data().items():
            section, _, name = key.partition(".")
            tree[section][name] = with_data_path(spec, Path(data_path(spec) or "").name)
        return tomli_w.dumps(tree)

    def data(self) -> dict[str, str]:
        """The keys that read files or folders of rows, and their specs."""
        given = {
            "task.train": self.task.train,
            "task.eval": self.task.eval,
            "bootstrap.task": self.bootstrap.task if self.bootstrap else None,
        }
        return {key: spec for key, spec in given.items() if spec and data_path(spec) is not None}

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True, warnings=False)  # a recalled one would warn


def _read(path: str | Path) -> dict[str, Any]:
    try:
        path = Path(path)
        piped = path.is_relative_to("/dev")  # a pipe in a folder would be waited for in vain
        text = path.read_text(encoding="utf-8") if piped else read_bytes(path).decode()
        if len(text) > LARGEST:
            raise RecipeError(f"{path} has {len(text):,} characters, which no recipe needs")
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):  # tomllib is quadratic in a key's parts
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
    """A section without validation: each value need only have the type that its key has here."""
    values = {}
    for name, field in section.model_fields.items():
        inner, default = _section_type(field.annotation), field.get_default(call_default_factory=True)
        given = tree.get(name, default)
        if inner is not None:
            values[name] = _unchecked(inner, given) if isinstance(given, Mapping) else given
            continue
        if not isinstance(given, _types(field.annotation, default)):
            raise RecipeError(f"{name} = {str(given)[:60]!r} has another type than a recipe's")
        values[name] = given
    return section.model_construct(**values)


def _types(annotation: Any, default: Any) -> tuple[type, ...]:
    """The types of a key's values: that of its default, or those of `X | None`."""
    alike: dict[Any, tuple[type, ...]] = {int: (int, float), float: (int, float), tuple: (list, tuple)}
    kinds = [type(default)] if default is not None else [get_origin(kind) or kind for kind in get_args(annotation)]
    return tuple(like for kind in kinds for like in alike.get(kind, (kind,)))


def _whole(value: Any) -> int | None:
    """A positive number of samples; None for anything else, which validation refuses."""
    return value if isinstance(value, int) and value > 0 else None


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe as `{"section.key": value}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of a recipe as (dotted name, default, description), in order."""
    for name, field in section.model_fields.items():
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.get_default(call_default_factory=True), field.description or ""


def parse_value(text: str) -> Any:
    """A command-line value: a TOML list, number or boolean if it is one, else the text itself."""
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
        section, _, key = dotted.rpartition(".")
        siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
        if not section:
            siblings = list(Config.model_fields)
        return f"unknown key {dotted!r}: {nearest(key, siblings)}"
    message = _cut(first["msg"].removeprefix("Value error, "), 600)
    shown = f" (got {_shown(first['input'])})" if dotted and not isinstance(first["input"], dict) else ""
    return f"{dotted}: {message[0].lower()}{message[1:]}{shown}" if dotted else message


def _shown(value: Any, most: int = 200) -> str:
    """A value as an error shows it, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
