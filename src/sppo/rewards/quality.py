"""The quality of a program by static analysis, for what passes its tests and is still insecure or unmaintainable.
Nothing is run.

    quality                         1 − 0.5 per high finding, 0.25 per medium, 0.1 per low one, at least 0; running code from text scores 0
    quality:complexity=8            McCabe's number above which a function is a medium finding (10)
    code + 0.1 * quality            a penalty on what tests do not catch;  code + 0 * quality   evidence and metrics only
    code gate quality               nothing is paid below 0.5

Analysers: bandit (security, with its severities), ruff's complexity, size and likely-bug rules (C901, PLR09, B), and
what a program hides from both (hidden.py: EXEC, ALIAS, and the same sizes for code outside functions). Comments that
would silence them (`noqa`, `nosec`) are ignored, because the policy wrote them. `pip install 'sppo[quality]'`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..sandbox.names import parsed
from ..types import Rollout, Task, Verdict
from .branches import outside_functions
from .hidden import hidden
from .program import program_of
from .workers import WorkerPool

PENALTY = {"high": 0.5, "medium": 0.25, "low": 0.1}
HIDDEN = {"B102": 1.0, "EXEC": 1.0}
"""`exec`, however it is reached, runs text that no analyser has seen."""
COOKIES_END = "\n\n"
"""Our own first two lines, where an encoding would be declared: a program cannot declare one that analysers fail to
read."""
BRANCHED = "C901,PLR0911,PLR0912,PLR0915"
RULES = f"{BRANCHED},PLR0913,B"
MANY_TIMES = 4
HARMLESS = ("B101", "B311")
"""bandit's: assertions, and `random` where no secret is at stake."""


def build(complexity: int = 10, limit: float = 20.0, workers: int = 2) -> QualityReward:
    """The reward for `reward.use = "quality:…"`. Raises RecipeError when the analysers are not installed."""
    for package in ("ruff", "bandit"):
        if importlib.util.find_spec(package) is None:
            raise RecipeError(f"reward quality needs {package}: pip install 'sppo[quality]'")
    if isinstance(complexity, bool) or not isinstance(complexity, int) or complexity < 1:
        raise RecipeError(f"reward quality: complexity={complexity} must be a whole number above 0")
    return QualityReward(complexity, limit, workers)


def warm_up() -> None:
    """Import and exercise the analysers before the first verdict is timed."""
    judge_one({"code": "pass\n", "complexity": 10})


def judge_one(job: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Findings for one program, inside a worker: `[{"rule", "severity", "line", "says"}, …]`; None for anything but
    Python."""
    code = job["code"]
    tree = parsed(code)
    if tree is None:
        return None
    findings = _bandit(code) + hidden(tree) + _ruff(code, job["complexity"], RULES)
    elsewhere, lines = outside_functions(tree)
    if elsewhere:
        found = _ruff(elsewhere, job["complexity"], BRANCHED)
        findings += [f | {"line": lines[f["line"] - 1]} for f in found]
    return sorted(findings, key=lambda f: (f["line"], f["rule"]))


def _bandit(code: str) -> list[dict[str, Any]]:
    import logging

    from bandit.core.config import BanditConfig
    from bandit.core.manager import BanditManager

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(COOKIES_END + code.removeprefix("\ufeff"))
        manager = BanditManager(BanditConfig(), "file", quiet=True, ignore_nosec=True)
        manager.discover_files([path])
        manager.run_tests()
        if manager.skipped:
            raise ValueError(f"bandit could not read the program: {manager.skipped[0][1]}")
        return [
            {"rule": i.test_id, "severity": i.severity.lower(), "line": i.lineno - 2, "says": i.text}
            for i in manager.get_issue_list()
            if i.test_id not in HARMLESS
        ]


def _ruff(code: str, complexity: int, rules: str) -> list[dict[str, Any]]:
    from ruff import find_ruff_bin

    command = [
        find_ruff_bin(), "check", "--isolated", "--no-cache", "--ignore-noqa", "--output-format", "json", "--exit-zero",
        "--select", rules, "--config", f"lint.mccabe.max-complexity={complexity}", "--preview", "--stdin-filename", "program.py", "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=code.encode("utf-8", "backslashreplace"), capture_output=True, check=True)
    return [
        {"rule": f["code"], "severity": _severity(f), "line": f["location"]["row"], "says": f["message"]}
        for f in json.loads(done.stdout)
        if f["code"] not in (None, "invalid-syntax")
    ]


def _severity(finding: dict[str, Any]) -> str:
    """Likely bugs are low, sizes over a bound medium, and many times over it high."""
    if finding["code"].startswith("B"):
        return "low"
    over = re.search(r"\((\d+) > (\d+)\)", finding["message"])
    return "high" if over and int(over[1]) >= MANY_TIMES * int(over[2]) else "medium"


class QualityReward:
    """Static findings as evidence, and their weight as a score."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def __init__(self, complexity: int, limit: float, workers: int) -> None:
        self.complexity, self.limit = complexity, limit
        self.pool = WorkerPool("sppo.rewards.quality:judge_one", workers=workers, limit=limit)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct (0.5 or more), wrong, unparseable (no code: 0), timeout or crashed (0); infra_error (masked)."""
        programs = [program_of(r.task, r.text) for r in rollouts]
        todo = [i for i, code in enumerate(programs) if code is not None]
        answers = self.pool.run([{"code": programs[i], "complexity": self.complexity} for i in todo])
        verdicts = [Verdict(0.0, "unparseable", {"reason": "the response holds no Python code"}) for _ in rollouts]
        for i, answer in zip(todo, answers, strict=True):
            verdicts[i] = self._verdict(answer)
        return verdicts

    def _verdict(self, answer: dict[str, Any]) -> Verdict:
        if "timeout" in answer:
            return Verdict(0.0, "timeout", {"limit_s": self.limit})
        if "infra" in answer:
            return Verdict(0.0, "infra_error", {"reason": answer["infra"]})
        if "ok" not in answer:
            return Verdict(0.0, "crashed", {"reason": str(answer.get("error", answer.get("crashed")))})
        findings = answer["ok"]
        if findings is None:
            return Verdict(0.0, "unparseable", {"reason": "the program is not Python"})
        score = max(1.0 - sum(HIDDEN.get(f["rule"], PENALTY.get(f["severity"], PENALTY["low"])) for f in findings), 0.0)
        measures = {
            "findings": float(len(findings)),
            "grave_findings": float(sum(f["severity"] == "high" for f in findings)),
        }
        return Verdict(score, "correct" if score >= 0.5 else "wrong", {"findings": findings, "measures": measures})

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        self.pool.close()
