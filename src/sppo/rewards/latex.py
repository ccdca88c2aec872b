r"""The grammar of a mathematical answer: tokens become a tree. `\frac{1}{2}`, `1 1/4`, `(3, \infty)`, `x \in [-2, 7]`.

All tokens or none: what the grammar does not know is `Unreadable`. Nothing is evaluated; what two trees have in common is decided in `same.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .tokens import GREEK, Token, Unreadable, places, tidy, tokens
from .units import Unit, unit

DEEPEST, MOST_ITEMS, HIGHEST = 40, 100, 100
"""Limits on an answer: rules of the grammar within each other, members of a list, and levels of its tree."""


@dataclass(frozen=True, slots=True)
class Node:
    """One step of an answer's tree. `op` says what `args` are; two nodes are equal when they were written the same.

    number (value, digits after the point or None)      symbol (name)         constant (e | i | pi | oo)
    sum (terms…)   product (factors…)   power (base, exponent)   negative (x)   quotient (a, b)   plusminus (sign, a or None, b)
    call (name, arguments…)   factorial (x, 1 or 2)   big (name, below, above, body)   dots ()
    list (connective, items)   bracket (opening, closing, items)   set (items)   such (variable, condition)   reals ()
    join (union | intersection | minus, a, b)   matrix (rows)   relation (operators, sides)   ratio (parts)   clock (hour, minute…)
    words (text)   quantity (value, unit)   labelled (letter, value)   counted (value, noun)   based (digits, base)
    """

    op: str
    args: tuple[Any, ...] = ()


_SYMBOLS = {*GREEK} | places(
    "varepsilon vartheta varrho varphi Upsilon ell hbar partial nabla aleph jmath star dagger blacksquare Box"
).keys()


FUNCTIONS = places(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc asin acos atan "
    "ln lg log exp abs sgn det gcd lcm max min floor ceil Re Im arg"
)


_INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}


_ACCENTS = places(
    "vec hat bar tilde overline overrightarrow widehat widetilde dot ddot underline mathcal mathfrak mathscr "
    "overleftrightarrow overarc wideparen"
)


_RELATIONS = {
    "=": "=", "==": "=", ":=": "=", "approx": "=", "ne": "!=", "neq": "!=", "in": "in", "notin": "notin",
    "<": "<", "lt": "<", "<=": "<=", "le": "<=", "leq": "<=", "leqslant": "<=",
    ">": ">", "gt": ">", ">=": ">=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "equiv": "equiv", "cong": "cong", "sim": "sim", "simeq": "sim", "parallel": "parallel", "perp": "perp", "propto": "propto",
    "subset": "subset", "subseteq": "subseteq", "to": "to", "rightarrow": "to", "mapsto": "to",
    "implies": "implies", "Rightarrow": "implies", "iff": "iff", "Leftrightarrow": "iff",
}  # fmt: skip


_JOINS = {
    "cup": "union", "bigcup": "union", "cap": "intersection", "bigcap": "intersection", "setminus": "minus", "backslash": "minus",
}  # fmt: skip


_OPENING = {
    "(": ")", "[": "]", "\\{": "\\}", "langle": "rangle", "lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert", "lVert": "rVert",
    "lbrace": "rbrace", "lbrack": "rbrack", "lparen": "rparen",
}  # fmt: skip


_CLOSING = set(_OPENING.values())


_DOTS = places("ldots dots cdots vdots ddots")


_NO_FACTOR = (
    places("pm mp lor land vee wedge over choose not mid vert colon circ degree prime infty").keys() | _DOTS.keys()
)


_CONNECTIVES = {"and": "and", "or": "or", ",and": "and", ",or": "or", ", and": "and", ", or": "or", "&": "and"}


_BASES = places("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")


_CURRENCIES = {"$": "$", "\\$": "$", "€": "€", "£": "£", "¥": "¥"}


_MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MATHEMATICAL = {*FUNCTIONS, *GREEK, "sqrt", "infinity", "infty"}
_ENGLISH = places("not the is are was for and or of to in no yes if then than as by all any")
"""Words that are never a product of their letters."""


_SCALES = {"C": "celsius", "F": "fahrenheit"}


PERCENT, DEGREE = Unit(Fraction(1, 100), ()), Unit(Fraction(1), (("degree", 1),))


def number_node(text: str) -> Node:
    """The node of a number's token. Raises Unreadable for an exponent beyond reason."""
    mantissa, _, exponent = text.partition("e")
    if len(exponent.lstrip("+-")) > 4:
        raise Unreadable("a number's exponent is beyond reason")
    fixed, _, repeated = mantissa.removesuffix(")").partition("(")
    whole, point, fraction = fixed.partition(".")
    value = Fraction(int(whole or "0")) + (Fraction(int(fraction), 10 ** len(fraction)) if fraction else 0)
    if repeated:
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fraction))
        return Node("number", (value, None))
    if exponent:
        value *= Fraction(10) ** int(exponent)
    return Node("number", (value, len(fraction) - int(exponent or 0) if point or exponent else None))


def lettered(words: Sequence[str]) -> bool:
    """Whether words are several single letters, with `and` or `or` between them: `A and C`."""
    return {len(word) for word in words if word not in ("and", "or")} == {1} and all(word.isalpha() for word in words)


def _goes_on(text: str) -> str | None:
    """A decimal whose written digits repeat, with their period: `0.333` is `0.(3)`; None where they do not: 3.14159, 2.718281828."""
    whole, _, digits = text.partition(".")
    if not digits.isdigit() or len(digits) > 60:
        return None
    for start in range(min(3, len(digits))):
        rest = digits[start:]
        for period in range(1, len(rest) // 2 + 1):
            times_written = 2 if period > 1 and start == 0 else 3
            if len(rest) >= period * times_written and rest == (rest[:period] * len(rest))[: len(rest)]:
                return f"{whole or '0'}.{digits[:start]}({rest[:period]})"
    return None


# -- the grammar ----------------------------------------------------------------------------------------------------------------


class Reader:
    """Recursive descent over the tokens. Lists bind loosest, then relations, unions, sums, products, powers."""

    def __init__(self, found: Sequence[Token]) -> None:
        self.tokens, self.at, self.depth, self.bars = found, 0, 0, 0

    def whole(self) -> Node:
        """The tree of all the tokens. Raises Unreadable when one is left."""
        if not self.tokens:
            raise Unreadable("it is empty")
        node = self._list()
        if self.at < len(self.tokens):
            raise Unreadable(f"{self.tokens[self.at].text!r} has no place in it")
        if _depth(node) > HIGHEST:
            raise Unreadable("it is a chain of too many steps")
        return node

    # small things

    def _is(self, *texts: str, ahead: int = 0) -> bool:
        """Whether the next token is one of these marks or commands."""
        i = self.at + ahead
        return i < len(self.tokens) and self.tokens[i].kind in ("mark", "command") and self.tokens[i].text in texts

    def _kind(self, kind: str, ahead: int = 0) -> bool:
        return self.at + ahead < len(self.tokens) and self.tokens[self.at + ahead].kind == kind

    def _take(self, *texts: str) -> bool:
        if self._is(*texts):
            self.at += 1
            return True
        return False

    def _next(self) -> Token:
        if self.at >= len(self.tokens):
            raise Unreadable("it ends too soon")
        self.at += 1
        return self.tokens[self.at - 1]

    def _expect(self, *texts: str) -> str:
        token = self._next()
        if token.kind not in ("mark", "command") or token.text not in texts:
            raise Unreadable(f"{token.text!r} stands where {texts[0]!r} should")
        return token.text

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable(f"it is nested more than {DEEPEST} deep")

    # lists and relations

    def _separator(self) -> str | None:
        """Take a comma, semicolon, `and`, `or`, or a comma with one of them; `,`, `and` or `or`."""
        found = None
        if self._is(",", ";"):
            self.at += 1
            found = ","
        if (self._kind("text") or self._kind("word")) and self.tokens[self.at].text.strip().lower() in _CONNECTIVES:
            found = _CONNECTIVES[self.tokens[self.at].text.strip().lower()]
            self.at += 1
        elif self._is("lor", "vee"):
            self.at, found = self.at + 1, "or"
        elif self._is("land", "wedge"):
            self.at, found = self.at + 1, "and"
        return found

    def _list(self) -> Node:
        items, how = self._items()
        return items[0] if len(items) == 1 else Node("list", (how, tuple(items)))

    def _items(self) -> tuple[list[Node], str]:
        items, how = [self._relation()], ","
        while (separator := self._separator()) is not None:
            how = separator if separator != "," else how
            if len(items) > MOST_ITEMS:
                raise Unreadable(f"it has more than {MOST_ITEMS} members")
            items.append(self._relation())
        return items, how

    def _relation_here(self) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at].kind in ("mark", "command"):
            text = self.tokens[self.at].text
            if text == "not" and self._is("=", "in", ahead=1):
                self.at += 1
                return "!=" if self.tokens[self.at].text == "=" else "notin"
            return _RELATIONS.get(text)
        return None

    def _relation(self) -> Node:
        if self._is("therefore") or self._relation_here() in (
            "=",
            "implies",
        ):  # `= 5`, `\Rightarrow 5`: what stands before is understood
            self.at += 1
        operators, sides = [], [self._ratio()]
        while (operator := self._relation_here()) is not None:
            self.at += 1
            operators.append(operator)
            sides.append(self._ratio())
        if "equiv" in operators:  # \\mod and \\pmod say the same of a congruence
            sides = [Node("call", ("pmod", *s.args[1:])) if s.args[:1] == ("mod",) else s for s in sides]
        return Node("relation", (tuple(operators), tuple(sides))) if operators else sides[0]

    def _ratio(self) -> Node:
        start = self.at
        parts = [self._join()]
        while self._is(":", "colon") and not self.builder:
            self.at += 1
            parts.append(self._join())
        if len(parts) == 1:
            return parts[0]
        return Node("clock" if self._is_time(start) else "ratio", tuple(parts))

    def _is_time(self, start: int) -> bool:
        """Whether the tokens from `start` are a time of day, `12:00` or `9:05:30`, rather than a ratio."""
        hour, *rest = [t.text for t in self.tokens[start : self.at] if t.text not in (":", "colon")]
        if len(rest) not in (1, 2) or not all(len(part) == 2 and part.isdigit() and int(part) < 60 for part in rest):
            return False
        return hour.isdigit() and len(hour) <= 2 and int(hour) <= 24

    builder = False
    """Whether `:` and `|` mean "such that" where the reader stands."""

    def _join(self) -> Node:
        node = self._sum()
        while (
            self.at < len(self.tokens)
            and self.tokens[self.at].kind == "command"
            and self.tokens[self.at].text in _JOINS
        ):
            how = _JOINS[self._next().text]
            node = Node("join", (how, node, self._sum()))
        return node

    # arithmetic

    def _sum(self) -> Node:
        self._deeper()
        terms = [self._signed()]
        while self._is("+", "-", "pm", "mp"):
            sign = self._next().text
            term = self._product()
            if sign in ("pm", "mp"):
                left = terms[0] if len(terms) == 1 else Node("sum", tuple(terms))
                terms = [Node("plusminus", (sign, left, term))]
            else:
                terms.append(term if sign == "+" else Node("negative", (term,)))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signed(self) -> Node:
        if self._is("+", "-", "pm", "mp"):
            sign = self._next().text
            inner = self._again(self._signed)
            if sign in ("pm", "mp"):
                return Node("plusminus", (sign, None, inner))
            if sign == "+":
                return inner
            if inner.op == "number":
                return Node("number", (-inner.args[0], inner.args[1]))
            return Node("negative", (inner,))
        return self._product()

    def _again(self, rule: Any) -> Node:
        self._deeper()
        node: Node = rule()
        self.depth -= 1
        return node

    def _product(self) -> Node:
        node = self._factor()
        while True:
            if self._take("*", "cdot", "times", "ast", "bullet"):
                node = times(node, self._signed_factor())
            elif (
                self._kind("word")
                and self.tokens[self.at].text in ("x", "X")
                and self._kind("number", 1)
                and self._is("^", ahead=2)
                and self.tokens[self.at + 1].text == "10"
            ):
                self.at += 1  # 1.2 x 10^3
                node = times(node, self._signed_factor())
            elif self._take("/", "div"):
                node = Node("quotient", (node, self._signed_factor()))
            elif self._take("bmod", "mod"):
                node = Node("call", ("mod", node, self._signed_factor()))
            elif self._take("pmod"):
                node = Node("call", ("pmod", node, self._argument()))
            elif self._begins_a_factor():
                if self._names_something(self.at - 1) or (
                    self._names_something(self.at) and self.tokens[self.at].spaced
                ):
                    raise Unreadable("it has words beside a value")
                node = times(node, self._factor())
            else:
                return node

    def _names_something(self, at: int) -> bool:
        """Whether a token is a word, rather than a function or letters to be multiplied."""
        token = self.tokens[at]
        return (
            token.kind == "word"
            and len(token.text) > 3
            and token.text.lower() not in _MATHEMATICAL
            and (at == 0 or token.spaced)
        )

    def _signed_factor(self) -> Node:
        if self._is("+", "-"):
            return self._signed_in_place()
        return self._factor()

    def _signed_in_place(self) -> Node:
        sign = self._next().text
        inner = self._again(self._signed_factor)
        return inner if sign == "+" else Node("negative", (inner,))

    def _begins_a_factor(self) -> bool:
        if self.at >= len(self.tokens):
            return False
        token = self.tokens[self.at]
        if token.kind == "number":
            last = self.tokens[self.at - 1]
            return not (last.kind == "number" or last.text in (",", "."))
        if token.kind == "word":
            return token.text.lower() not in ("and", "or")
        if token.kind == "text":
            return token.text.strip() in ("e", "i") or (len(token.text.strip()) == 1 and token.text.strip().isalpha())
        if token.kind == "mark":
            if token.text == "|":
                return self.bars == 0 and not self.builder
            return token.text in ("(", "[", "{", "\\{") or (token.text in _OPENING and token.text != "\\{")
        return not (
            token.text in _RELATIONS
            or token.text in _JOINS
            or token.text in _CLOSING
            or token.text in _NO_FACTOR
            or token.text.startswith("end ")
        )

    def _factor(self) -> Node:
        self._deeper()
        node = self._mixed() or self._primary()
        node = self._after(node)
        self.depth -= 1
        return node

    def _mixed(self) -> Node | None:
        r"""A mixed number, `2\frac{1}{2}` or `1 1/4`, or None."""
        if not (self._kind("number") and self.tokens[self.at].text.isdigit()):
            return None
        whole, start = int(self.tokens[self.at].text), self.at
        if self._is("frac", "dfrac", "tfrac", "cfrac", ahead=1):
            self.at += 1
            part = self._primary()
            if part.op == "quotient" and _proper(part) and not self._is("^"):
                return Node("sum", (integer(whole), part))
            self.at = start
        elif (
            self._kind("number", 1)
            and self._is("/", ahead=2)
            and self._kind("number", 3)
            and self.tokens[self.at + 1].spaced
        ):
            above, below = self.tokens[self.at + 1].text, self.tokens[self.at + 3].text
            if above.isdigit() and below.isdigit() and int(above) < int(below) and not self._is("^", ahead=4):
                self.at += 4
                return Node("sum", (integer(whole), Node("quotient", (integer(int(above)), integer(int(below))))))
        return None

    def _after(self, node: Node) -> Node:
        """What stands behind a factor: powers, factorials, degrees, per cent, a base."""
        while self.at < len(self.tokens):
            if self._is("^"):
                self.at += 1
                if self._take("circ", "degree") or (
                    self._is("{") and self._is("circ", "degree", ahead=1) and self._is("}", ahead=2)
                ):
                    if self._is("{"):
                        self.at += 3
                    node = self._minutes(Node("quantity", (node, DEGREE)))
                elif self._is("prime") or (self._is("{") and self._is("prime", ahead=1)):
                    node = Node("call", ("prime", node))
                    if self._take("{"):
                        while self._take("prime"):
                            pass
                        self._expect("}")
                    else:
                        self.at += 1
                else:
                    node = Node("power", (node, self._exponent()))
            elif self._is("circ", "degree") and self.tokens[self.at].text == "degree":
                self.at += 1
                node = self._minutes(Node("quantity", (node, DEGREE)))
            elif self._is("!"):
                self.at += 1
                double = self._is("!") and not self.tokens[self.at].spaced
                self.at += double
                node = Node("factorial", (node, 2 if double else 1))
            elif self._take("%"):
                node = Node("quantity", (node, PERCENT))
            elif node.op == "number" and self.tokens[self.at].text.strip().lower() in _MULTIPLES:
                node = Node("number", (node.args[0] * _MULTIPLES[self._next().text.strip().lower()], None))
            elif self._is("'") and node.op in ("symbol", "call"):
                self.at += 1
                node = Node("call", ("prime", node))
            elif self._is("_") and node.op == "number":
                self.at += 1
                node = self._based(node)
            elif self._is("$", "\\$", "€", "£", "¥") and node.op == "number":
                node = Node(
                    "quantity",
                    (
                        node,
                        unit(_CURRENCIES[self._next().text])
                        or Unit(Fraction(1), (("currency " + self.tokens[self.at - 1].text, 1),)),
                    ),
                )
            else:
                break
        return node

    def _minutes(self, degrees: Node) -> Node:
        """`45°15'` and `45°15'30''` after the degrees; `20 °C`."""
        if (self._kind("word") or self._kind("text")) and self.tokens[self.at].text.strip() in _SCALES:
            kind = _SCALES[self._next().text.strip()]
            return Node("quantity", (degrees.args[0], Unit(Fraction(1), ((kind, 1),))))
        parts, scale = [degrees.args[0]], 60
        while self._kind("number") and (
            self._is("'", ahead=1) or (self._is("^", ahead=1) and self._is("prime", ahead=2))
        ):
            value = number_node(self._next().text)
            while self._take("'", "^", "prime"):
                pass
            parts.append(Node("quotient", (value, integer(scale))))
            scale *= 60
        return degrees if len(parts) == 1 else Node("quantity", (Node("sum", tuple(parts)), DEGREE))

    def _based(self, node: Node) -> Node:
        value, places = node.args
        base = self._argument()
        known = (
            base.args[0]
            if base.op == "number"
            else _BASES.get(base.args[0])
            if base.op in ("words", "symbol")
            else None
        )
        if (
            known is None
            or places is not None
            or value < 0
            or value.denominator != 1
            or int(known) != known
            or not 2 <= known <= 36
        ):
            raise Unreadable("a number has an index that is no base")
        if any(int(digit) >= known for digit in str(int(value))):
            raise Unreadable(f"{int(value)} has digits that base {int(known)} lacks")
        return Node("based", (str(int(value)), int(known)))

    def _exponent(self) -> Node:
        if self._is("-", "+"):
            sign = self._next().text
            inner = self._argument(whole=True)
            return inner if sign == "+" else Node("negative", (inner,))
        return self._argument(whole=True)

    def _argument(self, whole: bool = False) -> Node:
        """What a command takes: a group in braces, or one digit, letter or command. `whole`: all the digits of a number."""
        if self._is("{"):
            return self._group()
        if self._kind("number"):
            text = self.tokens[self.at].text
            if whole or len(text) == 1:
                return number_node(self._next().text)
            if not text.isdigit():
                raise Unreadable("a command takes part of a number")
            self.tokens = [*self.tokens[: self.at], Token("number", text[1:]), *self.tokens[self.at + 1 :]]
            return integer(int(text[0]))
        if self._kind("word"):
            text = self.tokens[self.at].text
            if len(text) == 1 or (whole and text in FUNCTIONS):
                return self._primary()
            self.tokens = [*self.tokens[: self.at], Token("word", text[1:]), *self.tokens[self.at + 1 :]]
            return _letter(text[0])
        return self._again(self._primary)

    def _group(self) -> Node:
        r"""`{…}`: a group; with commas, a set written without backslashes; `{a \over b}`."""
        self._deeper()
        bars, builder = self.bars, self.builder
        self.bars, self.builder = 0, False
        self._expect("{")
        if self._take("}"):
            raise Unreadable("a group is empty")
        items, _ = self._items()
        if self._is("over", "choose"):
            how = self._next().text
            below = self._list()
            items = [Node("quotient", (items[0], below)) if how == "over" else Node("call", ("binom", items[0], below))]
        self._expect("}")
        self.bars, self.builder = bars, builder
        self.depth -= 1
        return items[0] if len(items) == 1 else Node("set", tuple(items))

    def _bracketed(self) -> Node:
        opening = self._next().text
        self._deeper()
        bars, builder = self.bars, self.builder
        self.bars, self.builder = 0, opening in ("\\{", "lbrace")
        closing = _OPENING[opening]
        ends = (")", "]") if opening in ("(", "[") else (closing, "vert", "|") if opening == "lvert" else (closing,)
        if self._is(*ends) and opening in ("\\{", "lbrace"):
            self.at += 1
            node = Node("set")
        else:
            items, _ = self._items()
            if self.builder and self._take(":", "|", "mid", "colon"):
                condition, how = self._items()
                items = [
                    Node(
                        "such",
                        (
                            items[0],
                            condition[0]
                            if len(condition) == 1
                            else Node("list", (how if how != "," else "and", tuple(condition))),
                        ),
                    )
                ]
            end = self._expect(*ends)
            node = self._closed(opening, end, items)
        self.bars, self.builder = bars, builder
        self.depth -= 1
        return node

    @staticmethod
    def _closed(opening: str, end: str, items: list[Node]) -> Node:
        if opening in ("lvert", "lVert"):
            return Node("call", ("abs", items[0]))
        if opening in ("lfloor", "lceil"):
            return Node("call", ("floor" if opening == "lfloor" else "ceil", items[0]))
        if opening in ("\\{", "lbrace"):
            return items[0] if items[0].op == "such" else Node("set", tuple(items))
        if len(items) == 1 and (opening, end) in (("(", ")"), ("[", "]"), ("lparen", "rparen"), ("lbrack", "rbrack")):
            return items[0]
        if len(items) == 1 and opening != "langle":
            raise Unreadable("its brackets do not match")
        brackets = {"langle": "(", "rangle": ")", "lparen": "(", "rparen": ")", "lbrack": "[", "rbrack": "]"}
        return Node("bracket", (brackets.get(opening, opening), brackets.get(end, end), tuple(items)))

    # what stands for itself

    def _primary(self) -> Node:
        token = self.tokens[self.at] if self.at < len(self.tokens) else self._next()
        if token.kind == "number":
            self.at += 1
            node = number_node(token.text)
            if self._is("ldots", "dots", "cdots") and node.args[1] is not None:
                self.at += 1  # 3.14159…: what is written of it; 0.333…: what goes on for ever
                repeating = _goes_on(token.text)
                if repeating is not None:
                    return number_node(repeating)
            return node
        if token.kind == "word":
            return self._word()
        if token.kind == "text":
            return self._text()
        if token.kind == "mark":
            return self._marked(token)
        return self._commanded(token)

    def _text(self) -> Node:
        content = self._next().text.strip()
        if not content:
            raise Unreadable("a text is empty")
        if content in ("e", "i"):
            return Node("constant", (content,))
        if content[0].isdigit() or content[0] == ".":
            return Reader(tokens(tidy(content))).whole()
        if not all(c.isalpha() or c in " '-.()" for c in content):
            raise Unreadable(f"it holds the text {content!r}")
        if content in FUNCTIONS:
            return self._function(content)
        letters = content.replace(",", " ").split()
        if len(letters) > 1 and lettered(letters):
            return Reader(tokens(content)).whole()
        if content.lower() == "infinity":
            return Node("constant", ("oo",))
        return Node("symbol", (content,)) if len(content) == 1 else Node("words", (content.strip("().").casefold(),))

    def _marked(self, token: Token) -> Node:
        if token.text == "{":
            return self._group()
        if token.text in _OPENING:
            return self._bracketed()
        if token.text == "|":
            self.at += 1
            self._deeper()
            bars, builder = self.bars, self.builder
            self.bars, self.builder = 1, False
            inner = self._list()
            self.bars, self.builder = bars, builder
            self._expect("|", "vert", "rvert")
            self.depth -= 1
            return Node("call", ("abs", inner))
        if token.text in _CURRENCIES:
            self.at += 1
            value = self._factor()
            name = _CURRENCIES[token.text]
            return Node("quantity", (value, unit(name) or Unit(Fraction(1), ((f"currency {name}", 1),))))
        raise Unreadable(f"{token.text!r} has no place in it")

    def _word(self) -> Node:
        """A run of letters: a function, a constant, a name, or a product of letters."""
        token = self._next()
        text = token.text
        lower = text.lower()
        if text in FUNCTIONS:
            return self._function(text)
        if lower in _ENGLISH:
            raise Unreadable(f"it has the word {text!r}")
        if lower in ("pi", "infinity", "infty", "inf", "oo"):
            return Node("constant", ("pi" if lower == "pi" else "oo",))
        if lower == "sqrt":
            return Node("power", (self._argument(), Node("quotient", (integer(1), integer(2)))))
        if text in _SYMBOLS:
            return self._named(text)
        if self._names_something(self.at - 1):
            return self._named(text.casefold())
        for name in sorted(FUNCTIONS, key=len, reverse=True):  # xsin(x)
            if len(name) > 2 and text.endswith(name) and len(text) - len(name) <= 2:
                self.at -= 1
                self.tokens = [
                    *self.tokens[: self.at],
                    Token("word", text[: -len(name)], token.spaced),
                    Token("word", name),
                    *self.tokens[self.at + 1 :],
                ]
                return self._word()
        return self._letters(text)

    def _letters(self, text: str) -> Node:
        """A product of letters. What is behind the last, an index or a power, is the last one's alone."""
        node: Node | None = None
        for i, letter in enumerate(text):
            factor = _letter(letter)
            if i == len(text) - 1:
                if self._is("_"):
                    factor = self._named(letter)
                factor = self._after(factor)
            node = factor if node is None else times(node, factor)
        assert node is not None
        return node

    def _named(self, name: str) -> Node:
        """A symbol, with its index."""
        if self._is("_"):
            self.at += 1
            start = self.at
            self._argument(whole=True)
            name += "_" + "".join(t.text for t in self.tokens[start : self.at] if t.text not in ("{", "}"))
        return Node("symbol", (name,))

    def _commanded(self, token: Token) -> Node:
        self.at += 1
        name = token.text
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return Node("quotient", (self._argument(), self._argument()))
        if name in ("sqrt", "surd"):
            return self._root()
        if name in ("binom", "dbinom", "tbinom"):
            return Node("call", ("binom", self._argument(), self._argument()))
        if name in ("pi", "infty", "imath"):
            return Node("constant", ({"pi": "pi", "infty": "oo", "imath": "i"}[name],))
        if name in ("ldots", "dots", "cdots", "vdots", "ddots"):
            return Node("dots")
        if name in FUNCTIONS:
            return self._function(name)
        if name in _SYMBOLS and name not in ("triangle", "square"):
            return self._named(name)
        if name in ("emptyset", "varnothing"):
            return Node("set")
        if name == "mathbb":
            letter = self._argument()
            if letter == Node("symbol", ("R",)):
                return Node("reals")
            return Node("symbol", (f"set {_written(letter)}",))
        if name in ("angle", "triangle", "measuredangle", "square", "odot", "sphericalangle"):
            named = self._next()
            if named.kind not in ("word", "text"):
                raise Unreadable(f"\\{name} names nothing")
            return Node("symbol", (f"{name} {named.text}",))
        if name == "underline":
            return self._argument()
        if name in _ACCENTS:
            return Node("symbol", (f"{name} {_written(self._argument())}",))
        if name in ("sum", "prod", "int", "iint", "oint", "lim", "limsup", "liminf", "inf", "sup"):
            return self._big(name)
        if name == "boxed":
            return self._argument()
        if name in _OPENING:
            self.at -= 1
            return self._bracketed()
        if name in ("vert", "mid", "|"):
            self.tokens = [*self.tokens[: self.at - 1], Token("mark", "|"), *self.tokens[self.at :]]
            self.at -= 1
            return self._marked(self.tokens[self.at])
        if name.startswith("begin "):
            return self._matrix(name.removeprefix("begin "))
        raise Unreadable(f"\\{name} is not known")

    def _root(self) -> Node:
        index = integer(2)
        if self._take("["):
            index = self._sum()
            self._expect("]")
        return Node("power", (self._argument(), Node("quotient", (integer(1), index))))

    def _function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        for _ in range(2):
            if self._is("^") and power is None:
                self.at += 1
                power = self._exponent()
            elif self._is("_") and base is None:
                self.at += 1
                base = self._argument(whole=True)
        if (
            power is not None
            and name in _INVERSE
            and power in (Node("negative", (integer(1),)), Node("number", (Fraction(-1), None)))
        ):
            name, power = _INVERSE[name], None
        self._deeper()
        inner = self._group_items() if self._is(*_OPENING, "{", "|") else [self._running()]
        self.depth -= 1
        node = (
            Node("call", ("logbase", base, *inner))
            if base is not None and name == "log"
            else Node("call", (name, *inner))
        )
        if base is not None and name != "log":
            raise Unreadable(f"\\{name} has an index")
        return node if power is None else Node("power", (node, power))

    def _group_items(self) -> list[Node]:
        node = self._primary()
        if node.op == "bracket" and node.args[:2] == ("(", ")"):
            return list(node.args[2])
        return list(node.args) if node.op == "set" else [node]

    def _running(self) -> Node:
        r"""The argument of a function without brackets: `\sin 2x`, up to a sign, a slash or another function."""
        node = self._signed_factor()
        while self._begins_a_factor() and not self._is(*_OPENING) and not self._is("|"):
            token = self.tokens[self.at]
            if token.text in FUNCTIONS or token.kind == "text":
                break
            node = times(node, self._factor())
        return node

    def _big(self, name: str) -> Node:
        below: Node | None = None
        above: Node | None = None
        for _ in range(2):
            if self._is("_") and below is None:
                self.at += 1
                below = self._big_limit()
            elif self._is("^") and above is None:
                self.at += 1
                above = self._argument(whole=True)
        return Node("big", (name, below, above, self._again(self._product)))

    def _big_limit(self) -> Node:
        if not self._is("{"):
            return self._argument(whole=True)
        return self._group()

    def _matrix(self, environment: str) -> Node:
        if environment not in ("matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(f"the environment {environment} is not known")
        self._deeper()
        bars, builder = self.bars, self.builder
        self.bars, self.builder = 0, False
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not self._take(f"end {environment}"):
            if self._take("hline"):
                continue
            if self._take("\\\\"):
                if row:
                    rows.append(tuple(row))
                row = []
                continue
            if row:
                self._expect("&")
            row.append(self._relation())
            if sum(map(len, rows)) + len(row) > MOST_ITEMS:
                raise Unreadable("its matrix is too large")
        if row:
            rows.append(tuple(row))
        if not rows or len({len(r) for r in rows}) != 1:
            raise Unreadable("its matrix has no equal rows")
        self.bars, self.builder = bars, builder
        self.depth -= 1
        node = Node("matrix", tuple(rows))
        return Node("call", ("det", node)) if environment == "vmatrix" else node


def _depth(node: Node) -> int:
    """Levels of a tree, counted without recursion."""
    deepest, stack = 0, [(node, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        for arg in node.args:
            parts = arg if isinstance(arg, tuple) else (arg,)
            stack.extend((part, level + 1) for part in parts if isinstance(part, Node))
            stack.extend(
                (part, level + 1) for row in parts if isinstance(row, tuple) for part in row if isinstance(part, Node)
            )
    return deepest


def times(a: Node, b: Node) -> Node:
    """The product, flat. Raises Unreadable for words: they multiply nothing."""
    if "words" in (a.op, b.op):
        raise Unreadable("it has words beside a value")
    return Node("product", (*(a.args if a.op == "product" else (a,)), b))


def integer(value: int) -> Node:
    return Node("number", (Fraction(value), None))


def _letter(letter: str) -> Node:
    return Node("constant", (letter,)) if letter in ("e", "i") else Node("symbol", (letter,))


def _proper(part: Node) -> bool:
    above, below = part.args
    return (
        above.op == below.op == "number"
        and above.args[1] is below.args[1] is None
        and above.args[0].denominator == below.args[0].denominator == 1
        and 0 < above.args[0] < below.args[0]
    )


def _written(node: Node) -> str:
    """One spelling of a small tree, for a name: letters and digits in order."""
    out: list[str] = []
    for arg in node.args:
        if isinstance(arg, Node):
            out.append(_written(arg))
        elif isinstance(arg, tuple):
            out.extend(_written(a) if isinstance(a, Node) else str(a) for a in arg)
        else:
            out.append(str(arg))
    return node.op[:1] * (node.op not in ("symbol", "number", "product", "constant", "words")) + "".join(out)


def literal(node: Node) -> Fraction | None:
    r"""The value of what is written as a number: `-3`, `1/2`, `2\frac{1}{2}`, `1.2 \times 10^{-3}`; None for all that must be worked out."""
    op, args = node.op, node.args
    if op == "number":
        return args[0]
    if op == "negative":
        inner = literal(args[0])
        return None if inner is None else -inner
    if op == "quotient" and args[0].op in ("number", "negative") and args[1].op == "number" and args[1].args[0]:
        above = literal(args[0])
        return None if above is None else above / args[1].args[0]
    if op == "sum" and len(args) == 2 and args[0].op == "number" and args[1].op == "quotient" and _proper(args[1]):
        return args[0].args[0] + args[1].args[0].args[0] / args[1].args[1].args[0]
    if op == "power" and args[0] == integer(10):
        return literal(Node("product", (integer(1), node)))
    if op == "product" and len(args) == 2 and args[0].op in ("number", "negative") and args[1].op == "power":
        mantissa, (base, exponent) = literal(args[0]), args[1].args
        power = literal(exponent) if exponent.op in ("number", "negative") else None
        if (
            base == integer(10)
            and mantissa is not None
            and power is not None
            and power.denominator == 1
            and abs(power) < 1000
        ):
            return mantissa * Fraction(10) ** int(power)
    return None
