"""Tools: what a model reads of them, what a call may pass, and what comes of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

import pytest

from sppo.environments.base import Call, Reply
from sppo.environments.loading import load_environment, tool_maker
from sppo.environments.toolbox import Toolbox, shortened
from sppo.environments.tools import Tools
from sppo.errors import RecipeError
from sppo.recipe.config import Config
from sppo.recipe.sections import EnvironmentSection
from sppo.types import Task


def search(query: str, most: int = 3, kind: Literal["web", "news"] = "web", exact: bool | None = None) -> list[str]:
    """Search for passages.

    Args:
        query: What to look for.
        most: How many.
        kind: Where.
        exact: Whether every word must be there.
    """
    return [f"{query} {kind} {exact}"] * most


async def later(number: float) -> float:
    """Give a number back after a while.

    Args:
        number: It.
    """
    await asyncio.sleep(0.001)
    return number


def breaks(how: str) -> str:
    """Fail.

    Args:
        how: In which way.
    """
    raise {"value": ValueError, "gone": ConnectionError}[how](how)


@pytest.fixture
def box() -> Toolbox:
    return Toolbox([search, later, breaks], output=200)


def test_schemas_say_what_a_function_takes(box):
    function = box.schemas[0]["function"]
    assert function["name"] == "search"
    assert function["parameters"]["required"] == ["query"]
    assert function["parameters"]["properties"]["kind"]["enum"] == ["web", "news"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"query": "a"}, '["a web None", "a web None", "a web None"]'),
        ({"*": ["a", 1]}, '["a web None"]'),
        ({"query": "a", "most": "1"}, '["a web None"]'),  # as a way to write calls gives it that knows only text
        ({"query": "a", "most": 1.0, "exact": "True"}, '["a web True"]'),
        ({"query": "a", "most": 1, "exact": None}, '["a web None"]'),
    ],
)
def test_a_call_that_fits_is_made(box, arguments, said):
    assert box.call(Call("search", arguments)) == (said, True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("find", {}), "there is no tool 'find'; there are: search, later, breaks"),
        (Call("search", {}), "search lacks the argument 'query'"),
        (Call("search", {"query": "a", "how": 1}), "search has no argument 'how'; it takes: query, most, kind, exact"),
        (Call("search", {"query": 3}), "search: query must be a string, not an integer"),
        (Call("search", {"query": "a", "most": True}), "search: most must be an integer, not a boolean"),
        (Call("search", {"query": "a", "most": "[1"}), "search: most must be an integer, not text"),
        (Call("search", {"query": "a", "kind": "books"}), "search: kind must be one of web, news"),
        (Call("search", {"*": ["a", 1, "web", True, 5]}), "search takes 4 arguments"),
        (Call("later", {"number": float("nan")}), "later: number must be finite"),
        (Call("breaks", {"how": "value"}), "ValueError: value"),
        (Call("x", {}, "the call is no JSON"), "the call is no JSON"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(box, call, said):
    text, worked = box.call(call)
    assert not worked
    assert text.startswith(f"error: {said}")


def test_what_is_no_fault_of_the_call_passes(box):
    with pytest.raises(ConnectionError):
        box.call(Call("breaks", {"how": "gone"}))


def test_a_result_that_is_to_come_is_waited_for(box):
    assert box.call(Call("later", {"number": 2})) == ("2", True)


def test_a_flood_is_cut_in_the_middle(box):
    text, _ = box.call(Call("search", {"query": "x" * 500, "most": 1}))
    assert len(text) < 260
    assert text.startswith('["xxx')
    assert text.endswith('None"]')
    assert shortened("abc", 3) == "abc"


class Store:
    """Two tools with a state."""

    def __init__(self, first: int = 0) -> None:
        self.items = [first]

    def put(self, item: int) -> int:
        """Put something in.

        Args:
            item: It.
        """
        self.items.append(item)
        return len(self.items)

    def total(self) -> int:
        """Add everything up."""
        return sum(self.items)

    def _inner(self) -> None:
        pass


def test_the_methods_of_an_object_are_tools_and_each_trajectory_has_its_own():
    one, other = (Tools([Store, lambda: later]) for _ in range(2))
    assert [s["function"]["name"] for s in one.reset(Task("t", "?")).tools] == ["put", "total", "later"]
    seen = one.step(Reply("", [Call("put", {"item": 5}), Call("total")]))
    assert [m["content"] for m in seen.messages] == ["2", "5"]
    assert [m["name"] for m in seen.messages] == ["put", "total"]
    assert not seen.done
    assert other.step(Reply("", [Call("total")])).messages[0]["content"] == "0"


def test_a_turn_without_a_call_is_the_last_one_and_so_is_the_last_that_is_allowed():
    assert Tools([Store]).step(Reply("done")).done
    tools = Tools([Store], turns=2)
    assert not tools.step(Reply("", [Call("total")])).done
    seen = tools.step(Reply("", [Call("total")]))
    assert seen.done
    assert seen.evidence == {"calls": 2, "failed_calls": 0, "out_of_turns": True}


def undescribed(x: int) -> int:
    return x


def untyped(x):
    """Something.

    Args:
        x: It.
    """


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([undescribed], "undescribed cannot be described"),
        ([untyped], "untyped cannot be described"),
        ([later, later], "two tools have the name"),
        ([object()], "no public methods"),
    ],
)
def test_what_is_no_tool_is_refused_in_a_sentence(tools: list[Callable], said: str):
    with pytest.raises(RecipeError, match=said):
        Toolbox(tools)


def test_tools_are_named_in_recipes(tmp_path, monkeypatch):
    (tmp_path / "mine_tools.py").write_text(
        'def twice(x: int) -> int:\n    """Twice.\n\n    Args:\n        x: It.\n    """\n    return 2 * x\n\n\n'
        "class Box:\n    def __init__(self, size=1):\n        self.size = size\n\n    def size_of(self) -> int:\n"
        '        """The size."""\n        return self.size\n'
    )
    monkeypatch.chdir(tmp_path)
    make = load_environment(
        EnvironmentSection(tools=("calculator", "mine_tools:twice", "mine_tools:Box,size=7"), turns=3)
    )
    tools = make()
    assert list(tools.box.tools) == ["calculate", "twice", "size_of"]
    calls = [Call("calculate", {"*": ["2*(3+4)^2"]}), Call("twice", {"x": 4}), Call("size_of")]
    assert [m["content"] for m in tools.step(Reply("", calls)).messages] == ["98", "8", "7"]
    with pytest.raises(RecipeError, match="takes no options"):
        tool_maker("mine_tools:twice,x=1")
    with pytest.raises(RecipeError, match=r"no 'calculater'.*calculator"):
        tool_maker("calculater")


def test_several_tools_stand_behind_each_other_on_the_command_line():
    given = Config.load(None, {"environment.tools": "calculator,python:wall=5,slots=2,mine:lookup"})
    assert given.environment.tools == ("calculator", "python:wall=5,slots=2", "mine:lookup")
    assert Config.load(None, {"environment.tools": ["calculator"]}).environment.tools == ("calculator",)
