"""A position among the tokens of an answer, with a limit on how deeply rules may nest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from .syntax import Node
from .tokens import Token, Unreadable

DEEPEST, MOST_ITEMS, HIGHEST = 40, 100, 100
"""Limits on an answer: nested rules of the grammar, members of a list, levels of its tree."""


class Cursor:
    """The position in the tokens."""

    def __init__(self, found: Sequence[Token]) -> None:
        self.tokens, self.at, self.depth = list(found), 0, 0
        self.in_bars = False
        """Whether the next `|` closes an absolute value."""
        self.builder = False
        """Whether `:` and `|` mean "such that" here."""

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

    def _again(self, rule: Callable[[], Node]) -> Node:
        self._deeper()
        node = rule()
        self.depth -= 1
        return node

    @contextlib.contextmanager
    def _inside(self, in_bars: bool = False, builder: bool = False) -> Iterator[None]:
        """Within brackets, where `|` and `:` have their own meaning."""
        self._deeper()
        before = self.in_bars, self.builder
        self.in_bars, self.builder = in_bars, builder
        yield
        self.in_bars, self.builder = before
        self.depth -= 1

    def _split(self, at: int, *parts: Token) -> None:
        """Replace one token by several."""
        self.tokens[at : at + 1] = parts
