"""Shared by commands: recipe keys as options, and models for commands that only sample."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..environments.base import shown
from ..errors import RecipeError, UserError
from ..recipe import removed
from ..recipe.config import Config, keys, parse_value
from ..recipe.sections import RolloutSection
from ..spec import named_columns, nearest


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """RECIPE, the common flags, and every `--section.key` with its help text, grouped by section."""
    parser.usage = f"{parser.prog} [RECIPE.toml] [options] [--section.key VALUE ...]"
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE.toml", help="a recipe; without one, --model and --data are enough"
    )
    parser.add_argument("--model", help="short for --policy.model: a folder, a hub name or 'tiny'")
    parser.add_argument("--data", help="short for --task.train: a .jsonl/.parquet file or a task such as chain:steps=4")
    parser.add_argument("--out", metavar="DIR", help="short for --run.out")
    parser.add_argument("--seed", type=int, metavar="N", help="every random choice of the run derives from this")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
    groups: dict[str, Any] = {}
    for name, default, description in keys():
        section, dot, _ = name.partition(".")
        if not dot:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]", Config.model_fields[section].description)
        shown = "" if default is None or default == "" else f" [{_shown(default)}]"
        text = (description + shown).replace("%", "%%")
        groups[section].add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text)
    parser.set_defaults(takes_keys=True)


def _shown(default: Any) -> str:
    return f"[{', '.join(map(str, default))}]" if isinstance(default, tuple) else str(default)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """`--section.key VALUE` and the short flags as `{"section.key": value}`; an unknown option names the nearest key."""
    known = [name for name, _, _ in keys()]
    if args.extra:
        option = args.extra[0]
        name = option.lstrip("-").partition("=")[0]
        if name in removed.KEYS:
            raise UserError(removed.KEYS[name][1])
        exact = [k for k in known if k.rpartition(".")[2] == name]
        if not option.startswith("-"):
            raise UserError(f"unrecognised argument {option!r}")
        hint = "did you mean " + " or ".join(f"--{k}" for k in exact) + "?" if exact else nearest(name, known)
        raise UserError(f"unknown option {option!r}: {hint}")
    out = {name: parse_value(value) for name, value in vars(args).items() if name in known and isinstance(value, str)}
    for flag, key in (
        ("model", "policy.model"),
        ("data", "task.train"),
        ("out", "run.out"),
        ("seed", "seed"),
        ("steps", "training.steps"),
    ):
        if getattr(args, flag, None) is not None:
            out[key] = getattr(args, flag)
    return out


def read_recipe(args: argparse.Namespace) -> Config:
    """The recipe with its overrides; without a recipe, a model and data are required."""
    changes = overrides(args)
    if args.recipe is None and not {"policy.model", "task.train"} <= changes.keys():
        raise RecipeError("give a recipe (recipes/ has some), or --model and --data")
    return Config.load(args.recipe, changes)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print text for people, and with --json the object as the last line."""
    if text:
        print(text)
    if as_json:
        print(json.dumps(result))


def add_columns_option(parser: argparse.ArgumentParser) -> None:
    """`--columns prompt=q,answer=a`, for commands that read rows without a recipe."""
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="NAME=COLUMN,…",
        help="which columns of the rows to use by which name, as task.columns: prompt=q,answer=meta.gold",
    )


def columns_for(args: argparse.Namespace) -> dict[str, str] | None:
    """`--columns`, else what the recipe of the run in `args.model` says."""
    path = Path(args.model).expanduser()
    recipe = _recipe_near(path) if args.columns is None and path.is_dir() else None
    given: dict[str, str] | None = recipe.task.columns if recipe else args.columns
    return given


def _columns(text: str) -> dict[str, str]:
    try:
        return named_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


class Loaded:
    """A model, with the sampling and reward of its run if it has one."""

    def __init__(self, model: str, *, dtype: str = "auto", seed: int = 0, with_critic: bool = False) -> None:
        from ..models.adapter_critic import open_critic
        from ..models.critic import Critic
        from ..models.loading import pick_device
        from ..models.mlp import is_control
        from ..models.policy import Policy
        from ..run.directory import newest_policy

        path = Path(model).expanduser()
        folder = newest_policy(path) if path.is_dir() else None
        self.recipe = _recipe_near(path) if path.is_dir() else None
        name = str(folder) if folder else model
        if is_control(name):
            raise UserError(
                f"{model} is the policy of a control task, not a language model; its run's metrics say how it does"
            )
        template = self.recipe.policy.chat_template if self.recipe else "auto"
        device = pick_device()
        quantize = self.recipe.policy.quantize if self.recipe else ""
        self.policy, self.stated = Policy.load(
            name, dtype=dtype, device=device, seed=seed, chat_template=template, quantize=quantize
        )
        self.name = name
        self.critic: Critic | None = None
        beside = critic_beside(folder) if folder else None
        if with_critic and beside is not None:
            self.critic, _ = open_critic(str(beside), dtype="auto", device=device, seed=seed, policy=self.policy)

    def sampling(self, *, temperature: float | None, **flags: int | float | None) -> Any:
        """How to sample: by the user's flags (keys of [rollout]), else by the run's recipe, else by a recipe's
        defaults."""
        from ..rollout.engine import Sampling

        if temperature is not None and not temperature >= 0:
            raise UserError(f"--temperature must be 0 (greedy) or above, not {temperature}")
        rollout = (self.recipe or Config()).rollout
        given = {key: value for key, value in flags.items() if value is not None}
        for key, value in given.items():
            try:
                RolloutSection.model_validate({key: value})
            except ValidationError as error:
                flag = key.replace("_", "-")
                raise UserError(
                    f"--{flag}: {error.errors()[0]['msg'][0].lower()}{error.errors()[0]['msg'][1:]}, not {value}"
                ) from None
        sampling = Sampling.of(rollout.model_copy(update=given), temperature)
        if self.policy.context is not None and sampling.max_tokens >= self.policy.context:
            raise UserError(
                f"--max-tokens {sampling.max_tokens} leaves no room for a prompt: the model has {self.policy.context} positions"
            )
        return sampling

    def environment(self) -> Any:
        """What answers the policy between its turns, as in the run. Raises a UserError where that was given in Python."""
        from ..environments.loading import load_environment

        return load_environment((self.recipe or Config()).environment)

    def prompt_critic(self, tasks: Sequence[Any]) -> Any:
        """The critic beside the policy, where it reads prompts alone and can read all of these; else None."""
        if self.critic is None or (self.recipe is not None and self.recipe.critic_reads != "prompt"):
            return None
        limit = self.critic.context
        readable = all(0 < len(self.critic.prompt_ids(t)) <= (limit or 10**9) for t in tasks)
        return self.critic if readable else None

    def fits(self, ids: Sequence[int], max_tokens: int) -> bool:
        """Whether prompt and response fit into the model's positions."""
        return self.policy.context is None or len(ids) + max_tokens <= self.policy.context


def critic_beside(policy: Path) -> Path | None:
    """The critic that was trained beside a policy: both lie in one checkpoint. A folder `critic` that merely lies next
    to a model is of another model (`sppo critic export` writes one to models/critic)."""
    policy = policy.resolve()
    found = policy.parent / "critic"
    whole = policy.name == "policy" and (policy.parent / "state.pt").exists()
    return found if whole and any((found / name).exists() for name in ("config.json", "adapter_config.json")) else None


def _recipe_near(path: Path) -> Config | None:
    """The recipe of the run that a folder is, or is a checkpoint of, or a model in a checkpoint of; or None."""
    path = path.resolve()
    runs = [path, *(run.parent for run in (path.parent, path.parent.parent) if run.name == "checkpoints")]
    for folder in runs:
        if (folder / "recipe.toml").exists() and (folder / "checkpoints").is_dir():
            return Config.load(folder / "recipe.toml")
    return None


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """A trajectory's messages for the terminal: what was called, and what it gave."""
    lines = list[str]()
    for m in messages:
        for call in m.get("tool_calls") or []:
            lines.append(f"→ {call.get('error') or shown(call['function'])}")
        if m["role"] == "assistant":
            lines += [m["content"]] if m["content"] else []
        else:
            lines.append(f"← {m['content']}")
    return "\n".join(lines)
