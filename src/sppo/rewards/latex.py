r"""The grammar of a mathematical answer: tokens become a tree. `\frac{1}{2}`, `1 1/4`, `(3, \infty)`, `x \in [-2, 7]`.

Either all tokens are read, or the answer is `Unreadable`. Nothing is evaluated; `same.py` decides whether two trees are
the same answer.
"""

from __future__ import annotations

from fractions import Fraction

from .atoms import Atoms
from .cursor import HIGHEST, MOST_ITEMS
from .syntax import Node, depth, integer, number_node, proper, times
from .tokens import Unreadable
from .units import Unit
from .vocabulary import (
    BASES,
    CLOSING,
    CONNECTIVES,
    CURRENCIES,
    DEGREE,
    JOINS,
    MULTIPLES,
    NO_FACTOR,
    OPENING,
    PERCENT,
    RELATIONS,
    SCALES,
)


class Reader(Atoms):
    """Recursive descent over the tokens. Lists bind loosest, then relations, unions, sums, products, powers."""

    def whole(self) -> Node:
        """The tree of all the tokens. Raises Unreadable when one is left."""
        if not self.tokens:
            raise Unreadable("it is empty")
        node = self._list()
        if self.at < len(self.tokens):
            raise Unreadable(f"{self.tokens[self.at].text!r} has no place in it")
        if depth(node) > HIGHEST:
            raise Unreadable("it is a chain of too many steps")
        return node

    def _separator(self) -> str | None:
        """Take a comma, semicolon, `and`, `or`, or a comma with one of them; `,`, `and` or `or`."""
        found = None
        if self._is(",", ";"):
            self.at += 1
            found = ","
        if (self._kind("text") or self._kind("word")) and self.tokens[self.at].text.strip().lower() in CONNECTIVES:
            found = CONNECTIVES[self.tokens[self.at].text.strip().lower()]
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
            return RELATIONS.get(text)
        return None

    def _relation(self) -> Node:
        if self._is("therefore") or self._relation_here() in ("=", "implies"):
            self.at += 1  # `= 5`, `\Rightarrow 5`: the left side is understood
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

    def _join(self) -> Node:
        node = self._sum()
        while (
            self.at < len(self.tokens) and self.tokens[self.at].kind == "command" and self.tokens[self.at].text in JOINS
        ):
            how = JOINS[self._next().text]
            node = Node("join", (how, node, self._sum()))
        return node

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

    def _signed_factor(self) -> Node:
        if not self._is("+", "-"):
            return self._factor()
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
                return not self.in_bars and not self.builder
            return token.text in ("(", "[", "{", "\\{") or (token.text in OPENING and token.text != "\\{")
        return not (
            token.text in RELATIONS
            or token.text in JOINS
            or token.text in CLOSING
            or token.text in NO_FACTOR
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
            if part.op == "quotient" and proper(part) and not self._is("^"):
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
        """A factor with its suffixes: powers, factorials, degrees, percent, a base."""
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
            elif self._is("degree"):
                self.at += 1
                node = self._minutes(Node("quantity", (node, DEGREE)))
            elif self._is("!"):
                self.at += 1
                double = self._is("!") and not self.tokens[self.at].spaced
                self.at += double
                node = Node("factorial", (node, 2 if double else 1))
            elif self._take("%"):
                node = Node("quantity", (node, PERCENT))
            elif node.op == "number" and self.tokens[self.at].text.strip().lower() in MULTIPLES:
                node = Node("number", (node.args[0] * MULTIPLES[self._next().text.strip().lower()], None))
            elif self._is("'") and node.op in ("symbol", "call"):
                self.at += 1
                node = Node("call", ("prime", node))
            elif self._is("_") and node.op == "number":
                self.at += 1
                node = self._based(node)
            elif self._is(*CURRENCIES) and node.op == "number":
                node = Node("quantity", (node, CURRENCIES[self._next().text]))
            else:
                break
        return node

    def _minutes(self, degrees: Node) -> Node:
        """`45°15'` and `45°15'30''` after the degrees; `20 °C`."""
        if (self._kind("word") or self._kind("text")) and self.tokens[self.at].text.strip() in SCALES:
            kind = SCALES[self._next().text.strip()]
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
            base.args[0] if base.op == "number" else BASES.get(base.args[0]) if base.op in ("words", "symbol") else None
        )
        if (
            known is None
            or places is not None
            or value < 0
            or value.denominator != 1
            or int(known) != known
            or not 2 <= known <= 36
        ):
            raise Unreadable("a number has an index that is not a base")
        if any(int(digit) >= known for digit in str(int(value))):
            raise Unreadable(f"{int(value)} has digits that base {int(known)} lacks")
        return Node("based", (str(int(value)), int(known)))
