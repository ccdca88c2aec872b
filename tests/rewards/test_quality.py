"""Static findings on programs that would pass their tests, by the real analysers."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator

import pytest

from sppo.errors import RecipeError
from sppo.rewards.branches import outside_functions
from sppo.rewards.hidden import hidden
from sppo.rewards.loading import load_reward
from sppo.rewards.quality import QualityReward
from sppo.types import Rollout, Task, Verdict

CLEAN = "def f(x):\n    return x * x\n"
SHELL = "import subprocess\ndef f(x):\n    return subprocess.check_output('echo ' + x, shell=True)\n"
EVAL = "def f(x):\n    return eval(x)\n"
TANGLE = "def f(x):\n" + "".join(f"    if x == {i}:\n        return {i * i}\n" for i in range(14)) + "    return 0\n"
DEFAULT = "def f(x, kept=[]):\n    kept.append(x)\n    return kept\n"


@pytest.fixture(scope="module")
def reward() -> Iterator[QualityReward]:
    made = load_reward("quality")
    assert isinstance(made, QualityReward)
    yield made
    made.close()


def rules(verdict: Verdict) -> set[str]:
    return {f["rule"] for f in verdict.evidence["findings"]}


def test_findings_and_what_they_weigh(reward: QualityReward) -> None:
    texts = [
        CLEAN,
        f"Here:\n```python\n{SHELL}```",
        EVAL,
        TANGLE,
        DEFAULT,
        "no code here, sorry",
        "def f(x):\n    assert x\n    return x\n",
    ]
    verdicts = reward.judge([Rollout.answer(Task("t", "?"), [], [], [], "stop", text) for text in texts])
    clean, shell, evaluates, tangle, default, prose, asserting = verdicts
    assert (clean.score, clean.evidence["findings"]) == (1.0, [])
    assert "B602" in rules(shell)
    assert shell.score <= 0.5
    assert rules(evaluates) == {"B307"}
    assert evaluates.score == 0.75
    assert {"C901", "PLR0911"} <= rules(tangle)
    assert rules(default) == {"B006"}
    assert default.score == 0.9
    assert (prose.outcome, prose.score) == ("unparseable", 0)
    assert asserting.score == 1.0
    assert shell.evidence["measures"]["grave_findings"] == 1


def test_its_author_cannot_silence_it(reward: QualityReward) -> None:
    quiet = EVAL.replace("eval(x)", "eval(x)  # nosec  # noqa")
    silent = "# ruff: noqa\n# flake8: noqa\n" + DEFAULT
    first, second = reward.judge([Rollout.answer(Task("t", "?"), [], [], [], "stop", text) for text in (quiet, silent)])
    assert rules(first) == {"B307"}
    assert rules(second) == {"B006"}


def test_what_cannot_be_read_is_not_clean(reward: QualityReward) -> None:
    texts = [f"# coding: {name}\n{SHELL}" for name in ("foo", "utf-7", "utf-16", "undefined")]
    texts += [f"```python\n{SHELL}def (:\n```", f"exec({SHELL!r})"]
    verdicts = reward.judge([Rollout.answer(Task("t", "?"), [], [], [], "stop", text) for text in texts])
    assert all("B602" in rules(v) for v in verdicts[:4])
    assert (verdicts[4].outcome, verdicts[4].score) == ("unparseable", 0)
    assert verdicts[5].score == 0


def test_as_a_part_of_a_mixture() -> None:
    task = Task("t", "?", {"tests": ["assert f('7') == 7"]})
    rollout = Rollout.answer(task, [], [], [], "stop", EVAL)
    for use, score in (("code + 1 * quality", 0.875), ("code + 0 * quality", 1.0), ("code gate quality", 1.0)):
        mixed = load_reward(use)
        verdict = mixed.judge([rollout])[0]
        mixed.close()
        assert (verdict.score, verdict.correct) == (score, 1.0)
        assert verdict.evidence["measures"]["findings"] == 1
    for use in ("0 * code", "0 * code + 0 * quality", "quality:complexity=none"):
        with pytest.raises(RecipeError):
            load_reward(use)


SECRET = "def f(x):\n    import subprocess\n    return subprocess.check_output(x, shell=True)\n"
HIDES = {
    "attribute": f"import builtins\nbuiltins.exec({SECRET!r})",
    "renamed": f"import builtins as b\nb.exec({SECRET!r})",
    "from": f"from builtins import exec as run\nrun({SECRET!r})",
    "from, in a function": f"def g():\n    from builtins import exec as run\n    run({SECRET!r})\ng()",
    "star": "from builtins import *\n",
    "alias": f"e = exec\ne({SECRET!r})",
    "walrus": f"(e := exec)({SECRET!r})",
    "default": f"def g(e=exec):\n    e({SECRET!r})\ng()",
    "argument": f"def g(e):\n    e({SECRET!r})\ng(exec)",
    "container": f"[exec][0]({SECRET!r})",
    "map": f"list(map(exec, [{SECRET!r}]))",
    "key": "sorted(['f()'], key=eval)",
    "partial": f"from functools import partial\npartial(exec, {SECRET!r})()",
    "decorator": f"@exec\n@lambda _: {SECRET!r}\ndef z(): pass",
    "class decorator": "@eval\nclass A: pass",
    "conditional": f"(exec if True else print)({SECRET!r})",
    "thread": f"import threading\nthreading.Thread(target=exec, args=({SECRET!r},)).start()",
    "property": f"class A:\n    __getattr__ = exec\nA().__getattr__({SECRET!r})",
    "function type": f"import types\ntypes.FunctionType(compile({SECRET!r}, 'x', 'exec'), globals())()",
    "type of a function": f"type(lambda: 0)(compile({SECRET!r}, 'x', 'exec'), globals())()",
    "code replaced": "def f(x): pass\ndef g(x): pass\nf.__code__ = g.__code__",
    "marshal": "import marshal, types\ntypes.FunctionType(marshal.loads(b''), {})()",
    "eval of compile": f"eval(compile({SECRET!r}, 'x', 'exec'))",
    "eval of a text": "eval(\"__import__('os').system('ls')\")",
    "eval of a variable": "code = \"__import__('os')\" + '.system(1)'\neval(code)",
    "eval of joined": "eval(''.join(['__im', 'port__(1)']))",
    "builtins by name": "getattr(__builtins__, 'exec')('1')",
    "builtins as a dictionary": "__builtins__['exec']('1')",
    "builtins of globals": "globals()['__builtins__']['exec']('1')",
    "builtins of a renamed globals": "g = globals()\ng['__buil' + 'tins__'].exec('1')",
    "builtins of a function": "(lambda: 0).__globals__['__builtins__']['exec']('1')",
    "builtins of print": "print.__self__.exec('1')",
    "by reversed name": "import builtins\ngetattr(builtins, 'cexe'[::-1])('1')",
    "by numbers": "import builtins\nvars(builtins)[''.join(map(chr, [101, 120, 101, 99]))]('1')",
    "by variables": "a, = 'x',\np = 'ex'\nq = 'ec'\nimport builtins\ngetattr(builtins, p + q)('1')",
    "attrgetter": "import operator, builtins\noperator.attrgetter('exec')(builtins)('1')",
    "methodcaller": "import operator, builtins\noperator.methodcaller('exec', '1')(builtins)",
    "sys.modules": "import sys\nsys.modules['builtins'].exec('1')",
    "sys.modules renamed": "from sys import modules as m\nm['built' + 'ins'].exec('1')",
    "import_module": "import importlib\nimportlib.import_module('builtins').exec('1')",
    "import_module renamed": "from importlib import import_module as load\nload('built' + 'ins').exec('1')",
    "__import__": "__import__('builtins').exec('1')",
    "__import__ of pieces": "m = __import__('pick' + 'le')\nm.loads(b'')",
    "__import__ as a value": "i = __import__\ni('os').system('ls')",
    "subclasses": "().__class__.__base__.__subclasses__()[100]",
    "loader": "import importlib.util as u\ns = u.spec_from_loader('m', u.abc)",
    "machinery": "from importlib.machinery import SourceFileLoader\nSourceFileLoader('m', 'x').load_module()",
    "runpy": "import runpy\nrunpy.run_path('x')",
    "code": "import code\ncode.InteractiveInterpreter().runsource('1')",
    "timeit": f"import timeit\ntimeit.timeit({SECRET!r}, number=1)",
    "timeit by variable": f"from timeit import timeit as t\ns = {SECRET!r}\nt(stmt=s)",
    "profile": f"import cProfile\ncProfile.run({SECRET!r})",
    "frame": "import sys\nsys._getframe().f_builtins['exec']('1')",
    "garbage": "import gc\ngc.get_objects()",
    "ctypes": "import ctypes\nctypes.pythonapi.PyRun_SimpleString(b'1')",
    "annotation": "import typing\ndef g(a: \"print('x')\"): pass\ntyping.get_type_hints(g)",
    "doctest": "def z():\n    \"\"\"\n    >>> e = exec\n    >>> e('1')\n    \"\"\"\nimport doctest\ndoctest.testmod()",
    "bound elsewhere": f"def g(exec): pass\nlist(map(exec, [{SECRET!r}]))",
    "bound later": f"list(map(exec, [{SECRET!r}]))\nexec = print",
    "bound and unbound": f"exec = print\ndel exec\nlist(map(exec, [{SECRET!r}]))",
    "bound to itself": f"exec = exec\nlist(map(exec, [{SECRET!r}]))",
    "os by name": "import os\ngetattr(os, 'sys' + 'tem')('ls')",
    "os by a name from elsewhere": "import os\ndef f(n, c): return getattr(os, n)(c)",
}  # fmt: skip
HARMLESS = (
    "pass", CLEAN, "import re\nP = re.compile('a+')\ndef f(x): return P.sub('', x)", "from re import compile\nP = compile('a')",
    "def compile(tokens): return tokens\ndef f(x): return compile(x)", "class Parser:\n    def eval(self, t): return self.eval(t[1:]) if t else 0",
    "class V:\n    def visit(self, n): return getattr(self, 'visit_' + type(n).__name__, self.other)(n)\n    def other(self, n): return n",
    "def f(x, name): return getattr(x, name)", "import builtins\ndef f(x): return builtins.max(x)",
    "import sys\ndef f(): return 'numpy' in sys.modules",
    "def f(x): return {'exec': 1, 'eval': 2}[x]", "import math\ndef f(n, x): return getattr(math, n)(x)", "def f(net, x):\n    net.eval()\n    return net(x)",
    "def f(g): return g.__code__.co_argcount", "import timeit\ndef f(g): return timeit.timeit(g, number=3)",
    "class A: pass\ndef f(): return A.__subclasses__()",
    "def f(x, t): return isinstance(x, type(t))", "import os\ndef f(): return os.path.join('a', 'b'), os.environ.get('HOME')",
    "import inspect\ndef f(g): return inspect.signature(g)", "import sys\nsys.setrecursionlimit(10**6)\nread = sys.stdin.readline",
    "read = __import__('sys').stdin.readline",
    "from functools import lru_cache\n@lru_cache(maxsize=None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
    "def f(x: 'list[int]') -> 'int': return sum(x)", "import importlib.util\ndef f(): return importlib.util.find_spec('numpy') is not None",
    '"""Adds.\n\n>>> f(1)\n2\n"""\ndef f(x): return x + 1\nif __name__ == "__main__":\n    import doctest\n    doctest.testmod()',
)  # fmt: skip


@pytest.mark.parametrize("how", HIDES)
def test_code_from_text_is_found_however_it_is_reached(reward: QualityReward, how: str) -> None:
    program = f"```python\ndef f(x): pass\n{HIDES[how]}\n```"
    verdict = reward.judge([Rollout.answer(Task("t", "?"), [], [], [], "stop", program)])[0]
    assert (verdict.outcome, verdict.score) == ("wrong", 0), verdict.evidence


def test_harmless_programs_are_left_alone() -> None:
    assert {code: found for code in HARMLESS if (found := hidden(ast.parse(code)))} == {}


def test_what_the_analysers_judge_by_its_call_is_found_as_a_value() -> None:
    for code in (
        "import os\nlist(map(os.system, []))",
        "from subprocess import run as r\nx = r",
        "import pickle as p\nload = p.loads",
    ):
        assert [f["rule"] for f in hidden(ast.parse(code))] == ["ALIAS"], code
    assert hidden(ast.parse("import subprocess\nsubprocess.run(['ls'])")) == []  # the analysers' own affair


def test_a_plain_eval_is_the_analysers_affair(reward: QualityReward) -> None:
    programs = [
        EVAL,
        "def f(a, op, b):\n    return eval(f'{a} {op} {b}')\n",
        "def f(x):\n    return eval(x.replace('x', '*'))\n",
    ]
    verdicts = reward.judge([Rollout.answer(Task("t", "?"), [], [], [], "stop", p) for p in programs])
    assert [v.score for v in verdicts] == [0.75] * 3


def test_branches_outside_functions_count_as_those_inside(reward: QualityReward) -> None:
    branches = "".join(f"if 1 == {i}:\n    x = {i}\n" for i in range(30))
    in_class = "class A:\n" + "".join(f"    {line}\n" for line in branches.splitlines())
    chain = "f = lambda a: " + " if a else ".join("1" for _ in range(30))
    in_function = "def f(a):\n    return " + " if a else ".join("1" for _ in range(30))
    verdicts = reward.judge(
        [Rollout.answer(Task("t", "?"), [], [], [], "stop", p) for p in (branches, in_class, chain, in_function)]
    )
    for verdict in verdicts:
        assert {"C901", "PLR0912"} <= rules(verdict)
        assert verdict.score < 0.5
    assert {f["line"] for f in verdicts[3].evidence["findings"]} == {2}
    few = "for i in range(3):\n    if i:\n        print(i)\n    else:\n        print(1 if i else 2)\n"
    assert outside_functions(ast.parse(few)) == ("", [])


def test_the_search_for_hidden_code_is_quick_on_what_refers_to_itself() -> None:
    """Programs whose variables are made of each other: each is looked at once."""
    many = (
        "".join(f"v{i} = v{i - 1} + v{i - 2} + v{i - 1}\n" for i in range(2, 800))
        + "eval(v799)\ngetattr(print, v799)\n"
    )
    own = "x = x + x\n" * 800 + "eval(x)\n"
    began = time.process_time()
    for code in (many, own):
        hidden(ast.parse(code))
    deep = "getattr(print, " + "a." * 2000 + "b)\nexec"
    assert hidden(ast.parse(deep))[0]["rule"] == "EXEC"
    assert time.process_time() - began < 20
