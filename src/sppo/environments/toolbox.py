"""Tools that a policy may call: Python functions with types and a docstring, and the methods of an object.

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.

        Args:
            a: The first.
            b: The second.
        \"\"\"
        return a + b

Their JSON schemas are transformers' own (`get_json_schema`), as TRL and chat templates have them. What a call passes is checked against the
schema; whatever is wrong with a call, and whatever a tool raises, is a sentence that the policy reads. Only what is no fault of the call
(`NOT_THE_CALLS`) masks the trajectory: `Broken`, a server that is gone, memory that is used up.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from ..errors import RecipeError, UserError
from .base import POSITIONAL, Broken, Call

Tool = Callable[..., Any]
NOT_THE_CALLS = (Broken, ConnectionError, TimeoutError, MemoryError, UserError)
"""What a tool raises that says nothing about the call."""
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip
"""Python's types of what JSON schemas call a type."""
WORDS = {"True": True, "False": False, "None": None}
"""Qwen 3.5's template writes them as Python does."""


class Toolbox:
    """Several tools by their names."""

    def __init__(self, tools: Sequence[Any], output: int = 4000) -> None:
        """`tools` are functions, or objects whose public methods are tools; `output` is how many characters of a result are shown.

        Raises RecipeError for one that cannot be described, or a name that two have."""
        self.tools: dict[str, Tool] = {}
        self.schemas: list[dict[str, Any]] = []
        self.output = output
        for tool in (found for given in tools for found in functions_of(given)):
            schema = schema_of(tool)
            name = schema["function"]["name"]
            if name in self.tools:
                raise RecipeError(f"environment.tools: two tools have the name {name!r}")
            self.tools[name] = tool
            self.schemas.append(schema)

    def call(self, call: Call) -> tuple[str, bool]:
        """What a call gives, for the policy to read, and whether it worked.

        Raises what a tool raises where that is no fault of the call's."""
        wrong, arguments = call.error, dict[str, Any]()
        if not wrong:
            try:
                arguments = self._arguments(call)
            except ValueError as error:
                wrong = str(error)
        if wrong:
            return shortened(f"error: {wrong}", self.output), False
        try:
            found = awaited(self.tools[call.name](**arguments))
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except NOT_THE_CALLS:
            raise
        except Exception as error:  # what a tool raises is the policy's to read
            return shortened(f"error: {type(error).__name__}: {error}", self.output), False
        return shortened(text, self.output), True

    def _arguments(self, call: Call) -> dict[str, Any]:
        """What to call a tool with. Raises ValueError with a sentence for the policy."""
        schema = next((s["function"] for s in self.schemas if s["function"]["name"] == call.name), None)
        if schema is None:
            raise ValueError(f"there is no tool {call.name[:100]!r}; there are: {', '.join(self.tools)}")
        described: Mapping[str, Any] = schema["parameters"]["properties"]
        given = dict(call.arguments)
        placed = given.pop(POSITIONAL, []) if POSITIONAL not in described else []
        names = [name for name in described if name not in given]
        if len(placed) > len(names):
            raise ValueError(f"{call.name} takes {len(described)} arguments: {', '.join(described) or 'none'}")
        given |= dict(zip(names, placed, strict=False))
        if unknown := [name for name in given if name not in described]:
            raise ValueError(
                f"{call.name} has no argument {str(unknown[0])[:100]!r}; it takes: {', '.join(described) or 'none'}"
            )
        if missing := [name for name in schema["parameters"].get("required", []) if name not in given]:
            raise ValueError(f"{call.name} lacks the argument {missing[0]!r}")
        return {name: fitting(value, described[name], f"{call.name}: {name}") for name, value in given.items()}


def functions_of(given: Any) -> list[Tool]:
    """The tools that an object brings: itself, or its public methods. Raises RecipeError where there are none."""
    if inspect.isroutine(given):
        return [given]
    names = [name for name, _ in inspect.getmembers(type(given), inspect.isfunction) if not name.startswith("_")]
    found = [getattr(given, name) for name in names if name not in ("reset", "close", "get_reward")]
    if not found:
        raise RecipeError(
            f"environment.tools: {type(given).__name__} is no function, and has no public methods that could be tools"
        )
    return found


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a function. Raises RecipeError where its types or its docstring do not say what it takes."""
    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # transformers has its own kinds, which say what is missing
        name = getattr(tool, "__name__", type(tool).__name__)
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise RecipeError(
            f"environment.tools: {name} cannot be described to a model: {said[0]} (a tool has types, and a docstring with `Args:` that says "
            "what each argument is)"
        ) from error
    schema["function"].setdefault("parameters", {"type": "object", "properties": {}})
    schema["function"]["parameters"].setdefault("properties", {})
    return schema


def fitting(value: Any, schema: Mapping[str, Any], what: str) -> Any:
    """A value of the type that a schema asks for; texts are read as JSON where a text is not asked for, since some ways to write calls know
    nothing else. Raises ValueError with a sentence for the policy."""
    asked = schema.get("type")
    kinds = [asked] if isinstance(asked, str) else asked
    if not isinstance(kinds, list):  # a choice of several, or anything
        return value
    if schema.get("nullable"):
        kinds = [*kinds, "null"]
    if isinstance(value, str) and "string" not in kinds:
        try:
            value = WORDS[value.strip()] if value.strip() in WORDS else json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{what} must be {_one_of(kinds)}, not text") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be finite")
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        value = int(value)
    allowed = tuple(kind for name in kinds for kind in KINDS.get(name, (object,)))
    if not isinstance(value, allowed) or (isinstance(value, bool) and "boolean" not in kinds):
        raise ValueError(f"{what} must be {_one_of(kinds)}, not {_kind_of(value)}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{what} must be one of {', '.join(map(str, schema['enum']))}")
    return value


def shortened(text: str, most: int) -> str:
    """A text of at most about so many characters: its beginning and its end, where it is longer."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end]}\n[{len(text) - most:,} characters left out]\n{text[len(text) - end :]}"


def awaited(found: Any) -> Any:
    """A result, waited for where it is one to come."""

    async def come() -> Any:
        return await found

    return asyncio.run(come()) if inspect.isawaitable(found) else found


def _one_of(kinds: Sequence[str]) -> str:
    return " or ".join(f"{'an' if k[0] in 'aio' else 'a'} {k}" if k != "null" else "null" for k in kinds)


def _kind_of(value: Any) -> str:
    name = next((n for n, kinds in KINDS.items() if type(value) in kinds), type(value).__name__)
    return _one_of([name])
