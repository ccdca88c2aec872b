"""What an answer to a reasoning-gym problem may be, and where the library's own score is not taken as it is.

Four kinds of families are treated apart from the rest:

EXPRESSIONS   the scorer hands the answer to SymPy, whose parser evaluates it: names from a fixed list, numbers and
operators only, and in a jail only LITERALS      the scorer calls `eval` on the answer: it gets `ast.literal_eval` in
its place JUDGED_HERE   the scorer pays answers that are not the row's: judged here instead CORRECTED     the scorer
pays some wrong answers: checked here afterwards

For every family: a score that empty answers get as well counts as 0 (`above_floor`), and so does a score outside [0,
1]; repeating the question is no answer; a reference inside a longer word or number, or beside its opposite, does not
count as found.
"""

import ast
import copy
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]

SAME = 1e-9
LONGEST_ARITHMETIC, LONGEST_EXPRESSION = 1_000, 10_000
OPPOSITE = {"true": "false", "false": "true", "yes": "no", "no": "yes"}
CONTENT_FREE = ("?", "no idea", "0", "[]", "{}")
"""At most one of them can be right for a problem, so the second highest of their scores is the score of no content."""

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "atan2", "sinh", "cosh", "tanh", "coth",
    "sech", "csch", "asinh", "acosh", "atanh", "acoth", "asech", "acsch", "exp", "log", "ln", "sqrt", "cbrt", "root", "Abs", "sign",
    "factorial", "Rational", "Integer", "Float", "Pow", "Add", "Mul", "erf", "erfc", "erfi", "Si", "Ci", "Ei", "li", "Li", "gamma", "pi",
})  # fmt: skip
"""Names of SymPy's that an antiderivative or a polynomial may use.

Nothing that integrates, parses, or makes functions.
"""
NOT_SYMBOLS = frozenset("NOQS")
"""Single letters that are SymPy's own objects."""
TOKEN = re.compile(
    r"\s+|(?P<name>[A-Za-z][A-Za-z0-9_]{0,30})|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\*\*|[-+*/^!(),]"
)


class Refused(Exception):
    """The answer is not one that the family's scorer may see; the text says why."""


class Ungradable(Exception):
    """Nobody's answer to this problem can be judged; the text says why."""


# -- grammars --------------------------------------------------------------------------------------------------------


def expression(answer: str, gold: str | None) -> None:
    """Raises Refused unless the answer is made of numbers, operators, symbols and known functions."""
    if answer == gold:  # the row's own text: reasoning-gym wrote it
        return
    if len(answer) > LONGEST_EXPRESSION:
        raise Refused(f"an expression of more than {LONGEST_EXPRESSION} characters")
    at = 0
    while at < len(answer):
        token = TOKEN.match(answer, at)
        if token is None or not answer[at].isascii():
            raise Refused(f"{answer[at]!r} is not part of an expression")
        name = token["name"]
        if name and name not in FUNCTIONS and (len(name.rstrip("0123456789_")) != 1 or name in NOT_SYMBOLS):
            raise Refused(f"{name!r} is not a function or symbol that an answer may use")
        at = token.end()


def arithmetic(answer: str) -> tuple[list[int], Fraction]:
    """The integers in an expression of + - * / and parentheses, and its exact value.

    Raises Refused for anything else.
    """
    if len(answer) > LONGEST_ARITHMETIC or not re.fullmatch(r"[0-9+\-*/() \t\r\n]+", answer):
        raise Refused("not an expression of whole numbers, + - * / and parentheses")
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
            raise Refused("only + - * / between whole numbers")
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    try:
        return numbers, value(ast.parse(answer.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refused("not an expression") from None
    except ZeroDivisionError:
        raise Refused("it divides by zero") from None


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}

# -- families that are judged here -------------------------------------------------------------------------------------


def makes(target: Callable[[dict[str, Any]], int]) -> Callable[[str, Entry], float]:
    """Judges an expression that must use the row's numbers, each once, and equal `target(metadata)`."""

    def judge(answer: str, entry: Entry) -> float:
        numbers, value = arithmetic(answer)
        metadata = entry["metadata"]
        return float(sorted(numbers) == sorted(map(int, metadata["numbers"])) and value == target(metadata))

    return judge


def same_word(answer: str, entry: Entry) -> float:
    """The library compares truth values of texts: every text that is not empty is true."""
    return float(answer.strip().strip(".").lower() == str(entry["answer"]).lower())


def probability(answer: str, entry: Entry) -> float:
    """The library pays any prefix of the right number, as `0` is, and everything within 1e-4 where the right value is
    smaller."""
    try:
        given, right = number(answer), number(entry["answer"])
    except (ValueError, ZeroDivisionError, OverflowError):
        return 0.0
    return float(abs(given - right) <= min(1e-4, abs(right) / 20 if right else SAME))


def number(text: str) -> Fraction:
    """A decimal or a fraction. Exponents are bounded: `Fraction("1e9999999")` would take minutes."""
    text = text.replace(",", "").strip()
    if len(text) > 400 or re.search(r"[eE][+-]?\d{4}", text):
        raise ValueError("too long a number")
    return Fraction(text)


JUDGED_HERE = {
    "countdown": makes(lambda metadata: metadata["target"]),
    "puzzle24": makes(lambda metadata: 24),
    "game_of_life_halting": same_word,
    "coin_flip": probability,
}

# -- families that are checked afterwards ------------------------------------------------------------------------------


def finite(answer: str, entry: Entry, score: float, dataset: Any) -> float:
    """`nan` is at no distance from anything."""
    return 0.0 if "nan" in answer.lower() else score


def no_solutions(answer: str, entry: Entry, score: float, dataset: Any) -> float:
    """Where the right answer is empty, every text without a number is read as empty."""
    return score if entry["answer"].strip() else float(answer.strip() in EMPTY)


def real_factors(answer: str, entry: Entry, score: float, dataset: Any) -> float:
    """Half is paid for any factors with the right product: also for the number itself."""
    if score >= 1:
        return score
    factors = [int(part) for part in answer.split("×") if part.strip()]
    return score if len(factors) > 1 and min(factors) > 1 else 0.0


def the_rows_numbers(answer: str, entry: Entry, score: float, dataset: Any) -> float:
    """The library allows each number to be wrong by 1."""
    given, right = ([float(x) for x in json.loads(text.replace("'", '"'))] for text in (answer, entry["answer"]))
    return score if all(abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(given, right, strict=True)) else 0.0


def no_tautology(answer: str, entry: Entry, score: float, dataset: Any) -> float:
    """What follows from no premises at all is no conclusion from these."""
    bare = dict(entry, metadata=dict(entry["metadata"], premises=[]))
    return 0.0 if dataset.score_answer(answer=answer, entry=bare) > 0.05 else score


EMPTY = ("", '""', "''")
CORRECTED = {
    "complex_arithmetic": finite,
    "polynomial_equations": no_solutions,
    "prime_factorization": real_factors,
    "number_sorting": the_rows_numbers,
    "propositional_logic": no_tautology,
}
EXPRESSIONS = frozenset({"simple_integration", "intermediate_integration", "polynomial_multiplication"})
LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
EVALUATES_ITS_OWN = frozenset({"bitwise_arithmetic", "number_sorting"})
"""Scorers that call `eval` on the row's own text, never on the answer."""

# -- the score -----------------------------------------------------------------------------------------------------------


def score(family: str, dataset: Any, entry: Entry, answer: str) -> float:
    """A score in [0, 1]. Raises Refused and Ungradable; whatever else the library raises is the answer's doing."""
    if answer != entry["answer"] and entry["question"].strip() in answer:
        raise Refused("it repeats the question")
    if family in JUDGED_HERE:
        return JUDGED_HERE[family](answer, entry)
    if family in EXPRESSIONS:
        expression(answer, entry["answer"])
    before = copy.deepcopy(entry)
    paid = in_range(dataset.score_answer(answer=answer, entry=entry))
    if family in CORRECTED and paid > 0:
        paid = in_range(CORRECTED[family](answer, before, paid, dataset))
    if 0 < paid < 1 and (embedded(answer, before["answer"], paid) or hedged(answer, before["answer"])):
        return 0.0
    return above_floor(family, dataset, before, paid) if paid > 0 else 0.0


def above_floor(family: str, dataset: Any, entry: Entry, paid: float) -> float:
    """The score, if it is more than what answers without content get."""
    free = []
    for probe in CONTENT_FREE:
        try:
            got = in_range(dataset.score_answer(answer=probe, entry=copy.deepcopy(entry)))
            if got > 0 and family in CORRECTED:
                got = in_range(CORRECTED[family](probe, entry, got, dataset))
        except Exception:
            got = 0.0
        free.append(got)
    floor = sorted(free)[-2]
    if floor >= 1 - SAME:
        raise Ungradable(f"reasoning-gym's scorer of {family} pays every answer to this problem")
    return paid if paid > floor + SAME else 0.0


def in_range(value: Any) -> float:
    """The library's score; 0 where it leaves [0, 1] (`exp` of a negative error), which no right answer does."""
    value = float(value)
    return min(value, 1.0) if 0.0 <= value <= 1.0 + SAME and not math.isnan(value) else 0.0


def embedded(answer: str, gold: object, paid: float) -> bool:
    """Whether part of the pay is for a reference found in the answer, but only inside longer words or numbers."""
    if not isinstance(gold, str) or not gold or not answer or abs(paid - len(gold) / len(answer)) > SAME:
        return False
    at = answer.find(gold)
    while at >= 0:
        before, after = answer[:at][-1:], answer[at + len(gold) :][:1]
        glued = (joins(before) and joins(gold[0])) or (joins(after) and joins(gold[-1]))
        if not glued and before not in ("-", "/", ".") and after not in ("/",):
            return False
        at = answer.find(gold, at + 1)
    return answer.find(gold) >= 0


def hedged(answer: str, gold: object) -> bool:
    """Whether the answer says the reference and its opposite."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return str(gold).lower() in OPPOSITE and OPPOSITE[str(gold).lower()] in words


def joins(character: str) -> bool:
    return character.isalnum() or character == "_"
