"""A trajectory as flat ids and turns: what is derived from them, for one answer and for several turns."""

from __future__ import annotations

from sppo.types import Rollout, Task, Verdict

TASK = Task("t", "3+4?")


def two_turns() -> Rollout:
    """A prompt of two tokens, two tokens, an observation of three, one token, and an observation that nobody answered."""
    return Rollout(TASK, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [(2, 4), (7, 8)], [-0.1, -0.2, -0.3], "stop", "7 8 12")


def test_the_prompt_is_what_comes_before_the_first_turn():
    assert list(two_turns().prompt_ids) == [5, 6]


def test_the_response_is_every_turn_and_nothing_of_what_was_observed():
    rollout = two_turns()
    assert list(rollout.response_ids) == [7, 8, 12]
    assert len(rollout.response_ids) == len(rollout.logps)


def test_the_action_mask_marks_every_turn():
    rollout = two_turns()
    assert rollout.action_mask == [False, False, True, True, False, False, False, True, False, False]
    assert [i for i, acted in zip(rollout.ids, rollout.action_mask, strict=True) if acted] == rollout.response_ids


def test_a_single_answer_is_one_turn_to_the_end():
    rollout = Rollout.answer(TASK, [5, 6], [7, 8, 1], [-0.1] * 3, "stop", "78", 2, version=4)
    assert list(rollout.ids) == [5, 6, 7, 8, 1]
    assert list(rollout.turns) == [(2, 5)]
    assert (list(rollout.prompt_ids), list(rollout.response_ids)) == ([5, 6], [7, 8, 1])
    assert (rollout.sample, rollout.version, rollout.verdict) == (2, 4, None)


def test_another_answer_keeps_the_prompt_and_loses_what_was_known_of_the_first():
    judged = two_turns().judged(Verdict(1.0, "correct"))
    other = judged.answered([20, 21], "x", finish="length")
    assert (list(other.ids), list(other.turns)) == ([5, 6, 20, 21], [(2, 4)])
    assert (list(other.logps), list(other.kept), other.verdict) == ([0.0, 0.0], [], None)
    assert (other.text, other.finish, other.task) == ("x", "length", TASK)
    verdict = Verdict(0.0, "wrong")
    assert judged.answered([20], "x", logps=[-1.0], verdict=verdict).verdict == verdict
    assert list(judged.response_ids) == [7, 8, 12]  # the first one stays as it is
