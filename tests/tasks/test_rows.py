"""Rows of code: what can fail nobody is refused, by the row alone; what can be judged is, however its tests are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from sppo.rewards.code import CodeReward, build
from sppo.sandbox import Job
from sppo.tasks.records import task_from
from sppo.types import Rollout, Task, Verdict

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)
RIGHT, WRONG, NONE = "def f(x): return x * x", "def f(x): return x + x", "def f(x): return None"
CASE = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(7), 49)\n    def test_g(self):\n        with self.assertRaises(TypeError): f('ab')\n"
TEST = "def test():\n    assert f(7) == 49\n"
YES = "class J:\n    def __getattr__(self, name): return lambda *a, **k: True\n    def __bool__(self): return True\ndef f(*x): return J()"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    made = build(cpu=2, wall=6)
    yield made
    made.close()


def judge(reward: CodeReward, program: str, columns: dict[str, Any], prompt: str = "write it") -> Verdict:
    rollout = Rollout.answer(Task("row", prompt, columns), [], [], [], "stop", f"```python\n{program}\n```")
    return reward.judge([rollout])[0]


def test_bigcodebenchs_cases_are_run_without_a_runner(reward: CodeReward) -> None:
    row = {"test": CASE.replace("class T(", "class TestCases("), "entry_point": "f"}
    assert [judge(reward, program, row).outcome for program in (RIGHT, WRONG, NONE)] == ["correct", "wrong", "wrong"]


@pytest.mark.parametrize("column", ["tests", "test"])
@pytest.mark.parametrize(
    "run",
    [
        "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))",
        "suite = unittest.TestSuite([T('test_f'), T('test_g')])\nunittest.TextTestRunner().run(suite)",
        "unittest.main()", "unittest.main(exit=False)", "unittest.main(T.__module__, argv=['x'], exit=False)",
        "T('test_f').run()", "T('test_f').debug()", "unittest.TestSuite([T('test_f')]).run(unittest.TestResult())",
        "if __name__ == '__main__':\n    unittest.main()",
    ],
)  # fmt: skip
def test_unittest_is_judged_whoever_reads_its_result(reward: CodeReward, run: str, column: str) -> None:
    row = {column: CASE + run if column == "test" else [CASE + run], "entry_point": "f"}
    outcomes = [judge(reward, program, row).outcome for program in (RIGHT, WRONG, NONE)]
    assert outcomes == ["correct", "wrong", "wrong"]


@pytest.mark.parametrize(
    "test",
    [
        "async " + TEST + "test()", "def test():\n    yield\n    assert f(7) == 49\ntest()", TEST + "print(test)", TEST,
        TEST + "try:\n    test()\n    print('ok')\nexcept AssertionError as error:\n    print('failed', error)",
        "import contextlib\nwith contextlib.suppress(AssertionError):\n    assert f(7) == 49",
        "def check(candidate):\n    def inner():\n        assert candidate(7) == 49\ncheck(f)",
        "def check(candidate):\n    assert True\n    return candidate(7) == 49\ncheck(f)",
        "def test():\n    try:\n        assert f(7) == 49\n    finally:\n        return\ntest()",
        "if __name__ == 'main':\n    assert f(7) == 49", "for x, y in []:\n    assert f(x) == y",
        "assert f(7) == 49 or True", "assert 'f(7) == 49'", "f(7) == 49", "print(f(7) == 49)", "(lambda: f(7) == 49)()",
        "assert isinstance(f(7), int)", "assert f(7) >= f(7)", "assert f(7) - f(7) == 0", "assert isinstance(f(7), str)", "assert len(f(7)) >= 0",
        "import unittest\nunittest.TestCase().assertIsInstance(f(7), list)", "assert f(7) is not None", "assert f(7) is None", "assert f(7) != 50", CASE,
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool: pool.submit(lambda: 1 / (f(7) == 49))",
    ],
)  # fmt: skip
def test_what_can_fail_nobody_is_refused(reward: CodeReward, test: str) -> None:
    row = {"tests": [test], "entry_point": "f"}
    assert reward.check(Task("row", "write f", row)) is not None
    assert {judge(reward, program, row).outcome for program in (RIGHT, NONE)} == {"invalid_task"}
    hidden = {"tests": ["assert f(7) == 49"], "hidden_tests": [test], "entry_point": "f"}
    assert judge(reward, RIGHT, hidden).outcome == "invalid_task"


def test_an_assertion_of_a_tuple_is_refused(reward: CodeReward) -> None:
    test = "assert (f(7) == 49, 'wrong')"
    assert judge(reward, RIGHT, {"tests": [test], "entry_point": "f"}).outcome == "invalid_task"


@pytest.mark.parametrize(
    "row",
    [
        {"tests": [{"args": [1], "expected": None}], "entry_point": "f"},
        {"tests": [{"input": "1", "output": ""}, {"input": "2", "output": "\n"}]},
        {"tests": {"inputs": ["1"], "outputs": [""]}},
        {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[None]]}},
    ],
)
def test_examples_that_expect_nothing_are_refused(reward: CodeReward, row: dict[str, Any]) -> None:
    verdict = judge(reward, NONE, row)
    assert (verdict.outcome, "no program can fail it" in verdict.evidence["reason"]) == ("invalid_task", True)


def test_a_thread_and_an_awaited_test_are_judged(reward: CodeReward) -> None:
    thread = f"import threading\n{TEST}t = threading.Thread(target=test)\nt.start()\nt.join()"
    awaited = f"import asyncio\nasync {TEST}asyncio.run(test())"
    for test in (thread, awaited):
        row = {"tests": [test], "entry_point": "f"}
        assert [judge(reward, p, row).outcome for p in (RIGHT, WRONG)] == ["correct", "wrong"]


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (["assert f('ab').startswith('x')", "assert f('q').endswith('zz')"], YES),
        (["assert f(7).equals([4, 9])"], YES), (["r = f(7)\nassert r.equals(49)"], YES),
        (["assert f([1]).issubset({1, 2, 3})", "assert f([1]).isdisjoint({4})"], YES),
        (["assert f(7).is_right()"], YES), (["assert f(7).matches(49) == True"], YES), (["assert f(7).right"], YES),
        (["if not f(7).matches(49): raise AssertionError"], YES), (["assert all(x.matches(1) for x in [f(7)])"], YES),
        (["import unittest\nunittest.TestCase().assertTrue(f(7).matches(49))"], YES), (["assert f(7)"], YES),
    ],
)  # fmt: skip
def test_an_object_that_says_yes_is_not_paid(reward: CodeReward, tests: list[str], program: str) -> None:
    assert judge(reward, program, {"tests": tests, "entry_point": "f"}).outcome in ("wrong", "invalid_task")


@pytest.mark.parametrize(
    ("tests", "cheat"),
    [
        (["assert np.allclose(Solution().f(7), 49.0)"], "class np:\n    allclose = staticmethod(lambda *a, **k: True)\nclass Solution:\n    def f(self, x): return 0"),
        (["assert isclose(Solution().f(7), 49.0)"], "def isclose(*a, **k): return True\nclass Solution:\n    def f(self, x): return 0"),
        (["np.testing.assert_allclose(Solution().f(7), 49)"], "class np:\n    class testing:\n        assert_allclose = staticmethod(lambda *a: None)\nclass Solution:\n    def f(self, x): return 0"),
        (["assert same(F(7), 49)"], "def same(a, b): return True\ndef F(x): return 0"),
        (["assert_equal(F(7), 49)", "assert F(1) == 1"], "def assert_equal(a, b): pass\ndef F(x): return x"),
        (["assert F(7).equals([4, 9])", "assert F(1) == 1"], "class J:\n    def __getattr__(self, n): return lambda *a: True\ndef F(x): return 1 if x == 1 else J()"),
        (["assert f(7) == EXPECTED"], "EXPECTED = 0\ndef f(x): return 0"), (["assert f(7) == expected(7)"], "def expected(x): return 0\ndef f(x): return 0"),
        (["assert eval(f(7)) == 49"], "def f(x): return '49'"),
    ],
)  # fmt: skip
def test_no_program_brings_its_own_judge(reward: CodeReward, tests: list[str], cheat: str) -> None:
    assert judge(reward, cheat, {"tests": tests}).outcome in ("wrong", "invalid_task")


@pytest.mark.parametrize(
    ("test", "program"),
    [
        ("import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b):\n    f(7)\nassert b.getvalue() == '49\\n'", "def f(x): print(x * x)"),
        ("import io\nfrom unittest.mock import patch\nwith patch('sys.stdout', new_callable=io.StringIO) as out:\n    f(7)\nassert out.getvalue() == '49\\n'", "def f(x): print(x * x)"),
        ("from unittest.mock import patch\nwith patch('builtins.print') as shown:\n    f(7)\nshown.assert_called_with(49)", "def f(x): print(x * x)"),
        ("from unittest.mock import patch\nwith patch('builtins.input', return_value='7'):\n    assert f() == 49", "def f(): return int(input()) ** 2"),
        ("from unittest.mock import patch\n@patch('builtins.input', side_effect=['3', '4'])\ndef test(_):\n    assert f() == 7\ntest()", "def f(): return int(input()) + int(input())"),
        ("import sys, io\nsys.stdin = io.StringIO('3\\n4\\n')\nassert f() == 7", "import sys\ndef f(): return sum(map(int, sys.stdin))"),
        ("from unittest.mock import patch\nwith patch('random.randint', return_value=3):\n    assert f() == 9", "import random\ndef f(): return random.randint(1, 6) ** 2"),
        ("import random\nrandom.seed(1)\na = [f() for _ in range(3)]\nrandom.seed(1)\nassert a == [random.random() for _ in range(3)]", "import random\ndef f(): return random.random()"),
        ("open('/tmp/a.txt', 'w').write('7')\nassert f('/tmp/a.txt') == 49", "def f(p): return int(open(p).read()) ** 2"),
        ("import os, tempfile\nwith tempfile.TemporaryDirectory() as d:\n    p = os.path.join(d, 'a')\n    f(p)\n    assert open(p).read() == '49'", "def f(p): open(p, 'w').write('49')"),
        ("with f() as v:\n    assert v == 49", "class f:\n    def __enter__(self): return 49\n    def __exit__(self, *a): pass"),
        ("assert f(7)(2) == 14", "def f(x): return lambda y: x * y"), ("a, b = f()\nassert a(1) == 2 and b(1) == 3", "def f(): return [lambda x: x + 1, lambda x: x + 2]"),
        ("import asyncio\nassert asyncio.run(f(7)) == 49", "async def f(x): return x * x"),
        ("import asyncio\nasync def test():\n    assert await f(7) == 49\nasyncio.run(test())", "async def f(x): return x * x"),
        ("assert f('ab').group(0) == 'ab' and f('ab') and not f('cd')", "import re\ndef f(s): return re.match('ab', s)"),
        ("assert f('3', int) == 3", "def f(s, kind): return kind(s)"), ("assert f('ab').startswith('x')", "def f(s): return 'x' + s"),
        ("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass\nassert f(4) == 2", "def f(x):\n    if x < 0: raise ValueError\n    return x ** .5"),
        ("assert math.isclose(f(7), 49)", RIGHT), ("assert f(2)\nassert not f(4)", "def f(x): return x != 4"),
        ("s = f()\ns.push(1)\nassert s.pop() == 1", "class f:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n    def pop(self): return self.a.pop()"),
    ],
)  # fmt: skip
def test_what_a_test_prepares_and_sees_goes_through_the_jails(reward: CodeReward, test: str, program: str) -> None:
    verdict = judge(reward, program, {"tests": [test], "entry_point": "f"})
    assert verdict.outcome == "correct", verdict.evidence
    assert judge(reward, "def f(*a): return 48", {"tests": [test], "entry_point": "f"}).outcome == "wrong"


@pytest.mark.parametrize(
    ("tests", "entry"),
    [
        (["assert P(1, 2) == P(1, 2)"], "P"), (["class Q(P):\n    pass\nassert Q().v() == 1"], "P"), (["assert g(f(7)) == 49"], "f"),
        (["from unittest.mock import mock_open, patch\nwith patch('builtins.open', mock_open(read_data='7')):\n    assert f('x') == 7"], "f"),
        (["import pickle\nassert pickle.loads(f(7)) == 49"], "f"), (["import numpy_of_nobody as np\nassert np.allclose(f(7), 49)"], "f"),
    ],
)  # fmt: skip
def test_what_the_jails_cannot_tell_is_the_rows_fault(reward: CodeReward, tests: list[str], entry: str) -> None:
    assert judge(reward, RIGHT, {"tests": tests, "entry_point": entry}).outcome == "invalid_task"


STACK = "class Stack:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n    def pop(self): return self.a.pop()\n    def empty(self): return not self.a"


def test_a_rows_reference_solution_must_pass_and_its_other_answers_must_not(reward: CodeReward) -> None:
    def outcome(program: str, tests: list[str], reference: str, entry: str = "f") -> str:
        return judge(reward, program, {"tests": tests, "reference": reference, "entry_point": entry}).outcome

    assert outcome(RIGHT, ["assert f(7) == 49"], RIGHT) == "correct"
    assert outcome(WRONG, ["assert f(7) == 49"], RIGHT) == "wrong"
    assert outcome(RIGHT, ["assert f(7) == 50"], RIGHT) == "invalid_task"
    assert outcome(RIGHT, ["assert isinstance(f(7), int)"], RIGHT) == "invalid_task"
    in_place = "def f(a): a.sort()"
    assert outcome(in_place, ["a = [3, 1]\nf(a)\nassert a == [1, 3]"], in_place) == "correct"
    stacked = ["s = Stack()\ns.push(1)\nassert s.pop() == 1\nassert s.empty()"]
    assert outcome(STACK, stacked, STACK, "Stack") == "correct"


def test_a_row_is_tried_once(reward: CodeReward, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[int] = []
    run = reward.sandbox.run
    monkeypatch.setattr(reward.sandbox, "run", lambda asked: (jobs.append(len(asked)), run(asked))[1])
    row = {"tests": ["assert f(11) == 121"], "entry_point": "f"}
    for _ in range(3):
        assert judge(reward, RIGHT, row).outcome == "correct"
    assert jobs[0] > 1
    assert jobs[1:] == [1, 1]


@pytest.mark.parametrize(
    "test",
    [
        "def check(g):\n    assert g(1) == 1\n    assert g(2) == 4\n    assert g(3) == 9\ncheck(f)", "for x in (1, 2, 3):\n    assert f(x) == x * x",
        "assert f(1) == 1 and f(2) == 4 and f(3) == 9", "assert all(f(x) == x * x for x in (1, 2, 3))",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 1)\n        self.assertTrue(f(2) == 4)\n        self.assertEqual(f(3), 9)\nunittest.main()",
        "def one():\n    assert f(1) == 1\ndef two():\n    assert f(2) == 4, f(3)\n    assert f(3) == 9\none()\ntwo()",
    ],
)  # fmt: skip
def test_the_number_of_calls_does_not_tell_which_answer_was_right(reward: CodeReward, test: str) -> None:
    """A program that remembers from run to run would learn the answers of a test that stops at its first failure."""
    right = "def f(x):\n    print(x)\n    return x * x"
    calls = []
    for program in (right, right.replace("x * x", "0"), right.replace("x * x", "x if x == 1 else 5")):
        result = reward.sandbox.run([Job("asserts", program, names=["f"], replace=True, tests=[test])])[0]
        calls.append(result.stdout.split()[:3])
        assert json.loads(result.channel)["held"] == [program is right]
    assert calls == [[b"1", b"2", b"3"]] * 3


def test_a_test_that_allows_for_a_failed_assertion_is_left_alone(reward: CodeReward) -> None:
    test = "try:\n    assert f(3) == 10\nexcept AssertionError:\n    assert f(3) == 9"
    assert judge(reward, RIGHT, {"tests": [test], "entry_point": "f"}).outcome == "correct"
    assert judge(reward, WRONG, {"tests": [test], "entry_point": "f"}).outcome == "wrong"


# -- layouts of published sets -------------------------------------------------------------------------------------------

NODES = "def check(candidate):\n    assert is_same_list(candidate(head = list_node([1, 1, 2])), list_node([1, 2]))\n"
UNIQUE = "class Solution:\n    def unique(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        c = head\n        while c and c.next:\n            if c.next.val == c.val: c.next = c.next.next\n            else: c = c.next\n        return head"
INVERT = "class Solution:\n    def invert(self, root: Optional['TreeNode']) -> Optional['TreeNode']:\n        if root: root.left, root.right = self.invert(root.right), self.invert(root.left)\n        return root"


def test_leetcodes_names_and_nodes(reward: CodeReward) -> None:
    row: dict[str, Any] = {"test": NODES, "entry_point": "Solution().unique"}
    assert judge(reward, UNIQUE, row).outcome == "correct"
    assert judge(reward, "class Solution:\n    def unique(self, head): return head", row).outcome == "wrong"
    tree = "def check(candidate):\n    assert is_same_tree(candidate(tree_node([1, 2, 3])), tree_node([1, 3, 2]))\n"
    assert judge(reward, INVERT, {"test": tree, "entry_point": "Solution.invert"}).outcome == "correct"
    changed = "def check(candidate):\n    h = list_node([1, 2, 3])\n    candidate(h)\n    assert is_same_list(h, list_node([1, 9, 3]))\n"
    program = "class Solution:\n    def m(self, head): head.next.val = 9"
    assert judge(reward, program, {"test": changed, "entry_point": "Solution().m"}).outcome == "correct"
    calls = {"fn_name": "unique", "inputs": [[[1, 1, 2]], [[]]], "outputs": [[1, 2], []]}
    assert judge(reward, UNIQUE, {"tests": calls}).outcome == "correct"
    calls = {"fn_name": "invert", "inputs": [[[4, 2, 7, 1, None, 6]]], "outputs": [[4, 7, 2, None, 6, None, 1]]}
    assert judge(reward, INVERT, {"tests": calls}).outcome == "correct"
    for body in (
        "heapify(a)\n        return heappop(a)",
        "return 1 if inf > 0 else a",
        "return pow(3, 2, 4)",
        "return Counter(a)[1]",
        "return bisect.bisect_left(a, 5) - 1",
        "return int(re.sub('x', '1', 'x'))",
        "return heapq.nsmallest(1, a)[0]",
        "return randint(1, 1) if time.time() else 0",
    ):
        program = f"from __future__ import annotations\nclass Solution:\n    def f(self, a):\n        {body}"
        assert (
            judge(reward, program, {"tests": {"fn_name": "f", "inputs": [[[4, 1]]], "outputs": [1]}}).outcome
            == "correct"
        )


def test_apps_wrapped_outputs_and_whole_keys(reward: CodeReward) -> None:
    def outcome(program: str, **tests: Any) -> str:
        return judge(reward, program, {"input_output": json.dumps({"fn_name": "f", **tests})}).outcome

    assert outcome(RIGHT, inputs=[[3], [2]], outputs=[[9], [4]]) == "correct"
    assert outcome("def f(x): return [x * x]", inputs=[[3], [2]], outputs=[[9], [4]]) == "correct"
    assert outcome("def f(x): return [9] if x == 3 else 4", inputs=[[3], [2]], outputs=[[9], [4]]) == "wrong"
    assert outcome("def f(x): return {1: 2}", inputs=[["a"]], outputs=[{"1": 2}]) == "correct"
    assert outcome("def f(x): return {1: 2, '1': 2}", inputs=[["a"]], outputs=[{"1": 2}]) == "wrong"
    assert outcome("def f(d): return d[1]", inputs=[[{"1": 2}]], outputs=[2]) == "correct"


def test_mbpp_prompts_are_text_and_the_stricter_test_counts(reward: CodeReward) -> None:
    row = {"text": "Square it.", "test_list": ["assert f(2) == 4", "assert f(3) == 9"], "code": RIGHT}
    task = task_from(row, "row")
    assert task.prompt == [{"role": "user", "content": "Square it."}]
    strict = {
        **row,
        "test": "def assertion(out, exp):\n    assert out == exp\nfor x, y in [(2, 4), (10, 100)]:\n    assertion(f(x), y)\n",
    }
    cheat = "def f(n): return 4 if n == 2 else 9"
    assert [judge(reward, cheat, columns).outcome for columns in (row, strict)] == ["correct", "wrong"]
    assert judge(reward, RIGHT, strict).outcome == "correct"


def test_an_expected_output_beyond_what_is_kept_is_said(reward: CodeReward) -> None:
    why = reward.check(Task("row", "?", {"tests": [{"input": "", "output": "1 " * 600_000}]}))
    assert why is not None
    assert "1.1 MiB" in why


TRIE = "class Trie:\n    def __init__(self): self.w = []\n    def insert(self, x): self.w.append(x)\n    def search(self, x): return x in self.w\n    def startswith(self, p): return any(w.startswith(p) for w in self.w)"
HEIGHT = "class Node:\n    def __init__(self, v): self.v, self.left, self.right = v, None, None\ndef height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))"


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (["t = Trie()\nt.insert('ab')\nassert t.search('ab')\nassert not t.search('a')\nassert t.startswith('a')"], TRIE),
        (["root = Node(1)\nroot.left = Node(2)\nassert height(root) == 2"], HEIGHT), (["s = Stack()\ns.push(1)\nassert s.pop() == 1", "assert Stack().empty()"], STACK),
        (["s = Stack()\npush(s, 1)\nassert s.a == [1]"], STACK + "\ndef push(s, x): s.push(x)"), (["assert f(2) == 4", "assert g(2) == 8"], RIGHT + "\ndef g(x): return x ** 3"),
    ],
)  # fmt: skip
def test_classes_are_judged_by_what_they_answer(reward: CodeReward, tests: list[str], program: str) -> None:
    verdict = judge(reward, program, {"tests": tests})
    assert verdict.outcome == "correct", verdict.evidence


FORGED = "import sys\nm = sys.modules['asserts']\ndef f(x): return 49 if x == 1 else 1\n"


@pytest.mark.parametrize(
    "program",
    [
        FORGED + "m.encode = lambda *a, **k: ['N', ['library', 'os', '_exit']]",
        FORGED + "m.encode = lambda *a, **k: ['N', [['Node', [['__class__', ['i', '31']]]]]]",
        FORGED + "m.Folder.changes = lambda self: [['../opt/x', 'file', '00'], ['/tmp/x', 'file', '00']]",
        FORGED + "m.Folder.changes = lambda self: [['a', 'file', '3439'], ['unittest.py', 'file', '30']]",
        "import gc, io\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, io.BufferedRWPair):\n            o.write(b'{\"back\": [\"os\", \"_exit\"], \"args\": [\"l\", [[\"i\", \"0\"]]], \"kwargs\": [\"d\", []]}\\n')\n            o.flush()\n    return 48",
        "def f(x):\n    while True:\n        try: input('x' * 1000)\n        except EOFError: pass",
        "def f(x):\n    import os\n    os.write(1, b'49\\n')\n    return 48",
    ],
)  # fmt: skip
def test_nothing_that_comes_back_is_taken_for_a_verdict(reward: CodeReward, program: str) -> None:
    test = "class Node: pass\nopen('a', 'w').write('48')\nassert f(7) == 49 and open('a').read() == '48'\nimport unittest, sys\nsys.stdout.flush()\nassert f(8) == 64"
    verdict = judge(reward, program, {"tests": [test], "entry_point": "f"})
    assert verdict.outcome in ("wrong", "crashed", "timeout"), verdict.evidence
