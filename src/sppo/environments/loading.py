"""How a recipe's [environment] becomes what makes the environment of each trajectory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import RecipeError
from ..recipe.sections import EnvironmentSection
from ..spec import GIVEN, call, call_own, maker, parse_spec, resolve
from .base import Environment, Maker
from .tools import Tools

ASKED = ("reset", "step", "close")


def load_environment(section: EnvironmentSection) -> Maker:
    """What a recipe asks for. Raises RecipeError, also for an object that lacks what an environment needs."""
    make: Callable[[], Environment]
    if section.use == GIVEN:
        raise RecipeError(
            "this run's environment was given in Python; continue it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    if section.tools:
        make = partial(Tools, [tool_maker(use) for use in section.tools], section.turns, section.output)
        what = "environment.tools"
    else:
        make, what = maker(section.use, "sppo.environments", "environment.use"), f"environment.use = {section.use!r}"
    first = make()
    missing = [name for name in ASKED if not callable(getattr(first, name, None))]
    if missing:
        raise RecipeError(
            f"{what} makes a {type(first).__name__} without {', '.join(missing)}: an environment has "
            f"{', '.join(ASKED)} (environments/base.py has an example)"
        )
    first.close()
    return Maker(make, section.workers, section.seconds, section.tokens, section.answers)


def tool_maker(use: str) -> Callable[[], Any]:
    """What makes the tool that a name stands for, for each trajectory: a module of `sppo/tools/`, or a function or class of the user's own.
    Raises RecipeError."""
    spec = parse_spec(use, "sppo.tools")
    found, what = resolve(spec.name, "sppo.tools", "build"), f"environment.tools {spec.name}"
    if ":" not in spec.name:
        return partial(call, found, what, *spec.words, **spec.options)
    if inspect.isclass(found):
        return partial(call_own, found, what, *spec.words, **spec.options)
    if spec.words or spec.options:
        raise RecipeError(f"{what} is a {type(found).__name__}, which takes no options: only classes do")
    return partial(_itself, found)


def given_environment(tools: Sequence[Any], factory: Callable[[], Any] | None, section: EnvironmentSection) -> Maker:
    """What Python code gives as TRL takes it: functions or classes as tools, and what makes an object for each trajectory. Raises RecipeError."""
    makers = [tool if inspect.isclass(tool) else partial(_itself, tool) for tool in tools]
    make = partial(Tools, [*makers, *([] if factory is None else [factory])], section.turns, section.output)
    make().close()
    return Maker(make, section.workers, section.seconds, section.tokens)


def _itself(tool: Any) -> Any:
    return tool
