r"""Mathematical answers: what is the same and what is not, kind by kind, and where the answer stands in a response.

Each kind has right pairs (paid) and wrong ones (never paid). Kinds come from public failures of verifiers; the sets under `../shared/data` are
used where they are found, and are not part of this repository.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sppo.rewards.extract import extract_answer
from sppo.rewards.loading import load_reward
from sppo.rewards.math import build, judge_one
from sppo.rewards.reading import read
from sppo.rewards.same import same
from sppo.rewards.tokens import Unreadable
from sppo.types import Rollout, Task, Verdict

SETS = Path(__file__).parents[3] / "shared" / "data" / "math"


def outcome(gold: Any, response: str, extract: str = "auto") -> str:
    return str(judge_one({"gold": str(gold), "response": response, "extract": extract})["outcome"])


SAME = r"""
# fractions and decimals
1/2 ~ 0.5
\frac{1}{2} ~ \dfrac12
\frac 59 ~ 5/9
\frac9{19} ~ 9/19
\frac{1}{12} ~ 0.0833333333333333
\frac{1}{3} ~ 0.333333
\sqrt{2} ~ 1.414214
\pi ~ 3.141593
27.0 ~ 27
.35625 ~ 0.35625
# e-notation
6.02e23 ~ 6.02e23 ~ 6.02 \times 10^{23} ~ \text{6.02e23}
1.2e-3 ~ 0.0012
-4E5 ~ -400000
5e-05 ~ 0.00005
1.4903e4 ~ 14903
2.7778e-6 m^3/s ~ 2.7778\times10^{-6}\ \mathrm{m^3/s}
3e8 ~ 3 x 10^8 m/s ~ 3e8 \text{ m/s}
1e-8 ~ 10^{-8}
# Euler's number and i
2e ~ 2\mathrm{e}
1-\frac{1}{\mathrm{e}} ~ \frac{e-1}{e}
3+2\mathrm{i} ~ 2i+3
e^{i\pi} ~ -1
(1+i)^2 ~ 2i
# signs
+7 ~ 7
-5 ~ −5 ~ \boxed{-5}
-\frac{1}{2} ~ \frac{-1}{2}
# thousands
9500 ~ \$9{,}500 ~ 9\,500
1234 ~ 1,\!234
8000 ~ 8,000
11111111100 ~ 11,\! 111,\! 111,\! 100
1234567.5 ~ 1,234,567.5
# mixed numbers
5/4 ~ 1 1/4
2.5 ~ 2\frac{1}{2}
137 \frac{1}{2} ~ 137.5
-2.5 ~ -2\frac{1}{2}
# repeating decimals
0.8\overline{3} ~ \frac{5}{6}
0.\overline{3} ~ \frac13
0.\overline{142857} ~ 1/7
0.\dot{3} ~ 1/3
1.\bar{6} ~ 5/3
# sums, powers, functions
391 ~ 17\cdot 23
720 ~ 6!
15 ~ 5!!
3 ~ \lfloor \pi \rfloor ~ \log_2 8
10 ~ \binom{5}{2} ~ {5 \choose 2}
2 ~ \lg 100
3+2\sqrt 2 ~ (1+\sqrt 2)^2
\frac{\sqrt3}{2} ~ \sin 60^\circ
55 ~ \sum_{k=1}^{10} k
\frac{1}{2}\ln 2 ~ \ln\sqrt2
\sin^{-1}(1) ~ \frac{\pi}{2}
-2 ~ \sqrt[3]{-8}
0 ~ \sin \pi
4\sqrt{2} ~ 4\sqrt(2)
10^{100} ~ 10^{50}\cdot 10^{50}
\frac{1}{2004!} ~ \frac{2005}{2005!}
# letters
2x+3 ~ 3+x2
\frac{x+2}{7} ~ \frac{x}{7}+\frac{2}{7}
\tan^2(y)+1 ~ \sec^2(y)
\sqrt{1/n} ~ \frac{1}{\sqrt{n}}
p - q ~ -q+p
ab ~ a \cdot b
(-1)^n ~ \cos(n\pi)
-\frac{2(x^2+6)}{9(x^2-2)\sqrt[3]{x^2-2}^2} ~ -\frac{8x^2}{9(x^2-2)^{5/3}}+\frac{2}{3(x^2-2)^{2/3}}
|x-3| ~ |3-x|
x_{1}+x_2 ~ x_2+x_1
# equations
x=5 ~ 5
5 ~ x=5 ~ 5 = x ~ x = 2+3 = 5 ~ a+b=5
y=2x+1 ~ 2y=4x+2 ~ 2x+1
f(x)=x^2 ~ x^2
34x+45y-20z+100=0 ~ -34x-45y+20z-100=0
n=2,3,4 ~ 2,3,4 ~ n = 4, 3, 2
x=1, y=2 ~ y=2, x=1
x=1 \text{ or } x=2 ~ x=2, x=1
# inequalities and intervals
m \geq \sqrt{2} ~ m \in [\sqrt{2}, +\infty)
x>3 ~ (3,\infty)
(3,\infty) ~ x>3
x \in [-2,7] ~ -2 \leq x \leq 7
(2,12) \cup (12,102) ~ (12,102)\cup(2,12)
(-\infty,2)\cup(3,\infty) ~ x<2 \text{ or } x>3
(-\infty,3)\cup(3,\infty) ~ x \ne 3
\mathbb{R} \setminus \{3\} ~ x \neq 3
2x - 6 > 0 ~ x - 3 > 0
-x > 2 ~ x < -2
x \ge 1 ~ 1 \le x
# sets, lists, tuples
\{1,2\} ~ 2, 1 ~ \{1,2,2\}
1,-2 ~ -2, 1
1331 and 1728 ~ 1728, 1331
1 \pm \sqrt{19} ~ 1-\sqrt{19}, 1+\sqrt{19}
\{1\pm\sqrt{5},-2\} ~ -2, 1+\sqrt5, 1-\sqrt5
x = \pm 2 ~ x = 2 \text{ or } x=-2
(1,\frac{9}{2}) ~ (1,4.5)
\left(\frac{3}{5},\frac{8}{3}\right] ~ (0.6, \frac83]
(1,2) ~ 1, 2
\langle 1,2,3\rangle ~ (1,2,3)
# matrices
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{bmatrix}1.0\\2\end{bmatrix}
(\begin{pmatrix}1&x\\0&1\\\end{pmatrix}) ~ \begin{pmatrix}1&x\\0&1\end{pmatrix}
# infinity
\infty ~ +\infty
-\infty ~ -\infty
# ratios and times
\frac{3}{4} ~ 3:4
1:2:3 ~ 2:4:6
12:30 ~ 12:30
3:45 pm ~ 3:45 p.m.
# bases
1011_2 ~ 1011_{2}
204_5 ~ 204_{\text{five}}
11 ~ 1011_2
# per cent
50 ~ 50\%
0.5 ~ 50\%
50\% ~ 0.5 ~ 50
# degrees
30^\circ ~ 30 ~ 30 degrees
30 ~ 30°
90^{\circ} ~ 90\text{ degrees}
45^\circ 30' ~ 45.5^\circ
\angle A = 30^\circ ~ 30
# units and nouns
12 km ~ 12000 m ~ 12
12 ~ 12\text{ km}
864 \mbox{ inches}^2 ~ 864
\frac{270}7\text{ degrees} ~ \frac{270}{7}
72 ~ 72 clips ~ 72 \text{ clips}
36 ~ \$36
2\sqrt{3}\text{ cm} ~ 2\sqrt3
5.4 \text{ cents} ~ 5.4
# multiples
1500000 ~ 1.5 million ~ 1,500 thousand
60 ~ 5 dozen ~ 5 dozen eggs
\$5000000 ~ 5 million dollars
# words
\text{Evelyn} ~ evelyn
\text{(C)} ~ C
(C) ~ \text{C}
\text{no solution} ~ No solution
\text{ellipse} ~ the ellipse
abc ~ abc
\textbf{East} ~ east
\infty ~ \text{infinity} ~ ∞
\mathbb{R} ~ \text{all real numbers} ~ (-\infty,\infty)
A, C ~ A and C ~ C, A
# repeating decimals with dots
1/3 ~ 0.333... ~ 0.333\ldots
1/6 ~ 0.1666...
3/11 ~ 0.2727...
e ~ 2.718281828...
\pi ~ 3.14159265\ldots
# dates
2024-03-15 ~ 2024-03-15
July 4, 1776 ~ \text{July 4, 1776} ~ 4 July 1776 ~ July 4th, 1776
\text{June 20} ~ June 20
# roots and points
x=3 \text{ or } x=-3 ~ x_1 = 3, x_2 = -3
3, -3 ~ x_1 = -3, x_2 = 3
(3,-2) ~ x=3, y=-2 ~ y=-2, x=3
x=3, y=-2 ~ (3,-2)
# compound quantities
3 hours 20 minutes ~ 200 minutes ~ 3\text{ hours and }20\text{ minutes}
5 feet 6 inches ~ 66 inches
# units in LaTeX
12\text{ km/h} ~ 12\ \frac{\text{km}}{\text{h}}
2.5\,\mu\text{m} ~ 2.5 \times 10^{-6}\text{ m}
5\ \Omega ~ 5 ohms ~ 0.005\ \text{k}\Omega
€20 ~ 20 euros
# about
3.14 ~ approximately 3.14 ~ \text{about } 3.14
# options with their letter
\textbf{(C)}\ 15 ~ C ~ 15 ~ \text{(C) } 15
C ~ \textbf{(C)}\ 15
# bold, skips, colons, congruences
\frac{3}{4} ~ \mathbf{\frac{3}{4}} ~ \underline{0.75}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ~ \begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}
1:2 ~ 1 \colon 2
x \equiv 3 \pmod 5 ~ x \equiv 3 \mod 5
-i ~ -\mathrm{i}
18 ~ \Rightarrow 18
5 ~ \,5\, ~ \;5
"""

DIFFERENT = r"""
# tiny values
3\times 10^{-8} ~ 0 ~ 5\times 10^{-8}
0.0000001 ~ 0.0000002
6.626\times 10^{-34} ~ 1.6\times10^{-19}
\frac{1}{2^{99}} ~ \frac{1}{2^{98}}
e^{-50} ~ 0 ~ e^{-51}
0 ~ e^{-50}
\frac{1}{2004!} ~ \frac{1}{2006!}
\frac{2^{2005}+1}{3 \cdot 2^{2006}} ~ \frac{1}{3 \cdot 2^{2006}}
e^{-1000} ~ 0
0.0000006626 ~ 0.0000006630
# large values
10^{100} ~ 10^{100}+1
10^{15} ~ 10^{15}+1
9^{9^9} ~ 5
9^{9^{9^9}} ~ 5
5 ~ 9^{9^{9^9}} ~ 10000000000!
# rounding
100 ~ 99.9999999
1 ~ 0.9999996
\pi ~ 3.14 ~ 22/7
\frac13 ~ 0.333
33.3 ~ \frac{100}{3}
0.1 ~ 0.10000001
# e-notation
6.02e23 ~ 6.02
5e-05 ~ 5
2e ~ 2 ~ 2000
3e8 ~ 3 ~ 3e9
1.2e-3 ~ 1.2
# a number inside
1-\frac{1}{\mathrm{e}} ~ 1 ~ 1+\frac{1}{\mathrm{e}}
3+2\mathrm{i} ~ 5
\lg 100 ~ 100
\$9{,}500 ~ 9
0.\overline{3} ~ 0
0.1\overline{6} ~ 0.1
5!! ~ 5 ~ 120
n=3k ~ 3
5 ~ 5x
2 ~ 2^{10}
\sqrt{17} ~ 17
\log 100 ~ 100
# infinity
\infty ~ 17 ~ \{17\} ~ -\infty ~ \{x : x\}
17 ~ \infty
# words
abc ~ cba
Evelyn ~ nylevE
\text{no solution} ~ \text{solution no}
\text{even} ~ \text{odd}
A ~ B
\text{(A)} ~ \text{(B)}
\text{north} ~ \text{thorn}
# sets, lists, tuples
(1,2) ~ \{1,2\} ~ (2,1)
\{1,2\} ~ 1,2,2,1
1331 and 1728 ~ 1728
12 ~ 12 \text{ or } 13
1,234 ~ 1, 234
\pm 2021 ~ 2021
5 ~ \pm 5
\langle 1,2,3\rangle ~ \langle 1,2,4\rangle
19, 46, \text{ and } 82 ~ 21, 36, and 82
1, 2, \ldots, n ~ 1, 3, 5, \ldots, 2n-1
# intervals
[0,1] ~ (0,1)
(0,1) ~ [0,1]
(3,4] ~ (3,4)
x>3 ~ x\ge 3
D = (0, 1) ~ D = (0, 1.5)
x<2 \text{ and } x>-3 ~ x<2 \text{ or } x>-3
x > 3 ~ y > 3 ~ x < 3
# equations
x=5 ~ 5=x=7 ~ y=5
5 ~ x=7, y=5
f(x)=x^2 ~ g(y)=x^2
y=2x+1 ~ 0=0
n=2,3,4 ~ n=1,2,3
2x+z=1 ~ 1
F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1} ~ F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}
x \equiv 3 \pmod{5} ~ x \equiv 2 \pmod{5}
# letters
x^2 ~ y^2
|x| ~ x
\sqrt{x^2} ~ x
a-b ~ b-a
x ~ -x
\sum_{k=1}^{n} k ~ \sum_{k=1}^{n} k^2
# ratios and times
12:00 ~ 1:00
1:15 ~ 2:30
1:2:3:\ldots ~ 1:4:9:\ldots
3:45 pm ~ 3:45 am
3:4 ~ 4:3
# bases
1011_2 ~ 1011 ~ 11 ~ 2 ~ 13_8
# units
5 km ~ 5 m
3 km ~ 3 kg
5 apples ~ 5 oranges
5 dozen ~ 5
1.5 million ~ 1.5
30^\circ ~ \frac{\pi}{6}
45^\circ 15' ~ 45
20^\circ C ~ 20 K
50 ~ 5\%
# matrices
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
# dates
2024-03-15 ~ 2024-03-16 ~ 2006 ~ 2024
July 4, 1776 ~ July 4, 1777 ~ 1776 ~ 4
2006 ~ 2024-03-15
# roots and points
x_1 = 3, x_2 = 5 ~ x_1 = 5, x_2 = 3
(3,-2) ~ x=-2, y=3
x=3, y=-2 ~ (-2,3)
# compound quantities
5 feet 6 inches ~ 5 ~ 6 ~ 56
3 hours 20 minutes ~ 3 ~ 20 ~ 320 ~ 3 hours
# options with their letter
\textbf{(C)}\ 15 ~ D ~ \textbf{(D)}\ 15 ~ \textbf{(C)}\ 14
# repeating decimals with dots
1/3 ~ 0.34...
\pi ~ 3.14...
"""


def pairs(table: str) -> list[Any]:
    """The pairs of a table whose lines are `gold ~ answer ~ another`, under a heading that names their kind."""
    found, kind = [], ""
    for line in table.strip().splitlines():
        if line.startswith("# "):
            kind = line[2:]
            continue
        gold, *answers = line.split(" ~ ")
        found += [pytest.param(gold, answer, id=f"{kind}: {gold} | {answer}") for answer in answers]
    return found


@pytest.mark.parametrize(("gold", "given"), pairs(SAME))
def test_answers_that_say_the_same_are_paid(gold: str, given: str) -> None:
    assert outcome(gold, rf"So it is $\boxed{{{given}}}$.") == "correct"
    assert outcome(given, rf"\boxed{{{given}}}") == "correct"  # a gold accepts itself
    assert outcome(gold, rf"\boxed{{{gold}}}") == "correct"


@pytest.mark.parametrize(("gold", "given"), pairs(DIFFERENT))
def test_answers_that_say_something_else_are_not_paid(gold: str, given: str) -> None:
    assert outcome(gold, rf"So it is $\boxed{{{given}}}$.") == "wrong"


@pytest.mark.parametrize(
    "text",
    [
        r"\foo{3}",
        r"1 - \frac{1}{\unknown{e}}",
        r"\frac{1}{2",
        r"\text{$5$",
        "5 ? 6",
        r"\begin{cases} 1 \\ 2 \end{cases}",
        r"\frac{}{2}",
        "3 4",
        "(1, 2",
        "1 +",
        r"\sqrt",
        r"\forall x > 0, f(x) = 0",
        "12_2",
        "Hence we get 5",
        r"\text{The answer is } 5",
        "1/" * 300 + "1",
        r"1 \pm " * 200 + "1",
        r"\int",
        "{" * 60 + "1" + "}" * 60,
        "1" * 2001,
        "1e99999",
        "5 @ 6",
        "the answer is 5",
    ],
)
def test_what_cannot_be_read_whole_is_never_a_number_inside_it(text: str) -> None:
    with pytest.raises(Unreadable):
        read(text)
    assert judge_one({"gold": text, "response": r"\boxed{5}"})["outcome"] == "invalid_task"
    assert judge_one({"gold": text, "response": None})["outcome"] == "invalid_task"
    for number in ("1", "2", "3", "5"):
        assert outcome(number, rf"\boxed{{{text}}}") in ("unparseable", "wrong")


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Final Answer: **73**", "73"),
        ("Hence we get $9$", "9"),
        ("The answer is $9$ because of symmetry.", "9"),
        (r"The answer is $\text{Evelyn}$ because she won.", "Evelyn"),
        ("The last digits are:\n\\[Answer: 009\\]", "9"),
        ("The answer is 1 1/4.", "5/4"),
        (r"It is \boxed{4}. No: \boxed{5}.", "5"),
        (r"\boxed{42}. I marked it with \boxed as asked in step 2.", "42"),
        (r"so $\fbox{2}$", "2"),
        (r"so $\boxed 2$", "2"),
        ("<think>x is 3</think><answer>5</answer>", "5"),
        (r"<think>.</think><answer>\boxed{5}</answer>", "5"),
        ("<answer> **5** </answer>", "5"),
        ("<answer>The answer is 5.</answer>", "5"),
        ("**Answer:** 4.", "4"),
        ("Answer: $x = 5$", "5"),
        (r"The answer is \(\frac{1}{2}\), since it is half.", "0.5"),
        ("Answer:\n\n\\[\n\\frac{1}{2}\n\\]", "1/2"),
        ("so $3+4=7$.", "7"),
        (r"Hence the value is $\frac{1}{2}$.", "0.5"),
        ("#### 72", "72"),
        ("The total is 72 clips, altogether.", "72"),
        ("It costs $29.00.", "29"),
        ("It is 8, not 7.", "8"),
        ("It is 8. 7 is wrong.", "8"),
        ("x^2+1", "1+x^2"),
        ("1 1/4", "1.25"),
        (r"\boxed{5} and then \boxed{}", "5"),
        ("## Final Answer\n\n$12$", "12"),
        ("Answer: 18 (as 9 times 2 is 18)", "18"),
        ("the answer is $6.02e23$ per mole", "6.02e23"),
        ("It is **5 centimeters**.", "5 cm"),
        ("It costs **$9,500.00**.", "9500"),
        ("the total is __5__ dollars", "5"),
        ("Therefore, x = 3", "3"),
        ("Result:5", "5"),
        ("May 5", "May 5"),
        ("she has 5 apples left", "5"),
        ("the final answer is therefore 5", "5"),
        ("The answer is approximately 3.14.", "3.14"),
        ("The intersection is (3, -2).", "(3,-2)"),
        ("The train leaves at 12:00.", "12:00"),
        ("The chance is 50%", "0.5"),
        ("It is not 4 but 5.", "5"),
        ("答案是 5", "5"),
        ("答案是5。", "5"),
        ("答案是 6，不是 5。", "6"),
        ("答案是 5 个苹果。", "5"),
        ("总共有5个。", "5"),
    ],
)
def test_where_the_answer_stands(text: str, gold: str) -> None:
    assert outcome(gold, text) == "correct"
    assert outcome("17", text) in ("wrong", "unparseable")


@pytest.mark.parametrize(
    "text",
    [
        "not 17",
        "The answer is not 17",
        "$17$ is wrong, I do not know",
        "17x",
        "x^{17}",
        "x_17",
        "It isn't 17.",
        "B17",
        r"\boxed{\frac{17}{1}",
        r"<think>\boxed{17}</think> I do not know.",
        r"<think>It is \boxed{17}",
        "<think>17</think><answer>5</answer>",
        r"\boxed{17} \boxed{5}",
        r"\boxed{17, 5}",
        "17+1",
        r"\frac{17}{3}",
        "17!",
        "the 17th",
        "I don't think it's 17",
        "I do not believe that the answer is 17",
        "The answer cannot be 17",
        "It's not true that the answer is 17",
        "答案是 17 或 18",
        "It is anything but 17",
        "不是 17",
        "答案是 6，不是 17。",
        "at 12:17",
        "The point is (3, 17).",
        "±17",
        "2**17",
        "on 2024-01-17",
        "",
    ],
)
def test_a_number_that_is_not_the_answer_is_not_paid(text: str) -> None:
    assert outcome("17", text) in ("wrong", "unparseable")
    verdict = load_reward("answer").judge([Rollout.answer(Task("t", "q", {"answer": "17"}), [], [], [], "stop", text)])[
        0
    ]
    assert verdict.score == 0.0


OPTIONS = ["Paris", "London", "Rome", "Berlin"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I choose B.", "B"),
        ("The correct option is B", "B"),
        ("Therefore, the correct choice is (B).", "B"),
        ("The best answer is B because of the river.", "B"),
        ("答案是B", "B"),
        ("故选B。", "B"),
        ("Option A is wrong. I choose option B.", "B"),
        ("<think>A or C?</think> B", "B"),
        ("A long explanation of all that there is to say. " * 20 + "So I choose B.", "B"),
        ("The correct option isn't B", None),
        ("It is not option B", None),
        ("I would not choose B", None),
        ("option B is wrong", None),
        ("The correct choice is B or C", None),
        ("<think>Option B</think> I do not know.", None),
        ("I cannot answer a question like this", None),
        ("The answer is a city.", None),
    ],
)
def test_what_chooses_an_option_and_what_does_not(text: str, letter: str | None) -> None:
    reward = load_reward("answer:mode=choice")
    for gold in "ABC":
        task = Task("t", "q", {"answer": gold, "choices": OPTIONS})
        verdict = reward.judge([Rollout.answer(task, [], [], [], "stop", text)])[0]
        assert (verdict.outcome == "correct") == (gold == letter), gold


def test_boxes_close_together_are_not_a_set() -> None:
    assert outcome("1, 2", r"\boxed{1}, \boxed{2}") == "wrong"
    assert outcome("2", r"\boxed{1}, \boxed{2}") == "correct"


def test_the_choice_of_place() -> None:
    text = "The box says \\boxed{1}, the mark 2.\nAnswer: 2\n#### 3\n4"
    assert [extract_answer(text, how) for how in ("boxed", "marked", "hash", "number", "auto")] == [
        "1",
        "2",
        "3",
        "4",
        "1",
    ]


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"\boxed{2}", r"We get $x=1/2$ or $x=2$; our answer is $\boxed 2$.", "correct"),
        (r"\boxed{2}", r"so the answer is $\fbox{2}$.", "correct"),
        (r"\boxed{$9{,}500}", "9500", "correct"),
        (r"\boxed{9\,500}", "9500", "correct"),
        (r"\boxed{5e-5}", 5e-05, "correct"),
        (r"\boxed{10^{-5}}", 1e-05, "correct"),
        (r"\boxed{10^{-4}}", 1e-05, "wrong"),
        (r"\boxed{\,5\,}", "5", "correct"),
        ("The chance is 50%", "0.5", "correct"),
        ("±7", "7", "wrong"),
        ("The train leaves at 12:00.", "0", "wrong"),
        ("The point is (3, -2).", "-2", "wrong"),
        ("答案是5。", "5", "correct"),
        (r"\boxed{5}", 5e-05, "wrong"),
        (r"\boxed{0.8\overline{3}}", "5/6", "correct"),
        (r"\boxed{2\sqrt 3}", r"2\sqrt{3}", "correct"),
        (r"\boxed{17\cdot 23}", "391", "wrong"),
        (r"\boxed{−5}", "-5", "correct"),
        ("$x=5, y=7$", "7", "wrong"),
        ("so $3+4=7$", "7", "correct"),
        (r"so it is $\frac{1}{2}$", "2", "wrong"),
        (r"so it is $\frac{1}{2}$", "1/2", "correct"),
        (r"\boxed{cba}", "abc", "wrong"),
        ("4", float("nan"), "invalid_task"),
    ],
)
def test_the_reward_answer_reads_the_same_numbers(text: str, gold: Any, expected: str) -> None:
    task = Task("t", "q", {"answer": gold})
    assert load_reward("answer").judge([Rollout.answer(task, [], [], [], "stop", text)])[0].outcome == expected


def test_data_check_says_which_references_cannot_be_graded() -> None:
    reward = build(workers=1)
    golds = ["5", r"\foo{3}", r"\frac{1", r"x \in [-2, 7]", None]
    reasons = reward.check_all([Task("t", "q", {"answer": gold}) for gold in golds])
    verdicts = reward.judge(
        [Rollout.answer(Task("t", "q", {"answer": gold}), [], [], [], "stop", r"\boxed{3}") for gold in golds]
    )
    reward.close()
    assert [why is None for why in reasons] == [True, False, False, True, False]
    assert r"\foo is not known" in str(reasons[1])
    assert [v.outcome for v in verdicts] == ["wrong", "invalid_task", "invalid_task", "wrong", "invalid_task"]


def test_a_verdict_over_its_limit_is_a_timeout() -> None:
    reward = build(limit=1e-9, workers=1)
    verdict = reward.judge([Rollout.answer(Task("t", "q", {"answer": "5"}), [], [], [], "stop", r"\boxed{5}")])[0]
    reward.close()
    assert (verdict.outcome, verdict.score) == ("timeout", 0.0)


def test_a_judge_in_process_that_does_not_come_back_costs_one_response() -> None:
    from sppo.rewards.user_reward import each_within

    def judge(rollout: Rollout) -> Verdict:
        while rollout.text == "spin":
            pass
        return Verdict(1.0, "correct")

    rollouts = [Rollout.answer(Task("t", "q"), [], [], [], "stop", text) for text in ("a", "spin", "b")]
    expected = ["correct", "timeout", "correct"]
    assert [v.outcome for v in each_within(rollouts, judge, limit=0.3)] == expected
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(each_within(rollouts, judge, limit=0.3)))  # no signals there
    thread.start()
    thread.join()
    assert [v.outcome for v in found] == expected


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9^{9}}}}",
        r"10000000000!",
        r"\binom{10^{12}}{10^{6}}",
        r"\sin(9^{9^9})",
        r"\sum_{k=1}^{1000}\sum_{j=1}^{1000}\sum_{m=1}^{1000} k^{j^m}",
        r"\prod_{k=1}^{999} k!",
        "(x+y)^{100000}",
        "1" * 1999,
        "((((((1.1^9)^9)^9)^9)^9)^9)^9",
        r"\frac{1}{0}",
        r"\ln 0",
        "0^{0}",
        "0^{-1}",
        r"e^{e^{e^{e^{e}}}}",
        r"\gcd(0, 0)",
        r"\sqrt{" * 30 + "2" + "}" * 30,
        "|" * 100,
        "-" * 500 + "1",
        "1" + "!" * 300,
        "x" + "'" * 300,
        r"\frac" * 300,
    ],
)
def test_no_answer_costs_more_than_its_budget(text: str) -> None:
    """Whatever it is, it ends; nothing but itself is paid for it."""
    try:
        readings = read(text)
    except Unreadable:
        return
    assert not any(same(a, b) for a in readings for b in read("17"))
    assert not any(same(b, a) for a in readings for b in read("x^2 + 1"))


@pytest.mark.skipif(not SETS.is_dir(), reason="the public sets are not beside this checkout")
def test_every_gold_of_the_public_sets_accepts_itself_and_not_its_neighbour() -> None:
    import pyarrow.parquet as parquet

    answer = load_reward("answer")
    for path in sorted(SETS.glob("*.parquet")):
        golds = [
            row["ground_truth"]
            for row in parquet.read_table(path, columns=["reward_model"])["reward_model"].to_pylist()
        ]
        distinct = list(dict.fromkeys(golds))
        refused = [
            g
            for g in distinct
            if outcome(g, rf"\boxed{{{g}}}") != "correct" or answer.check(Task("t", "q", {"answer": g}))
        ]
        assert refused == [], path.name
        assert [(g, h) for g, h in pairwise(distinct) if outcome(g, rf"\boxed{{{h}}}") == "correct"] == [], path.name
