"""Code: the program in a response, run in the sandbox against the row's tests. 1 when every test holds, else 0.

    code                            every test, visible and hidden, must hold
    code:partial=true               the share of tests that hold instead
    code:tolerance=1e-9             how far decimal numbers on standard output may be off; 0: not at all
    code:backend=bwrap,slots=2,wall=8,cpu=5,memory_mb=512,fork=false,python=/usr/bin/python3
    code:backend=remote,url=http://judge:8790      on another machine (sppo sandbox serve)

Layouts of tests, as published data sets have them (JSON text is parsed first):

    tests = ["assert f(1) == 2", …]                           MBPP (`test_list`; `test_setup_code`, `test_imports`)
    tests = [{"input": "3\\n", "output": "9\\n"}, …]            standard input and output
    tests = {"inputs": […], "outputs": […]}                   the same (APPS, TACO); with `fn_name`, calls and their values
    tests = [{"args": [1], "expected": 2}, …] + `entry_point`  calls and their values (`kwargs` too)
    test = "def check(candidate): …" + `entry_point`          HumanEval, its files unchanged
    tests = [{"input": "[1]\\n2", "output": "3", "testtype": "functional"}]   LiveCodeBench; the name from `metadata` or `entry_point`
    test = "class TestCases(unittest.TestCase): …"            BigCodeBench, which is run without a runner of its own
    entry_point = "Solution.f"                                 a method of a class; a class `Solution` is found by itself
    hidden_tests = …                                           any of these again: they count, and the gap is measured
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError
from ..sandbox import Case, Report, Runs, Suite, TestCode, judge, open_sandbox
from ..sandbox.names import after_imports, bound, free_names, parsed, undefined
from ..sandbox.verdict import TOLERANCE
from ..spec import call
from ..types import Outcome, Rollout, Task, Verdict
from .probes import probes, problem
from .suites import PRELUDE, binds, column_of, defines, entry_name, suites_of

BROKEN = "the sandbox could not try the row's tests"
DECIDED = ("ok", "exception")
"""Statuses of a reference solution that are the row's fault, not the machine's."""


def build(partial: bool = False, tolerance: float = TOLERANCE, **sandbox: Any) -> CodeReward:
    """The reward for `reward.use = "code:…"`. Raises SandboxUnavailable when programs cannot be isolated here."""
    if not isinstance(partial, bool):
        raise RecipeError(f"reward code: partial={partial} must be true or false")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise RecipeError(f"reward code: tolerance={tolerance} must be a number from 0 (exact) to below 1")
    return CodeReward(call(open_sandbox, "reward code", **sandbox), partial, tolerance)


def extract_code(text: str, wanted: Iterable[str] = (), reads: bool = False) -> str | None:
    """The program in a response: of its fenced blocks of Python the last that defines what is `wanted`; else the bare text, if it parses.

    Where none does (or nothing is wanted by name) it is the last that reads standard input, if the tests give one (`reads`), else the
    last that defines something, else the last. Blocks of another language count only where there are no others. A response with thinking is
    read after its `</think>`, if there is code.
    """
    answer = text.rpartition("</think>")[2]
    if answer != text and (found := extract_code(answer, wanted, reads)) is not None:
        return found
    first = _chosen(_blocks(text), wanted, reads)
    if first is not None and _fits(first, wanted):
        return first
    # a fence inside of a docstring is not the end of the block
    second = _chosen(_blocks(text, in_strings=True), wanted, reads)
    if second is not None and _fits(second, wanted):
        return second
    if first is not None:
        return first
    bare = text.rpartition("[BEGIN]\n")[2].partition("\n[DONE]")[0]  # MBPP
    return bare if bare.strip() and parsed(bare) is not None else None


def _fits(code: str, wanted: Iterable[str]) -> bool:
    return parsed(code) is not None and (not wanted or any(binds(code, name) for name in wanted))


def _chosen(blocks: Sequence[tuple[str, str]], wanted: Iterable[str], reads: bool) -> str | None:
    """The program among the fenced blocks; see `extract_code`."""
    python = [b for b in blocks if b[0].startswith("python") or b[0] in ("", "py", "py3")] or blocks
    tagged = [code for name, code in python if name] or [code for _, code in python]
    codes = [code for _, code in python]

    def reading(code: str) -> bool:
        tree = parsed(code)
        names = {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(tree)} if tree else set()
        return bool(names.intersection(READING)) or (tree is not None and "open(0" in code)

    for among, fits in (
        (codes, lambda code: any(defines(code, name) for name in wanted)),
        (codes, lambda code: any(binds(code, name) for name in wanted)),  # f = lambda x: …
        (tagged if reads else [], lambda code: reading(code) and undefined([code]) is None),  # not a test of the answer
        (tagged if reads else [], reading),
        (tagged, _defines_something),  # a usage example after the answer does not count
        (codes, _defines_something),
        (tagged, lambda code: True),
    ):
        if (found := next((code for code in reversed(among) if fits(code)), None)) is not None:
            return _with_its_parts(found, codes)
    return None


def _with_its_parts(program: str, codes: Sequence[str]) -> str:
    """The program, preceded by the earlier blocks that define names it lacks: an answer given in parts."""
    for earlier in reversed(codes[: codes.index(program)][-PARTS:]):
        if parsed(program) is None or (name := undefined([program], modules=())) is None:
            break
        if name in bound(earlier):
            program = f"{earlier}\n{program}"
    return program


PARTS = 8
"""Blocks before the program that may be joined with it."""
READING = ("input", "stdin", "fileinput")
"""Names by which a program reads its standard input."""


def _blocks(text: str, in_strings: bool = False) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, without the fence's indentation. A fence that names a language opens a new block anywhere.

    As models write them, a fence may also open behind words (`Sure: ```python`), and close behind code or before words.
    `in_strings`: a fence between triple quotes belongs to the code.
    """
    blocks: list[tuple[str, str]] = []
    fence, language, indent = "", "", 0
    body: list[str] = []
    quotes = [0, 0]

    def quoted() -> bool:
        return in_strings and any(n % 2 for n in quotes)

    def end() -> None:
        if "".join(body).strip() or fence:
            blocks.append((language, "".join(body)))

    for line in text.splitlines(keepends=True):
        bare = line.strip()
        mark = bare[: len(bare) - len(bare.lstrip(bare[0]))] if bare[:3] in ("```", "~~~") else ""
        info = bare[len(mark) :].strip().strip("{.}").partition(" ")[0].lower() if mark else ""
        if not mark and not fence and bare.rpartition("```")[2].lower() in LANGUAGES and bare.count("```") == 1:
            mark, info = "```", bare.rpartition("```")[2].lower()
        if mark and (
            not fence or (mark[0] == fence[0] and len(mark) <= len(fence) and info in LANGUAGES and not quoted())
        ):
            if fence:
                end()
            fence, language, body, quotes = mark, info, [], [0, 0]
            indent = len(line) - len(line.lstrip(" \t"))
        elif fence and mark.startswith(fence) and not quoted():
            end()
            fence = ""
        elif fence and not mark and bare.endswith(fence) and bare.count(fence) == 1 and not quoted():
            body.append(line.rstrip().rstrip(fence[0])[min(indent, len(line) - len(line.lstrip(" \t"))) :] + "\n")
            end()
            fence = ""
        elif fence:
            margin = min(indent, len(line) - len(line.lstrip(" \t")))
            body.append(line[margin:])
            quotes = [quotes[0] + line.count('"""'), quotes[1] + line.count("'''")]
    if fence and body:  # cut off before it was closed
        end()
    return blocks


LANGUAGES = (
    "python",
    "py",
    "python3",
    "py3",
    "bash",
    "sh",
    "text",
    "output",
    "console",
    "json",
    "cpp",
    "java",
    "javascript",
)
"""Words after a fence that open a block even inside an unclosed one."""


def _defines_something(code: str) -> bool:
    tree = parsed(code)
    return tree is not None and any(
        isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in tree.body
    )


def program_of(task: Task, text: str, suite: Suite | None = None) -> str | None:
    """The whole program: what the response holds, or the row's code prompt continued by it (HumanEval's way).

    `suite`: the row's visible tests, where they are known already; they say which block of several is the program.
    """
    if suite is None:
        found = suites_of(task)
        suite = None if isinstance(found, str) else found[0]
    entry = entry_name(task.columns.get("entry_point"))
    wanted = {entry.partition(".")[0]} if entry else set()
    if suite is not None and suite.kind == "calls":
        wanted |= {case.entry.partition(".")[0] for case in suite.cases} | {"Solution"}
    elif suite is not None and suite.code is not None and not entry:
        wanted |= free_names(suite.code.tests, suite.code.setup)[0]
    reads = suite is not None and suite.kind == "stdio" and any(case.stdin.strip() for case in suite.cases)
    code = extract_code(text, wanted, reads)
    if entry is not None and isinstance(task.columns.get("test"), str):
        head = entry.partition(".")[0]
        if code is None or not defines(code, head):
            answer = text.rpartition("</think>")[2]
            continued = task.text + (answer if code is None or code == text else code)
            return continued if defines(continued, head) else code
        # the prompt's helpers stay in reach of a function written anew
        joined = after_imports(_prompt_code(task, head), code)
        return joined if parsed(joined) is not None else code
    imports = task.columns.get("test_imports")
    if code is not None and isinstance(imports, list) and all(isinstance(line, str) for line in imports):
        # as people run these rows: what the tests import is there for the program too
        return after_imports("\n".join(imports), code)
    return code


def _prompt_code(task: Task, entry: str) -> str:
    """What a code prompt defines before the function that is asked for."""
    tree = parsed(task.text)
    if tree is None:
        return ""
    return "\n".join(
        ast.unparse(node)
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name == entry)
        and not isinstance(node, ast.Expr)  # a prompt of one word is Python too
    )


class CodeReward:
    """Verdicts from running programs; see the module."""

    def __init__(self, sandbox: Runs, partial: bool = False, tolerance: float = TOLERANCE) -> None:
        self.sandbox, self.partial, self.tolerance = sandbox, partial, tolerance
        self._problems: dict[
            bytes, str | None
        ] = {}  # by a row's tests and reference: why nothing can be judged by them

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, timeout, crashed, unparseable (no code: score 0); invalid_task and infra_error (masked)."""
        verdicts: list[Verdict | None] = [None] * len(rollouts)
        runs: list[tuple[int, str, str, Suite]] = []  # (rollout, "visible" or "hidden", program, tests)
        rows = {id(r.task): r.task for r in rollouts}
        suites = {key: self._suites(task) for key, task in rows.items()}
        for i, rollout in enumerate(rollouts):
            found = suites[id(rollout.task)]
            if isinstance(found, str):
                continue
            code = program_of(rollout.task, rollout.text, found[0])
            if code is None:
                verdicts[i] = Verdict(0.0, "unparseable", {"reason": "the response holds no Python code"})
                continue
            for name, suite in zip(("visible", "hidden"), found, strict=True):
                if suite is not None:
                    runs.append((i, name, *fitted(code, suite)))
        done, problems = self._run([(code, suite) for _, _, code, suite in runs], rows, suites)
        reports: dict[int, dict[str, Report]] = {}
        for (i, name, _, _), report in zip(runs, done, strict=True):
            reports.setdefault(i, {})[name] = report
        for i, by_name in reports.items():
            verdicts[i] = self._verdict(by_name)
        for i, rollout in enumerate(rollouts):
            if problem := problems[id(rollout.task)]:
                verdicts[i] = Verdict(0.0, "infra_error" if problem == BROKEN else "invalid_task", {"reason": problem})
        return [v for v in verdicts if v is not None]

    def _suites(self, task: Task) -> tuple[Suite, Suite | None] | str:
        """A row's tests, if their expected output fits into the sandbox's output limit."""
        found = suites_of(task)
        if isinstance(found, str):
            return found
        visible, hidden = (None if s is None else replace(s, tolerance=self.tolerance) for s in found)
        assert visible is not None
        room = self.sandbox.limits.output_bytes
        for suite in (visible, hidden):
            for i, size in enumerate(() if suite is None else suite.sizes()):
                if size > room:
                    return f"test {i} expects {size / (1 << 20):.1f} MiB of output, and the sandbox keeps {room / (1 << 20):.1f} MiB"
        return visible, hidden

    def _run(
        self,
        runs: Sequence[tuple[str, Suite]],
        rows: Mapping[int, Task],
        suites: Mapping[int, tuple[Suite, Suite | None] | str],
    ) -> tuple[list[Report], dict[int, str | None]]:
        """The reports of programs, and for each row why it cannot be judged, or None; its probes run beside them, the first time."""
        problems: dict[int, str | None] = {}
        todo: list[tuple[int, bytes, str, TestCode, dict[str, str]]] = []
        for key, found in suites.items():
            problems[key] = found if isinstance(found, str) else None
            if isinstance(found, str):
                continue
            for column, suite in ((column_of(rows[key]), found[0]), ("hidden_tests", found[1])):
                if suite is not None and suite.code is not None:
                    reference = reference_of(rows[key], found[0])
                    described = repr((suite.code.tests, suite.code.setup, suite.code.names, reference)).encode(
                        "utf-8", "backslashreplace"
                    )
                    digest = hashlib.blake2b(described, digest_size=16).digest()
                    if digest in self._problems:
                        problems[key] = problems[key] or self._problems[digest]
                    else:
                        todo.append((key, digest, column, suite.code, probes(suite.code, reference)))
        asked = [
            fitted(program, Suite("asserts", code=code)) for *_, code, programs in todo for program in programs.values()
        ]
        reports = judge(self.sandbox, [*runs, *asked])
        answers = iter(reports[len(runs) :])
        for key, digest, column, code, programs in todo:
            ended = {name: next(answers) for name in programs}
            if any(report.status == "infra_error" for report in ended.values()):
                problems[key] = problems[key] or BROKEN  # the machine's fault, not the row's: asked again the next time
                continue
            decided = {name: report.status in DECIDED for name, report in ended.items()}
            why = problem(code.tests, {name: report.passed for name, report in ended.items()}, decided)
            cannot = next((report.evidence["cannot"] for report in ended.values() if "cannot" in report.evidence), None)
            why = f"the tests cannot be run in a jail of their own: {cannot}" if cannot else why
            self._problems[digest] = why and f"column `{column}`: {why}"
            problems[key] = problems[key] or self._problems[digest]
        return reports[: len(runs)], problems

    def _verdict(self, reports: Mapping[str, Report]) -> Verdict:
        evidence: dict[str, Any] = {}
        measures = {}
        for name, report in reports.items():
            evidence[name] = {"passed": sum(report.passed), "of": len(report.passed), **report.evidence}
            measures[f"{name}_pass_rate"] = report.fraction
        if "hidden" in reports:
            measures["hidden_gap"] = measures["visible_pass_rate"] - measures["hidden_pass_rate"]
        evidence["measures"] = measures
        if any(r.status == "infra_error" for r in reports.values()):
            return Verdict(0.0, "infra_error", evidence)
        passed = [held for r in reports.values() for held in r.passed]
        if passed and all(passed):
            return Verdict(1.0, "correct", evidence)
        cannot = next((r.evidence["cannot"] for r in reports.values() if "cannot" in r.evidence), None)
        if cannot is not None:  # reported by the tests' jail about the tests' own values: no program can cause it
            return Verdict(
                0.0, "invalid_task", evidence | {"reason": f"the tests cannot be run in a jail of their own: {cannot}"}
            )
        statuses = {r.status for r in reports.values()}
        outcome: Outcome = "timeout" if "timeout" in statuses else "wrong"
        if outcome == "wrong" and not any(passed) and statuses - {"ok"}:
            outcome = "crashed"
        return Verdict(sum(passed) / len(passed) if self.partial and passed else 0.0, outcome, evidence)

    def check(self, task: Task) -> str | None:
        """Why the row cannot be judged, or None."""
        return self.check_all([task])[0]

    def check_all(self, tasks: Sequence[Task]) -> list[str | None]:
        """For each row why it cannot be judged, or None; see probes.py."""
        problems = self._run([], dict(enumerate(tasks)), {i: self._suites(task) for i, task in enumerate(tasks)})[1]
        return [problems[i] for i in range(len(tasks))]

    def close(self) -> None:
        self.sandbox.close()


def fitted(code: str, suite: Suite) -> tuple[str, Suite]:
    """A program as LeetCode's judge runs it: its calls go to a method of a fresh `Solution`, if it has one, and the usual imports are there.

    Where nothing is missing they are left out: they take over a millisecond.
    """
    solution = defines(code, "Solution")
    if suite.kind == "stdio" or not (solution or suite.kind == "calls"):
        return code, suite

    def fit(case: Case) -> Case:
        if solution and "." not in case.entry:
            return replace(case, entry=f"Solution.{case.entry}")
        return case

    suite = replace(suite, cases=tuple(map(fit, suite.cases)))
    missed = undefined([code], modules=()) is not None or any(kind in code for kind in ("ListNode", "TreeNode"))
    return (after_imports(PRELUDE, code) if missed else code), suite


def reference_of(task: Task, suite: Suite) -> str | None:
    """The row's own right program, assembled as a response would be; None where there is none that is Python."""
    columns = [task.columns.get("reference"), task.columns.get("canonical_solution"), task.solution]
    columns += [task.columns.get("code")] if "test_list" in task.columns else []
    text = next((c for c in columns if isinstance(c, str) and c.strip()), None)
    program = None if text is None else program_of(task, text, suite)
    return program if program is not None and parsed(program) is not None and _defines_something(program) else None
