"""Names with options, as recipes and command lines write them: `chain:steps=4-6,split=held-out`.

A name is a module of the room that is asked (`math` in `rewards/` is `sppo/rewards/math.py`), or `package.module:object`
of the user's own. There is no registry: adding a reward, a task or an engine is adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import RecipeError


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed `name:word,key=value,...`; values are numbers or booleans where they look like one, else text."""

    name: str
    words: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def scalar(text: str) -> Any:
    """The value a word stands for: `3` → 3, `0.5` → 0.5, `true` → True, anything else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_COMMA = re.compile(r",(?![^\[\]]*\])")
"""A comma that does not stand in a list, `[0.1, 0.2]`."""


def parse_spec(text: str) -> Spec:
    """Parse `name:word,key=value`. Raises RecipeError with the offending piece."""
    name, _, rest = text.strip().partition(":")
    if not name:
        raise RecipeError(f"{text!r} has no name: write it as name:key=value,key=value")
    words: list[str] = []
    options: dict[str, Any] = {}
    for piece in filter(None, (p.strip() for p in _COMMA.split(rest))):
        key, equals, value = piece.partition("=")
        if not equals:
            words.append(piece)
        elif key.strip() in options:
            raise RecipeError(f"{text!r} gives {key.strip()!r} twice")
        else:
            options[key.strip()] = scalar(value.strip())
    return Spec(name, tuple(words), options)


def split_specs(text: str) -> list[str]:
    """Split `SPEC,SPEC` at the commas that begin a new spec, not at those inside one.

    >>> split_specs("chain:steps=4-6,split=held-out,gym:chain_sum,min_terms=2,data.jsonl")
    ['chain:steps=4-6,split=held-out', 'gym:chain_sum,min_terms=2', 'data.jsonl']
    """
    specs: list[str] = []
    for piece in _COMMA.split(text):
        is_option = re.match(r"^\s*[\w.]+=", piece) is not None
        if specs and is_option:
            specs[-1] += "," + piece
        elif piece.strip():
            specs.append(piece.strip())
    return specs


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean …?)' for the nearest known word, or the list of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known)[:40])


def modules_in(package: str) -> list[str]:
    """The public modules of a package, by short name."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def resolve(name: str, package: str, factory: str) -> Any:
    """The `factory` of module `package.name`, or the object that `package.module:object` names.

    Raises RecipeError naming what is known when there is no such module, and when an import fails.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise RecipeError(
                f"{name!r} cannot be imported: {error} (stand in its folder, or name that in PYTHONPATH)"
            ) from error
        except AttributeError as error:
            raise RecipeError(f"module {module!r} has no {attribute!r}") from error
    candidates = [m for m in modules_in(package) if offers(f"{package}.{m}", factory)]
    if name not in candidates:
        room = package.rpartition(".")[2]
        raise RecipeError(f"{room} has no {name!r}: {nearest(name, candidates)}")
    return getattr(importlib.import_module(f"{package}.{name}"), factory)


def is_import(text: str, package: str) -> bool:
    """True for `package.module:object` of the user's own, False for a name of this room with options."""
    name, colon, rest = text.partition(":")
    return bool(colon) and rest.isidentifier() and name not in modules_in(package)


def offers(module: str, factory: str) -> bool:
    """True when the module's source defines the factory; asked of the source, so that nothing heavy is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    with open(spec.origin, encoding="utf-8") as file:
        return re.search(rf"^(def|class) {factory}\b", file.read(), re.MULTILINE) is not None


NUMBERS = {"int": "a whole number", "float": "a number"}


def call(factory: Callable[..., Any], what: str, *args: Any, **options: Any) -> Any:
    """Call a factory with a spec's options; an unknown or missing option is one sentence, not a TypeError."""
    signature = inspect.signature(factory)
    named = [p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in options:
        if not open_ended and key not in named:
            raise RecipeError(f"{what} has no option {key!r}: {nearest(key, named[len(args) :])}")
    try:
        bound = signature.bind(*args, **options)
    except TypeError as error:
        raise RecipeError(f"{what}: {error}") from error
    for key, value in bound.arguments.items():
        wanted = NUMBERS.get(str(signature.parameters[key].annotation))
        if wanted and (isinstance(value, str) or (wanted == NUMBERS["int"] and isinstance(value, float))):
            raise RecipeError(f"{what}: {key}={value} is not {wanted}")
    return factory(*args, **options)
