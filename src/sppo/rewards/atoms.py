r"""The smallest parts of a mathematical answer: names, functions, commands with their arguments, brackets, matrices."""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction

from .cursor import MOST_ITEMS, Cursor
from .syntax import Node, integer, letter, number_node, repeating, times, written
from .tokens import Token, Unreadable, tidy, tokens
from .vocabulary import ACCENTS, CURRENCIES, DOTS, ENGLISH, FUNCTIONS, INVERSE, MATHEMATICAL, OPENING, SYMBOLS, lettered


class Atoms(Cursor):
    """Reads one such part.

    Brackets and arguments hold whole answers, so the rules of `latex.Reader` are declared here.
    """

    @abstractmethod
    def whole(self) -> Node:
        """All the tokens."""

    @abstractmethod
    def _items(self) -> tuple[list[Node], str]:
        """Members, and what joins them."""

    @abstractmethod
    def _list(self) -> Node:
        """One member, or several as a list."""

    @abstractmethod
    def _relation(self) -> Node:
        """One member."""

    @abstractmethod
    def _sum(self) -> Node: ...

    @abstractmethod
    def _product(self) -> Node: ...

    @abstractmethod
    def _factor(self) -> Node: ...

    @abstractmethod
    def _signed_factor(self) -> Node: ...

    @abstractmethod
    def _begins_a_factor(self) -> bool: ...

    @abstractmethod
    def _after(self, node: Node) -> Node:
        """The node with what stands behind it: powers, factorials, degrees."""

    def _primary(self) -> Node:
        token = self.tokens[self.at] if self.at < len(self.tokens) else self._next()
        if token.kind == "number":
            self.at += 1
            node = number_node(token.text)
            if self._is("ldots", "dots", "cdots") and node.args[1] is not None:
                self.at += 1  # 3.14159… is its written digits, 0.333… repeats for ever
                return number_node(repeating(token.text) or token.text)
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
            return type(self)(tokens(tidy(content))).whole()
        if not all(c.isalpha() or c in " '-.()" for c in content):
            raise Unreadable(f"it holds the text {content!r}")
        if content in FUNCTIONS:
            return self._function(content)
        letters = content.replace(",", " ").split()
        if len(letters) > 1 and lettered(letters):
            return type(self)(tokens(content)).whole()
        if content.lower() == "infinity":
            return Node("constant", ("oo",))
        return Node("symbol", (content,)) if len(content) == 1 else Node("words", (content.strip("().").casefold(),))

    def _marked(self, token: Token) -> Node:
        if token.text == "{":
            return self._group()
        if token.text in OPENING:
            return self._bracketed()
        if token.text == "|":
            self.at += 1
            with self._inside(in_bars=True):
                inner = self._list()
            self._expect("|", "vert", "rvert")
            return Node("call", ("abs", inner))
        if token.text in CURRENCIES:
            self.at += 1
            return Node("quantity", (self._factor(), CURRENCIES[token.text]))
        raise Unreadable(f"{token.text!r} has no place in it")

    def _word(self) -> Node:
        """A run of letters: a function, a constant, a name, or a product of letters."""
        token = self._next()
        text = token.text
        lower = text.lower()
        if text in FUNCTIONS:
            return self._function(text)
        if lower in ENGLISH:
            raise Unreadable(f"it has the word {text!r}")
        if lower in ("pi", "infinity", "infty", "inf", "oo"):
            return Node("constant", ("pi" if lower == "pi" else "oo",))
        if lower == "sqrt":
            return Node("power", (self._argument(), Node("quotient", (integer(1), integer(2)))))
        if text in SYMBOLS:
            return self._named(text)
        if self._names_something(self.at - 1):
            return self._named(text.casefold())
        for name in sorted(FUNCTIONS, key=len, reverse=True):  # xsin(x)
            if len(name) > 2 and text.endswith(name) and len(text) - len(name) <= 2:
                self.at -= 1
                self._split(self.at, Token("word", text[: -len(name)], token.spaced), Token("word", name))
                return self._word()
        return self._letters(text)

    def _letters(self, text: str) -> Node:
        """A product of letters. An index or a power after the last letter applies to that letter alone."""
        node: Node | None = None
        for i, name in enumerate(text):
            factor = letter(name)
            if i == len(text) - 1:
                if self._is("_"):
                    factor = self._named(name)
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

    def _names_something(self, at: int) -> bool:
        """Whether a token is a word, rather than a function or letters to be multiplied."""
        token = self.tokens[at]
        return (
            token.kind == "word"
            and len(token.text) > 3
            and token.text.lower() not in MATHEMATICAL
            and (at == 0 or token.spaced)
        )

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
        if name in DOTS:
            return Node("dots")
        if name in FUNCTIONS:
            return self._function(name)
        if name in SYMBOLS and name not in ("triangle", "square"):
            return self._named(name)
        if name in ("emptyset", "varnothing"):
            return Node("set")
        if name == "mathbb":
            of = self._argument()
            return Node("reals") if of == Node("symbol", ("R",)) else Node("symbol", (f"set {written(of)}",))
        if name in ("angle", "triangle", "measuredangle", "square", "odot", "sphericalangle"):
            named = self._next()
            if named.kind not in ("word", "text"):
                raise Unreadable(f"\\{name} names nothing")
            return Node("symbol", (f"{name} {named.text}",))
        if name == "underline":
            return self._argument()
        if name in ACCENTS:
            return Node("symbol", (f"{name} {written(self._argument())}",))
        if name in ("sum", "prod", "int", "iint", "oint", "lim", "limsup", "liminf", "inf", "sup"):
            return self._big(name)
        if name == "boxed":
            return self._argument()
        if name in OPENING:
            self.at -= 1
            return self._bracketed()
        if name in ("vert", "mid", "|"):
            self.at -= 1
            self._split(self.at, Token("mark", "|"))
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
            and name in INVERSE
            and power in (Node("negative", (integer(1),)), Node("number", (Fraction(-1), None)))
        ):
            name, power = INVERSE[name], None
        self._deeper()
        inner = self._group_items() if self._is(*OPENING, "{", "|") else [self._running()]
        self.depth -= 1
        if base is not None and name != "log":
            raise Unreadable(f"\\{name} has an index")
        node = Node("call", (name, *inner) if base is None else ("logbase", base, *inner))
        return node if power is None else Node("power", (node, power))

    def _group_items(self) -> list[Node]:
        node = self._primary()
        if node.op == "bracket" and node.args[:2] == ("(", ")"):
            return list(node.args[2])
        return list(node.args) if node.op == "set" else [node]

    def _running(self) -> Node:
        r"""The argument of a function without brackets: `\sin 2x`, up to a sign, a slash or another function."""
        node = self._signed_factor()
        while self._begins_a_factor() and not self._is(*OPENING) and not self._is("|"):
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
                below = self._argument(whole=True)
            elif self._is("^") and above is None:
                self.at += 1
                above = self._argument(whole=True)
        return Node("big", (name, below, above, self._again(self._product)))

    def _matrix(self, environment: str) -> Node:
        if environment not in ("matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(f"the environment {environment} is not known")
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        with self._inside():
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
        node = Node("matrix", tuple(rows))
        return Node("call", ("det", node)) if environment == "vmatrix" else node

    def _argument(self, whole: bool = False) -> Node:
        """What a command takes: a group in braces, or one digit, letter or command.

        `whole`: all the digits of a number.
        """
        if self._is("{"):
            return self._group()
        if self._kind("number"):
            text = self.tokens[self.at].text
            if whole or len(text) == 1:
                return number_node(self._next().text)
            if not text.isdigit():
                raise Unreadable("a command takes part of a number")
            self._split(self.at, Token("number", text[1:]))
            return integer(int(text[0]))
        if self._kind("word"):
            text = self.tokens[self.at].text
            if len(text) == 1 or (whole and text in FUNCTIONS):
                return self._primary()
            self._split(self.at, Token("word", text[1:]))
            return letter(text[0])
        return self._again(self._primary)

    def _exponent(self) -> Node:
        if self._is("-", "+"):
            sign = self._next().text
            inner = self._argument(whole=True)
            return inner if sign == "+" else Node("negative", (inner,))
        return self._argument(whole=True)

    def _group(self) -> Node:
        r"""`{…}`: a group; with commas, a set written without backslashes; `{a \over b}`."""
        with self._inside():
            self._expect("{")
            if self._take("}"):
                raise Unreadable("a group is empty")
            items, _ = self._items()
            if self._is("over", "choose"):
                over = self._next().text == "over"
                below = self._list()
                items = [Node("quotient", (items[0], below)) if over else Node("call", ("binom", items[0], below))]
            self._expect("}")
        return items[0] if len(items) == 1 else Node("set", tuple(items))

    def _bracketed(self) -> Node:
        opening = self._next().text
        builder = opening in ("\\{", "lbrace")
        closing = OPENING[opening]
        ends = (")", "]") if opening in ("(", "[") else (closing, "vert", "|") if opening == "lvert" else (closing,)
        with self._inside(builder=builder):
            if builder and self._take(*ends):
                return Node("set")
            items, _ = self._items()
            if builder and self._take(":", "|", "mid", "colon"):
                conditions, how = self._items()
                joint = Node("list", (how if how != "," else "and", tuple(conditions)))
                items = [Node("such", (items[0], conditions[0] if len(conditions) == 1 else joint))]
            return self._closed(opening, self._expect(*ends), items)

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
