"""Static findings on programs that would pass their tests, by the real analysers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sppo.errors import RecipeError
from sppo.rewards.base import load_reward
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
    verdicts = reward.judge([Rollout(Task("t", "?"), [], [], [], "stop", text) for text in texts])
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
    first, second = reward.judge([Rollout(Task("t", "?"), [], [], [], "stop", text) for text in (quiet, silent)])
    assert rules(first) == {"B307"}
    assert rules(second) == {"B006"}


def test_what_cannot_be_read_is_not_clean(reward: QualityReward) -> None:
    texts = [f"# coding: {name}\n{SHELL}" for name in ("foo", "utf-7", "utf-16", "undefined")]
    texts += [f"```python\n{SHELL}def (:\n```", f"exec({SHELL!r})"]
    verdicts = reward.judge([Rollout(Task("t", "?"), [], [], [], "stop", text) for text in texts])
    assert all("B602" in rules(v) for v in verdicts[:4])
    assert (verdicts[4].outcome, verdicts[4].score) == ("unparseable", 0)
    assert verdicts[5].score == 0


def test_as_a_part_of_a_mixture() -> None:
    task = Task("t", "?", {"tests": ["assert f('7') == 7"]})
    rollout = Rollout(task, [], [], [], "stop", EVAL)
    for use, score in (("code + 1 * quality", 0.875), ("code + 0 * quality", 1.0), ("code gate quality", 1.0)):
        mixed = load_reward(use)
        verdict = mixed.judge([rollout])[0]
        mixed.close()
        assert (verdict.score, verdict.correct) == (score, 1.0)
        assert verdict.evidence["measures"]["findings"] == 1
    for use in ("0 * code", "0 * code + 0 * quality", "quality:complexity=none"):
        with pytest.raises(RecipeError):
            load_reward(use)
