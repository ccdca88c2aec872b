"""The program in a response: its fenced blocks of code, completed with what the row and its tests provide."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..sandbox import Case, Suite
from ..sandbox.names import after_imports, bound, free_names, parsed, undefined
from ..types import Task
from .suites import PRELUDE, binds, defines, entry_name, suites_of

PARTS = 8
"""Blocks before the program that may be joined with it."""
READING = ("input", "stdin", "fileinput")
"""Names by which a program reads its standard input."""
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


def extract_code(text: str, wanted: Iterable[str] = (), reads: bool = False) -> str | None:
    """The program in a response: of its fenced blocks of Python the last that defines what is `wanted`; else the bare
    text, if it parses.

    Where none does (or nothing is wanted by name) it is the last that reads standard input, if the tests give one
    (`reads`), else the last that defines something, else the last. Blocks of another language count only where there
    are no others. A response with thinking is read after its `</think>`, if there is code.
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


def _blocks(text: str, in_strings: bool = False) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, without the fence's indentation. A fence that names a language opens a new
    block anywhere.

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


def fitted(code: str, suite: Suite) -> tuple[str, Suite]:
    """A program as LeetCode's judge runs it: its calls go to a method of a fresh `Solution`, if it has one, and the
    usual imports are there.

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
