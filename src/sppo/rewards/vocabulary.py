"""The meaning of words, commands and marks in a mathematical answer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from .tokens import GREEK, places
from .units import Unit, unit

SYMBOLS = {*GREEK} | places(
    "varepsilon vartheta varrho varphi Upsilon ell hbar partial nabla aleph jmath star dagger blacksquare Box"
).keys()
FUNCTIONS = places(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc asin acos atan "
    "ln lg log exp abs sgn det gcd lcm max min floor ceil Re Im arg"
)
INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
ACCENTS = places(
    "vec hat bar tilde overline overrightarrow widehat widetilde dot ddot underline mathcal mathfrak mathscr "
    "overleftrightarrow overarc wideparen"
)
RELATIONS = {
    "=": "=", "==": "=", ":=": "=", "approx": "=", "ne": "!=", "neq": "!=", "in": "in", "notin": "notin",
    "<": "<", "lt": "<", "<=": "<=", "le": "<=", "leq": "<=", "leqslant": "<=",
    ">": ">", "gt": ">", ">=": ">=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "equiv": "equiv", "cong": "cong", "sim": "sim", "simeq": "sim", "parallel": "parallel", "perp": "perp", "propto": "propto",
    "subset": "subset", "subseteq": "subseteq", "to": "to", "rightarrow": "to", "mapsto": "to",
    "implies": "implies", "Rightarrow": "implies", "iff": "iff", "Leftrightarrow": "iff",
}  # fmt: skip
JOINS = {
    "cup": "union", "bigcup": "union", "cap": "intersection", "bigcap": "intersection", "setminus": "minus", "backslash": "minus",
}  # fmt: skip
OPENING = {
    "(": ")", "[": "]", "\\{": "\\}", "langle": "rangle", "lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert", "lVert": "rVert",
    "lbrace": "rbrace", "lbrack": "rbrack", "lparen": "rparen",
}  # fmt: skip
CLOSING = set(OPENING.values())
DOTS = places("ldots dots cdots vdots ddots")
NO_FACTOR = (
    places("pm mp lor land vee wedge over choose not mid vert colon circ degree prime infty").keys() | DOTS.keys()
)
CONNECTIVES = {"and": "and", "or": "or", ",and": "and", ",or": "or", ", and": "and", ", or": "or", "&": "and"}
BASES = places("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
CURRENCIES = {
    mark: found for mark in ("$", "\\$", "€", "£", "¥") if (found := unit(mark.removeprefix("\\"))) is not None
}
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MATHEMATICAL = {*FUNCTIONS, *GREEK, "sqrt", "infinity", "infty"}
ENGLISH = places("not the is are was for and or of to in no yes if then than as by all any")
"""Words that are never a product of their letters."""
SCALES = {"C": "celsius", "F": "fahrenheit"}
PERCENT, DEGREE = Unit(Fraction(1, 100), ()), Unit(Fraction(1), (("degree", 1),))


def lettered(words: Sequence[str]) -> bool:
    """Whether words are several single letters, with `and` or `or` between them: `A and C`."""
    return {len(word) for word in words if word not in ("and", "or")} == {1} and all(word.isalpha() for word in words)
