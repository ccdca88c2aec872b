"""Rewards of form: length and format, by hand; and that neither reaches what the critic learns."""

from __future__ import annotations

import pytest

from sppo.errors import RecipeError
from sppo.rewards.loading import load_reward
from sppo.types import Rollout, Task


def response(text: str, tokens: int = 1, answer: str = "8") -> Rollout:
    return Rollout.answer(Task("t", "?", {"answer": answer}), [1], list(range(tokens)), [-1.0] * tokens, "stop", text)


@pytest.mark.parametrize(("tokens", "score"), [(0, 1), (6, 1), (7, 0.75), (8, 0.5), (9, 0.25), (10, 0), (12, 0)])
def test_length_falls_in_a_line(tokens, score):
    """1 + DAPO's eq. 13 with L_max = 10 and L_cache = 4."""
    assert load_reward("length:free=6,limit=10").judge([response("", tokens)])[0].score == score


@pytest.mark.parametrize(
    ("spec", "text", "missing"),
    [
        ("tags=think+answer", "<think>a</think>\n <answer>8</answer>\n", None),
        ("tags=think+answer", "<think>a</think><answer>8", "<answer>"),
        ("tags=think+answer", "<answer>8</answer><think>a</think>", "there is text before <think>"),
        ("tags=think+answer", "<think>a</think>so<answer>8</answer>", "there is text before <answer>"),
        ("tags=think+answer", "<think>a</think><answer>8</answer>!", "there is text after </answer>"),
        ("tags=think+answer", "<think><think>a</think><answer>8</answer>", "once"),
        ("tags=think+answer", "<think>a<answer></think>8</answer>", "not in its place"),
        ("tags=answer", "</answer><answer>", "not in its place"),
        ("boxed=true", r"so \boxed{8}", None),
        ("boxed=true", r"\boxed{7} \boxed{8}", "boxed"),
        ("boxed=true", r"\boxed{ }", "boxed"),
        (r"pattern=A:\d+$", "7+1=8;A:8", None),
        (r"pattern=A:\d+$", "7+1=8;A:", "nothing matches"),
    ],
)
def test_format(spec, text, missing):
    (verdict,) = load_reward(f"format:{spec}").judge([response(text)])
    assert verdict.score == (missing is None)
    assert not verdict.masked
    if missing is not None:
        assert missing in verdict.evidence["reason"]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("length:free=9,limit=9", "below limit"), ("length:free=9", "limit"), ("format", "say what"), ("format:tags=a+a", "different words"),
        ("format:tags=<a>", "different words"), ("format:pattern=(", "not a regular expression"),
    ],
)  # fmt: skip
def test_nonsense_is_one_sentence(spec, why):
    with pytest.raises(RecipeError, match=why):
        load_reward(spec)


def test_neither_reaches_the_critics_target():
    shaped, gated = load_reward("answer + 0.5 * length:free=2,limit=4"), load_reward(r"answer gate format:pattern=A:\d")
    right_long, wrong_short = response("A:8", 4), response("A:7", 1)
    assert [(v.score, v.correct) for v in shaped.judge([right_long, wrong_short])] == [
        (pytest.approx(2 / 3), 1.0),
        (pytest.approx(1 / 3), 0.0),
    ]
    assert [(v.score, v.correct) for v in gated.judge([response("so 8"), response("A:8")])] == [(0.0, 1.0), (1.0, 1.0)]


def test_right_answers_by_wrong_steps_are_counted():
    from sppo.evaluation.step_quality import step_checker, step_quality
    from sppo.types import Verdict

    chain = Task("chain/0", [{"role": "user", "content": "7+5-3?"}], {"answer": "9"})
    checker = step_checker("chain:steps=2", chain, load_reward("answer + 0 * steps:check=arithmetic"))
    assert checker is not None

    def said(text: str, correct: float, outcome="correct") -> Rollout:
        return Rollout.answer(chain, [1], [2], [-1.0], "stop", text, 0, Verdict(correct, outcome))

    clean, slip = said("7+5=2;2-3=9;A:9", 1.0), said("7+5=3;3-3=9;A:9", 1.0)
    wrong, masked = said("7+5=3;3-3=0;A:0", 0.0), said("7+5=3;3-3=9;A:9", 1.0, "infra_error")
    assert step_quality([clean, slip, clean, wrong, masked], checker) == {
        "right_by_wrong_steps": pytest.approx(1 / 3),
        "steps_judged_share": 1.0,
    }
    assert step_quality([wrong], checker) == {}
    rows = Task("rows.jsonl:1", "?", {"answer": "40"})
    free = step_checker("rows.jsonl", rows, load_reward("answer"))
    assert free is not None
    texts = ("12 * 3 = 36\n36 + 4 = 40", "12 * 3 = 38\nso 40", "It is 40.")
    found = step_quality(
        [Rollout.answer(rows, [1], [2], [-1.0], "stop", t, 0, Verdict(1.0, "correct")) for t in texts], free
    )
    assert found == {"right_by_wrong_steps": 0.5, "steps_judged_share": pytest.approx(2 / 3)}
    for use in ("steps:check=chain", "answer and steps:check=chain,score=min"):  # modulo 10, as the reward has it
        named = step_checker("rows.jsonl", rows, load_reward(use))
        assert named is not None
        assert step_quality([clean, slip], named)["right_by_wrong_steps"] == 0.5
    assert step_quality([clean], free)["right_by_wrong_steps"] == 1.0
    for score, wrong in ((0.6, 0.0), (0.4, 1.0)):
        assert (
            step_quality([clean], lambda task, steps, score=score: [score for _ in steps])["right_by_wrong_steps"]
            == wrong
        )
    assert step_checker("functions", Task("f", "?", {"tests": []}), load_reward("answer")) is None
