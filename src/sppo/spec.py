"""Names with options, as recipes and command lines write them: `chain:steps=4-6,split=held-out`.

A name is a module of the room that is asked (`math` in `rewards/` is `sppo/rewards/math.py`), or `package.module:object`
of the user's own. There is no registry: adding a reward, a task or an engine is adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import own
from .errors import RecipeError, SPPOError, UserError

GIVEN = "given in Python"
"""Stands in a recipe for an object that a Python user passed, which cannot be loaded by name."""


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


def _pieces(text: str) -> list[str]:
    """A text split at its commas, but for those that stand in a list, `[0.1, 0.2]`."""
    pieces, start, depth = [], 0, 0
    for i, c in enumerate(text):
        depth = max(0, depth + (c == "[") - (c == "]"))
        if c == "," and not depth:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def parse_spec(text: str, package: str = "") -> Spec:
    """Parse `name:word,key=value`; with the package of a room also `package.module:object,word,key=value`, whose name is `package.module:object`.

    Raises RecipeError with the offending piece.
    """
    name, _, rest = text.strip().partition(":")
    if not name:
        raise RecipeError(f"{text!r} has no name: write it as name:key=value,key=value")
    if package and is_import(text, package):
        attribute, _, rest = rest.partition(",")
        name = f"{name}:{attribute.strip()}"
    words: list[str] = []
    options: dict[str, Any] = {}
    for piece in filter(None, (p.strip() for p in _pieces(rest))):
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
    for piece in _pieces(text):
        is_option = re.match(r"^\s*[\w.]+=", piece) is not None
        if specs and is_option:
            specs[-1] += "," + piece
        elif piece.strip():
            specs.append(piece.strip())
    return specs


ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def is_records(spec: str) -> bool:
    """True for a spec that reads rows (a file, a saved dataset's folder or a hub dataset), False for one that makes problems."""
    return spec.startswith(("hub:", "records:")) or data_path(spec) is not None


def data_path(spec: str) -> str | None:
    """The file or folder that a spec reads rows from, as it is written there; None for a hub dataset and for a task that makes its problems."""
    if spec.startswith("records:"):
        parsed = parse_spec(spec)
        found = parsed.options.get("path", parsed.words[0] if parsed.words else None)
        return None if found is None else str(found)
    if spec.startswith("hub:"):
        return None
    path = Path(spec)
    suffixes = path.suffixes
    if suffixes and (suffixes[-1].lower() in ROW_FILES or suffixes[-1].lower() in COMPRESSED):
        return spec
    if spec in modules_in("sppo.tasks") or not exists(path):  # a folder that happens to have a task's name
        return None
    return spec


def with_data_path(spec: str, path: str) -> str:
    """The spec with another file or folder, its options kept; as it is where the path cannot be written in a spec with options."""
    if not spec.startswith("records:"):
        return path
    parsed = parse_spec(spec)
    options = {**{k: v for k, v in parsed.options.items() if k != "path"}, "path": path}
    made = "records:" + ",".join(f"{key}={value}" for key, value in options.items())
    return made if data_path(made) == path else spec


def located(spec: str, folder: Path | None) -> str:
    """The spec with an absolute path: a relative one is looked for in `folder` (where the recipe is), then in the current folder."""
    path = data_path(spec)
    if path is None:
        return spec
    written = Path(os.path.expanduser(path))  # as it is where there is no such user
    for base in (folder, Path.cwd()):
        if base is not None and exists(base / written):
            return with_data_path(spec, os.path.abspath(base / written))
    return spec


def named_columns(text: str) -> dict[str, str]:
    """`prompt=q,answer=meta.gold` as {"prompt": "q", "answer": "meta.gold"}: the name that a row's column goes by, and the column.

    Raises ValueError for a piece that is no such pair.
    """
    pairs = [piece.partition("=") for piece in text.split(",")]
    if not all(wanted.strip() and source.strip() for wanted, _, source in pairs):
        raise ValueError("columns are written as prompt=q,answer=a: the name to use, and the column of the rows")
    return {wanted.strip(): source.strip() for wanted, _, source in pairs}


def exists(path: Path) -> bool:
    """Whether a path is there; one that no file can have (too long, a NUL in it) is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def nested_beyond(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than so many levels."""
    level = [value]
    for _ in range(levels + 1):
        held = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [v for values in held for v in values if isinstance(v, (dict, list))]
        if not level:
            return False
    return True


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
        return _own_object(name, package)
    candidates = [m for m in modules_in(package) if offers(f"{package}.{m}", factory)]
    if name not in candidates:
        room = package.rpartition(".")[2]
        raise RecipeError(f"{room} has no {name!r}: {nearest(name, candidates)}")
    return getattr(importlib.import_module(f"{package}.{name}"), factory)


def _own_object(name: str, package: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = own.load(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").removeprefix(own.PREFIX)
        if missing != module.partition(".")[0]:
            raise RecipeError(
                f"{name!r} cannot be imported: there is no module {missing!r}{_line_of(error)}"
            ) from error
        close = difflib.get_close_matches(module, modules_in(package), n=1, cutoff=0.7)
        raise RecipeError(
            f"{name!r} cannot be imported: there is no {module.replace('.', '/')}.py in the current folder, and no module {missing!r} is "
            f"installed (stand in its folder, or name that in PYTHONPATH{f'; or did you mean {close[0]!r}?' if close else ''})"
        ) from error
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{name!r} cannot be imported: {type(error).__name__}: {error}{_line_of(error)}") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        public = [known for known in vars(found) if not known.startswith("_")]
        raise RecipeError(f"module {module!r} has no {attribute!r}: {nearest(attribute, public)}") from error


def _line_of(error: BaseException) -> str:
    """Where in the user's own code an exception was raised, as ` (mine.py, line 3)`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(tuple(own.__path__))]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames and own.__path__ else ""


def is_import(text: str, package: str) -> bool:
    """True for `package.module:object` of the user's own, with or without options, False for a name of this room with options."""
    name, _, rest = text.strip().partition(":")
    module = all(part.isidentifier() for part in name.split("."))
    return module and rest.partition(",")[0].strip().isidentifier() and name not in modules_in(package)


def maker(text: str, package: str, what: str, *args: Any) -> Callable[[], Any]:
    """What makes the object that the spec `text` names in the room `package`: its `build` (or the user's own object), called with `args` and the
    spec's options each time. The name is looked up once. Raises RecipeError: no such name; what is returned raises it for the rest (`make`)."""
    spec = parse_spec(text, package)
    found = resolve(spec.name, package, "build")
    calls = call_own if ":" in spec.name else call
    return partial(calls, found, f"{what} {spec.name}", *args, *spec.words, **spec.options)


def make(text: str, package: str, what: str, *args: Any) -> Any:
    """One object of `maker`. Raises RecipeError: no such name or option, an own object that cannot be called, or that raises."""
    return maker(text, package, what, *args)()


def offers(module: str, factory: str) -> bool:
    """True when the module's source defines the factory; asked of the source, so that nothing heavy is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    with open(spec.origin, encoding="utf-8") as file:
        return re.search(rf"^(def|class) {factory}\b", file.read(), re.MULTILINE) is not None


NUMBERS = {"int": "a whole number", "float": "a number"}


def call(factory: Callable[..., Any], what: str, /, *args: Any, **options: Any) -> Any:
    """Call a factory with a spec's options; an unknown or missing option is one sentence, not a TypeError."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some of what is written in C does not say what it takes
        return factory(*args, **options)
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


def call_own(factory: Any, what: str, /, *args: Any, **options: Any) -> Any:
    """`call` for an object of the user's own; that it cannot be called, or raises, is one sentence."""
    if not callable(factory):
        given = ", ".join([*map(str, args), *(f"{key}={value}" for key, value in options.items())])
        raise RecipeError(f"{what} is a {type(factory).__name__}, which cannot be called with {given or 'nothing'}")
    try:
        return call(factory, what, *args, **options)
    except SPPOError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{what} raised {type(error).__name__}: {error}{_line_of(error)}") from error
