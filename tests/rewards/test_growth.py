"""No pattern of the package, and no reader of a model's text, grows faster than linearly: measured to 100,000 characters.

Time is the processor's, and only how it grows is judged: a call that is quick at 100,000 characters is not looked at further; one that is not
must grow about as its input does. A slow or busy machine changes nothing.
"""

from __future__ import annotations

import ast
import gc
import importlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sppo
from sppo.errors import RecipeError
from sppo.rewards.answer import MODES
from sppo.rewards.confidence import stated_confidence
from sppo.rewards.extract import EXTRACT, extract_answer
from sppo.rewards.loading import load_reward
from sppo.rewards.segments import SEPARATORS
from sppo.types import Rollout, Task

ROOT = Path(sppo.__file__).parent
LARGE, MIDDLE, SMALL = 100_000, 24_000, 6_000
QUICK = 0.25
"""Seconds of processor time within which nothing at 100,000 characters is suspect."""
CAP = 1.5
"""Seconds of processor time after which a call is given up."""
FUNCTIONS = {"compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"}
DYNAMIC = {
    ("rewards/segments.py", "SEPARATORS[how]"), ("rewards/segments.py", "SEPARATORS[split]"),
}  # fmt: skip
"""Patterns that are chosen at run time, from tables that are tested here as well."""


class TooSlow(BaseException):
    """The processor-time limit of one call."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow once the process has used so much processor time: `re` looks for signals while it matches."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def cost(call: Callable[[str], Any], text: str, limit: float) -> float:
    """Seconds of processor time; without the garbage collector, which would walk all that other tests left."""
    gc.disable()
    began = time.process_time()
    try:
        with cpu_limit(limit):
            call(text)
        return time.process_time() - began
    except TooSlow:
        return float("inf")
    finally:
        gc.enable()


def grows(call: Callable[[str], Any], form: Callable[[int], str]) -> str | None:
    """How a call grows where that is faster than linearly, or None. The least of three times is judged: whoever shares the processor's caches makes one
    of them long, not all."""
    if cost(call, form(LARGE), QUICK) <= QUICK:
        return None
    middle = cost(call, form(MIDDLE), CAP)
    again = 2 if middle < CAP else 0  # what takes that long is not near any line
    middle = min([middle, *(cost(call, form(MIDDLE), CAP) for _ in range(again))])
    small = min(cost(call, form(SMALL), CAP) for _ in range(1 + again))
    if middle < CAP and middle <= 8 * max(small, 0.005):  # four times the text
        return None
    return f"{small:.3f} s at {SMALL} characters, {middle:.3f} s at {MIDDLE} (inf: over {CAP:g} s)"


@dataclass(frozen=True)
class Use:
    """A pattern, and what the package does with it."""

    pattern: re.Pattern[str]
    methods: frozenset[str]


def patterns() -> dict[str, Use]:
    """Every pattern that the package writes, by where it stands. One that cannot be found out fails the test."""
    found: dict[str, Use] = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        used: dict[str, set[str]] = {}
        for call in calls:
            used.setdefault(ast.unparse(call.func.value), set()).add(call.func.attr)
        assigned = {id(n.value): ast.unparse(n.targets[0]) for n in ast.walk(tree) if isinstance(n, ast.Assign)}
        for node in calls:
            if ast.unparse(node.func.value) != "re" or node.func.attr not in FUNCTIONS:
                continue
            if (name, ast.unparse(node.args[0])) in DYNAMIC:
                continue
            scope = {} if isinstance(node.args[0], ast.Constant) else _scope(name)
            flags = next((k.value for k in node.keywords if k.arg == "flags"), None)
            if flags is None and node.func.attr == "compile" and len(node.args) > 1:
                flags = node.args[1]
            value = eval(ast.unparse(flags), {"re": re}) if flags is not None else 0
            methods = used.get(assigned.get(id(node), ""), set()) & FUNCTIONS or FUNCTIONS - {"compile"}
            where = f"{name}:{node.lineno}"
            found[where] = Use(
                re.compile(_text(node.args[0], scope, where), value),
                frozenset(methods if node.func.attr == "compile" else {node.func.attr}),
            )
    return found | {
        f"SEPARATORS[{name}]": Use(re.compile(p), frozenset({"finditer"})) for name, p in SEPARATORS.items()
    }


def calls_of(use: Use) -> list[Callable[[str], Any]]:
    """What the package calls, as functions of a text. All that look through a text cost what `finditer` does."""
    out: list[Callable[[str], Any]] = []
    if use.methods & {"sub", "subn", "split", "findall", "finditer"}:
        out.append(lambda text: sum(1 for _ in use.pattern.finditer(text)))
    elif "search" in use.methods:
        out.append(use.pattern.search)
    if use.methods & {"fullmatch", "match"}:
        out.append(use.pattern.fullmatch if "fullmatch" in use.methods else use.pattern.match)
    return out


def _text(node: ast.expr, scope: dict[str, Any], where: str) -> str:
    """A pattern's text. A local name in an f-string is a word; a pattern that is only a local name must be in DYNAMIC."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else _text(part.value, scope | {"?": "name"}, where)  # type: ignore[attr-defined]
            for part in node.values
        )
    try:
        return str(eval(ast.unparse(node), dict(scope)))
    except NameError:
        if "?" in scope:
            return "name"
        pytest.fail(
            f"{where}: the pattern {ast.unparse(node)} is chosen at run time; test where it comes from, and name it in DYNAMIC"
        )


def _scope(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module("sppo." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    except ImportError:  # an extra that is not installed
        return {"re": re}
    return {**vars(module), "re": re}


def hostile_forms(pattern: str) -> list[Callable[[int], str]]:
    """Texts that make a backtracking matcher work: what the pattern itself repeats, over and over, and an end that fits nothing."""
    literals = [c for c in dict.fromkeys(re.sub(r"\\[a-zA-Z]|[()\[\]{}?*+|^$\\]", "", pattern)) if c.isprintable()]
    units = [" ", "\n", "a", "1", "a ", "1,", *literals[:6]]
    units += ["".join(literals[:8]), "1 ", "\\", "(", "a1 "]
    words = re.findall(r"[A-Za-z<>/#$]{3,}", pattern)
    units += [f"{word} " for word in words[:3]] + words[:1]
    forms: list[Callable[[int], str]] = [
        lambda n, unit=unit: (unit * (n // len(unit) + 1))[:n] + "\x00" for unit in dict.fromkeys(units) if unit
    ]
    return forms


@pytest.mark.slow
def test_every_pattern_of_the_package_is_linear() -> None:
    found = patterns()
    assert len(found) > 20
    slow = []
    for where, use in found.items():
        tried = ((call, form) for form in hostile_forms(use.pattern.pattern) for call in calls_of(use))
        why = next(((form(12), why) for call, form in tried if (why := grows(call, form))), None)
        if why is not None:
            slow.append(f"{where} {use.pattern.pattern!r} on {why[0]!r}…: {why[1]}")
    assert not slow, "\n".join(slow)


def test_the_measure_itself_tells_quadratic_and_exponential_patterns_from_linear_ones() -> None:
    assert grows(re.compile(r"\s+x").search, lambda n: " " * n) is not None
    assert grows(re.compile(r"(a|a)*b").search, lambda n: "a" * n) is not None
    assert grows(re.compile(r"\d+x?").search, lambda n: "1" * n) is None


def readers() -> dict[str, Callable[[str], Any]]:
    """What looks at a model's text without a pattern, or with several."""
    out: dict[str, Callable[[str], Any]] = {
        f"extract {how}": lambda text, how=how: extract_answer(text, how, mathematics=True) for how in EXTRACT
    }
    modes = [f"answer:extract=whole,mode={mode}" for mode in MODES]
    forms = ["format:tags=think+answer,boxed=true", r"format:pattern=(a+)+b$", r"format:pattern=(\s*\w+)*;"]
    steps = [f"steps:check=arithmetic,split={split}" for split in SEPARATORS]
    for spec in (*modes, *forms, *steps):
        reward = load_reward(spec)
        task = Task("t", "q", {"answer": "B", "choices": ["x", "y"]} if "choice" in spec else {"answer": "1"})
        out[spec] = lambda text, reward=reward, task=task: reward.judge(
            [Rollout.answer(task, [], [], [], "stop", text)]
        )
    return out | {"confidence": stated_confidence}


HOSTILE = [
    *(
        " ",
        "1,",
        "(",
        "9",
        "1 ",
        "1/",
        "1e",
        "-",
        "=1",
        "1+1=2 ",
        "m/",
        "a and ",
        "a b ",
        "I a ",
        "A or B ",
        "{}",
        "}",
        "**",
        ". ",
        ", so ",
        " (",
    ),
    *(
        "####",
        "#### \n",
        "\\boxed",
        "\\boxed{",
        "\\boxed{}",
        "\\fbox ",
        "$",
        "$ ",
        "$a ",
        "$1$",
        "\\(",
        "\\[",
        "$$",
        "\n \n",
        "C:",
        "confidence: ",
    ),
    *(
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "<think>",
        "</think>",
        "Answer:",
        "answer is ",
        "A:",
        "Answer: not 1\n",
        "final answer\n",
    ),
    *("not 1 ", "1 is wrong ", "<answer>\\boxed{"),
]


@pytest.mark.slow
def test_every_reader_of_a_models_text_is_linear() -> None:
    slow = []
    for name, call in readers().items():
        for unit in HOSTILE:
            if why := grows(call, lambda n, unit=unit: (unit * (n // len(unit) + 1))[:n] + "xx"):
                slow.append(f"{name} on {unit!r}…: {why}")
    assert not slow, "\n".join(slow)


def test_a_pattern_that_is_not_linear_is_refused() -> None:
    for pattern in (r"(?=a)b", r"(a)\1", "("):
        with pytest.raises(RecipeError, match="matched in linear time"):
            load_reward(f"format:pattern={pattern}")
    reward = load_reward(r"format:pattern=^A:\d+$")
    outcomes = [
        reward.judge([Rollout.answer(Task("t", "q"), [], [], [], "stop", text)])[0].outcome
        for text in ("x\nA:5\ny", "A:x")
    ]
    assert outcomes == ["correct", "unparseable"]
