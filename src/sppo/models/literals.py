"""Calls written as Python writes them, `add(1, b="x")`, read without evaluating anything: names, and literals as arguments.

Linear in the length of the text, and nested at most `DEEPEST`.
"""

from __future__ import annotations

import math
from typing import Any

from ..environments.base import POSITIONAL, Call

DEEPEST = 32
LONGEST_NUMBER = 400
"""Characters."""
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "/": "/", "b": "\b", "f": "\f", "0": "\0"}
HEXADECIMAL = {"x": 2, "u": 4, "U": 8}
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Unreadable(ValueError):
    """A text is none of what is read here; its message says what was expected where."""


def python_calls(text: str) -> list[Call]:
    """The calls of a text: one, or a list of them in brackets. Raises Unreadable.

    >>> python_calls("[add(1, b='x'), stop()]")
    [Call(name='add', arguments={'*': [1], 'b': 'x'}, error=''), Call(name='stop', arguments={}, error='')]
    """
    reader = _Reader(text)
    calls = reader.calls()
    reader.space()
    if reader.at < len(text):
        raise reader.expected("the end")
    return calls


def gemma_calls(text: str) -> list[Call]:
    """A call as Gemma 4 writes it: `call:add{a:1,b:<|"|>x<|"|>}`, keys without quotes. Raises Unreadable.

    >>> gemma_calls('call:add{a:1,b:<|"|>x<|"|>}')
    [Call(name='add', arguments={'a': 1, 'b': 'x'}, error='')]
    """
    reader = _Gemma(text.strip())
    reader.needs("call:")
    name = reader.name("the name of a function")
    reader.needs("{")
    call = Call(name, reader.pairs(1))
    if reader.at < len(reader.text):
        raise reader.expected("the end")
    return [call]


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def expected(self, what: str) -> Unreadable:
        return Unreadable(f"the call cannot be read: {what} was expected at character {self.at + 1}")

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def sees(self, sign: str) -> bool:
        """Whether a sign comes next; it is passed."""
        self.space()
        if not self.text.startswith(sign, self.at):
            return False
        self.at += len(sign)
        return True

    def needs(self, sign: str) -> None:
        if not self.sees(sign):
            raise self.expected(repr(sign))

    def calls(self) -> list[Call]:
        if not self.sees("["):
            return [self.call()]
        found = [self.call()]
        while self.sees(","):
            if self.sees("]"):
                return found
            found.append(self.call())
        self.needs("]")
        return found

    def name(self, what: str) -> str:
        self.space()
        start = self.at
        while self.at < len(self.text) and (self.text[self.at].isalnum() or self.text[self.at] in "_.-"):
            self.at += 1
        if self.at == start or self.text[start].isdigit():
            self.at = start
            raise self.expected(what)
        return self.text[start : self.at]

    def call(self) -> Call:
        name, arguments, placed = self.name("the name of a function"), dict[str, Any](), list[Any]()
        self.needs("(")
        while not self.sees(")"):
            if arguments or placed:
                self.needs(",")
                if self.sees(")"):
                    break
            key = self.key()
            if key is not None:
                arguments[key] = self.value(1)
            elif arguments:
                raise self.expected("an argument's name")
            else:
                placed.append(self.value(1))
        return Call(name, ({POSITIONAL: placed} if placed else {}) | arguments)

    def key(self) -> str | None:
        """`name=`, or None where something else comes."""
        start = self.at
        try:
            name = self.name("")
        except Unreadable:
            return None
        if name.isidentifier() and self.sees("="):
            return name
        self.at = start
        return None

    def value(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise Unreadable("the call cannot be read: it is nested too deeply")
        self.space()
        first = self.text[self.at : self.at + 1]
        if first in ("'", '"') and first:
            return self.string(first)
        if self.sees("["):
            return self.several("]", depth)
        if self.sees("("):
            return self.several(")", depth)
        if self.sees("{"):
            return self.pairs(depth)
        if first and (first.isdigit() or first in "+-."):
            return self.number()
        start = self.at
        word = self.name("a value")
        if word not in WORDS:
            self.at = start
            raise self.expected("a value")
        return WORDS[word]

    def several(self, end: str, depth: int) -> list[Any]:
        found = list[Any]()
        while not self.sees(end):
            if found:
                self.needs(",")
                if self.sees(end):
                    break
            found.append(self.value(depth + 1))
        return found

    def pairs(self, depth: int) -> dict[str, Any]:
        found = dict[str, Any]()
        first = True
        while not self.sees("}"):
            if not first:
                self.needs(",")
                if self.sees("}"):
                    break
            first = False
            key = self.of_pair(depth)
            self.needs(":")
            found[key] = self.value(depth + 1)
        return found

    def of_pair(self, depth: int) -> str:
        key = self.value(depth + 1)
        if not isinstance(key, str):
            raise self.expected("a text as key")
        return key

    def number(self) -> int | float:
        start = self.at
        while self.at < len(self.text) and (self.text[self.at].isalnum() or self.text[self.at] in "+-._"):
            self.at += 1
        written = self.text[start : self.at]
        if len(written) <= LONGEST_NUMBER and written.isascii():
            for kind in (int, float):
                try:
                    found: int | float = kind(written)
                except ValueError:
                    continue
                if math.isfinite(found):
                    return found
        self.at = start
        raise self.expected("a number")

    def string(self, quote: str) -> str:
        end = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(end)
        parts = list[str]()
        while True:
            if self.at >= len(self.text):
                raise self.expected("the end of a text")
            if self.text.startswith(end, self.at):
                self.at += len(end)
                return "".join(parts)
            letter = self.text[self.at]
            self.at += 1
            parts.append(self.escaped() if letter == "\\" else letter)

    def escaped(self) -> str:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter not in HEXADECIMAL:
            return ESCAPES.get(letter, "\\" + letter)
        digits = self.text[self.at : self.at + HEXADECIMAL[letter]]
        self.at += HEXADECIMAL[letter]
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise self.expected("hexadecimal digits") from None


class _Gemma(_Reader):
    QUOTE = '<|"|>'

    def of_pair(self, depth: int) -> str:
        if self.sees(self.QUOTE):
            return self.quoted()
        return self.name("a key")

    def value(self, depth: int) -> Any:
        return self.quoted() if self.sees(self.QUOTE) else super().value(depth)

    def quoted(self) -> str:
        end = self.text.find(self.QUOTE, self.at)
        if end < 0:
            raise self.expected("the end of a text")
        found, self.at = self.text[self.at : end], end + len(self.QUOTE)
        return found
