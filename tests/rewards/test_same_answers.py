"""Reference answers: numbers with units and tolerance, sets and lists, multiple choice, and where the answer stands."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from sppo.errors import RecipeError
from sppo.rewards.choice import choice
from sppo.rewards.loading import load_reward
from sppo.rewards.quantity import quantity
from sppo.rewards.text import members
from sppo.rewards.units import unit
from sppo.types import Rollout, Task


def outcome(spec: str, text: str, answer: Any, **columns: Any) -> str:
    task = Task("t", "?", {"answer": answer, **columns})
    return load_reward(spec).judge([Rollout.answer(task, [], [], [], "stop", text)])[0].outcome


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("12 km", "12000 m", True), ("90 km/h", "25 m/s", True), ("1 mile", "1.609344 km", True), ("12", "12 km", True),
        ("12 km", "12", True), ("12 km", "12 m", False), ("12 kg", "12 km", False), ("50%", "0.5", True), ("50%", "50", True),
        ("$5", "5", True), ("5 dollars", "$5.00", True), ("€5", "$5", False), ("9.8 m/s^2", "980 cm/s²", True), ("2 hours", "120 min", True),
        ("3.5 × 10^3 g", "3.5 kg", True), (r"10\text{ cm}", "0.1 m", True), (r"\frac{1}{2} m", "50 cm", True), ("1,500 ml", "1.5 L", True),
        ("4 square meters", "40000 cm^2", True), ("5 apples", "5", True), ("5 apples", "5 km", False), ("5 apples", "5 oranges", False),
        ("5 dozen", "5", False), ("5 or six", "5", False), ("1 N", "1 kg m/s^2", True), ("100 °C", "100 K", False),
        ("3 kWh", "10.8 MJ", True), ("1/3", "0.3333", False), ("-3 m", "-300 cm", True), (".5", "1/2", True),
        (r"1\frac{1}{2}", "1.5", True), (r"1\frac{1}{2}", "11/2", False), (r"\frac12", "0.5", True), ("x = 12", "12", True), (r"\(12\)", "12", True),
        ("(12)", "12", True), ("5 mL", "0.005 L", True), ("1_2", "12", False),
    ],
)  # fmt: skip
def test_quantities(given: str, gold: str, right: bool) -> None:
    assert outcome("answer", f"Answer: {given}", gold) == ("correct" if right else "wrong")


def test_tolerance_and_units_are_the_recipes_to_choose() -> None:
    assert outcome("answer:mode=numeric,tolerance=0.001", "Answer: 0.3333", "1/3") == "correct"
    assert outcome("answer:mode=numeric,tolerance=0.001", "Answer: 1003 m", "1 km") == "wrong"
    assert outcome("answer:mode=numeric,tolerance=0.005", "Answer: 1003 m", "1 km") == "correct"
    assert outcome("answer:units=required", "Answer: 12", "12 km") == "wrong"
    assert outcome("answer:units=ignore", "Answer: 12 km", "12 m") == "correct"
    assert outcome("answer:mode=numeric", "Answer: twelve", "12") == "wrong"
    assert outcome("answer:mode=numeric", "Answer: 12", "a dozen") == "invalid_task"
    for spec in (
        "answer:units=maybe",
        "answer:tolerance=2",
        "answer:tolerance=x",
        "answer:mode=fuzzy",
        "math:extract=last",
    ):
        with pytest.raises(RecipeError):
            load_reward(spec)


def test_units_by_hand() -> None:
    kmh = unit("km/h")
    assert kmh is not None
    assert (kmh.factor, dict(kmh.powers)) == (Fraction(1000, 3600), {"m": 1, "s": -1})
    for text in ("meters per second", "mm", "ms", "µs", "kilograms", "min", "lbs", "ft", "GHz", "cubic meters"):
        assert unit(text) is not None, text
    for text in ("apples", "x^2", "m^", "/", "km/parsec", "m" * 50):
        assert unit(text) is None, text
    assert quantity("") is None
    assert quantity("1.2.3") is None


@pytest.mark.parametrize(
    ("spec", "text", "gold", "right"),
    [
        ("set", r"\boxed{\{2, 1\}}", "{1, 2}", True), ("set", "Answer: 1 and 2", ["2", "1"], True), ("set", "Answer: 1, 2, 3", "1, 2", False),
        ("set", "Answer: 1, 1", "1, 2", False), ("set", r"\boxed{\frac{1}{2}, -3}", "-3, 0.5", True), ("set", "Answer: (1,2); (3,4)", "(3,4); (1,2)", True),
        ("list", "Answer: 1, 2", [1, 2], True), ("list", "Answer: 2, 1", [1, 2], False), ("list", "Answer: [a, B]", "a, b", True),
        ("set", "Answer: 1,200", "1200", True), ("set", "Answer: x = 1 or x = 2", "x = 2, x = 1", True),
    ],
)  # fmt: skip
def test_sets_and_lists(spec: str, text: str, gold: Any, right: bool) -> None:
    assert outcome(f"answer:mode={spec}", text, gold) == ("correct" if right else "wrong")


@pytest.mark.parametrize(
    ("text", "gold", "columns", "expected"),
    [
        ("The answer is (B).", "B", {}, "correct"), ("Answer: B) Paris", "b", {}, "correct"), (r"\boxed{\text{C}}", "C", {}, "correct"),
        ("B", "B", {}, "correct"), ("So option D is right", "D", {}, "correct"), ("Answer: A", "B", {}, "wrong"),
        ("Answer: Paris", "B", {"choices": ["Rome", "Paris"]}, "correct"), ("Answer: B", 1, {"choices": ["Rome", "Paris"]}, "correct"),
        ("Answer: B", "Paris", {"options": {"A": "Rome", "B": "Paris"}}, "correct"), ("Answer: C", "B", {"choices": ["x", "y"]}, "unparseable"),
        ("I do not know", "B", {}, "unparseable"), ("Answer: B", "none", {}, "invalid_task"), ("Answer: B", "", {}, "invalid_task"),
        ("Answer: A", 0, {"choices": {"text": ["x", "y"], "label": ["A", "B"]}}, "correct"), ("Answer: Because", "B", {}, "unparseable"),
        ("Answer: B, C, D", "B", {}, "unparseable"), ("(B) or (C)", "B", {}, "unparseable"),
        ("Option B. Actually option C", "C", {}, "correct"), (r"\boxed{B. A. C. D.}", "B", {}, "unparseable"), ("Answer: B) A cat", "B", {}, "correct"),
    ],
)  # fmt: skip
def test_multiple_choice(text: str, gold: Any, columns: dict[str, Any], expected: str) -> None:
    assert outcome("answer:mode=choice", text, gold, **columns) == expected


def test_members_and_choices_by_hand() -> None:
    assert members(r"\left\{1, (2, 3), [4]\right\}") == ["1", "(2, 3)", "[4]"]
    assert members("") == []
    assert choice("E", ["a", "b"]) is None


def test_math_reads_the_place_that_the_recipe_chooses() -> None:
    text = r"I first thought \boxed{3}. #### 4"
    assert outcome("math:extract=hash", text, "4") == "correct"
    assert outcome("math:extract=boxed", text, "4") == "wrong"
    assert outcome("math:extract=boxed", "no box: 4", "4") == "unparseable"
    assert outcome("math:extract=marked", r"Answer: \frac{2}{4}", "0.5") == "correct"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is **18**.", "18"), ("The answer is 18. It took 3 steps.", "18"), ("The answer is 18, since 9*2 = 18.", "18"),
        (r"\boxed{\text{yes}}", "yes"), ("<think>5</think><answer>Paris</answer>", "Paris"), ("Answer: \"Paris\"", "Paris"),
        ("Answer: - 5", "-5"), ("Answer: 3 1/2", "3.5"), ("Answer: 7/2", "3 1/2"), ("Answer: 5 hrs", "5 h"), ("Answer: 5 gallons", "5 gal"),
        ("Answer: St. Petersburg", "St. Petersburg"), ("Answer: 0.5.", "0.5"),
    ],
)  # fmt: skip
def test_how_people_write_answers(text: str, gold: str) -> None:
    assert outcome("answer", text, gold) == "correct"
    assert outcome("answer", text, "17") == "wrong"


def test_choices_as_people_write_them() -> None:
    for text in (r"\boxed{\textbf{(B)}\ Paris}", "Answer: B - Paris", r"\boxed{\text{(B)}}"):
        assert outcome("answer:mode=choice", text, "B", choices=["Rome", "Paris"]) == "correct"
