"""The program's side of `asserts`: answers what the tests' jail asks of a name, or of an object that stayed here.

With a call comes what the test prepared for it: files, a seed, patched functions. With the answer goes what the program
printed and wrote.
"""

import builtins
import contextlib
import functools
import importlib
import io
import itertools
import json
import operator
import random
import socket
import sys
import types

from codec import ITEMS, LINE, builtin_base, decode, encode, failure
from nodes import KINDS, decode_graph, encode_graph, is_node
from workfolder import Folder

LARGEST_TEXT = 1 << 20


def solution(names, peer_fd):
    """Serve the program's `names` until the tests' jail is gone."""
    with socket.socket(fileno=peer_fd).makefile("rwb") as link:
        Program(names, link).serve()


class Program:
    """The program's names, and the objects that have no plain form, by number."""

    def __init__(self, names, link):
        self.names, self.link = names, link
        self.kept, self.numbers = [], {}
        self.asked = {}  # the request that is being answered

    def serve(self):
        builtins.input = functools.partial(self.back, "builtins", "input")
        lines = Asking(functools.partial(self.back, "sys", "stdin"))
        sys.stdin = io.TextIOWrapper(io.BufferedReader(lines), "utf-8", "replace")
        folder = Folder()
        for line in self.link:
            try:
                self.asked.update(json.loads(line))
                reply = self.reply(folder)
            except Exception as error:
                reply = {"said": failure(error)}
            self.asked.clear()
            self.send(reply)

    def send(self, message):
        self.link.write(json.dumps(message).encode() + b"\n")
        self.link.flush()

    def back(self, module, name, *args, **kwargs):
        """Call a function of the tests' world during their call: `input`, a line of stdin, what they patched."""
        if not self.asked:
            raise EOFError("there is no standard input")
        self.send({"back": [module, name], "args": encode(list(args)), "kwargs": encode(kwargs)})
        said = json.loads(self.link.readline(LINE))
        if said[0] == "exception":
            raise getattr(builtins, said[3])(said[2])
        return decode(said[1])

    def reply(self, folder):
        """The answer, in the world that the test prepared, with what the program printed and which files it changed."""
        asked = self.asked
        if "random" in asked:
            random.setstate(decode(asked["random"]))
        folder.apply(asked.get("files", ()))
        with contextlib.ExitStack() as stack:
            for module, name, value in asked["patched"]:
                stack.enter_context(patched(module, name, value, self.back))
            printed = stack.enter_context(capture()) if asked["out"] else None
            try:
                said = self.answer()
            except Exception as error:
                said = failure(error)
        reply = {"said": said}
        if printed is not None:
            reply["out"] = printed[0][:LARGEST_TEXT]
        if "files" in asked:
            reply["files"] = folder.changes()
        return reply

    def answer(self):
        asked = self.asked
        root = self.kept[asked["on"]] if "on" in asked else self.names[asked["of"]]
        wanted, args, kwargs = asked["do"], self.received(asked["args"]), self.received(asked["kwargs"])
        target = getattr(root, asked["name"]) if asked["name"] else root
        if wanted == "kind" and isinstance(target, type) and issubclass(target, BaseException):
            return ["error", builtin_base(target)]
        if wanted in ("kind", "get"):
            return ["callable"] if callable(target) else ["ok", self.plain(target), []]
        if wanted == "call":
            value = target(*args, **kwargs)
            if isinstance(value, types.CoroutineType):
                return ["coroutine", self.keep(value)[1]]
        elif wanted == "isinstance":
            value = isinstance(args[0], root)
        else:
            value = ASKED[wanted](root, *args)
        return ["ok", self.plain(value), [self.plain(a) for a in (*args, *kwargs.values())]]

    def plain(self, value):
        return encode(value, keep=self.keep)

    def keep(self, value):
        """The form of a value that has no plain one: linked nodes, or a number."""
        if is_node(value) and type(value).__name__ in self.asked["nodes"]:
            return encode_graph(value, self.plain)
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return ["h", self.numbers[id(value)]]

    def received(self, tree):
        return decode(tree, handle=self.kept.__getitem__, graph=self.graph)

    def graph(self, tree, part):
        """The tests hand over two things without a plain form: linked nodes, and names of the standard library."""
        if tree[:1] == ["library"]:
            return getattr(importlib.import_module(tree[1]), tree[2])
        return decode_graph(tree, classes(self.names), part)


ASKED = {
    "len": len, "bool": bool, "truth": lambda root: truth(root), "str": str, "repr": repr, "item": operator.getitem,
    "set": operator.setitem, "setattr": setattr,
    "list": lambda root: list(itertools.islice(root, ITEMS)), "enter": lambda root: root.__enter__(),
    "exit": lambda root: bool(root.__exit__(None, None, None)), "next": next, "await": lambda root: importlib.import_module("asyncio").run(root),
}  # fmt: skip


def truth(root):
    """Whether a value of the library's is true, such as a match.

    An object of the program's own is not asked to be a verdict.
    """
    if type(root).__module__ == "solution":
        raise TypeError("the truth of an object of the program's own class is not asked")
    return bool(root)


def classes(names):
    """The node classes of a world: its own, else plain ones."""
    return {kind: names.get(kind, type(kind, (), {})) for kind in KINDS}


class Asking(io.RawIOBase):
    """Standard input that is in the tests' jail, a line at a time."""

    def __init__(self, ask):
        self.ask, self.rest = ask, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.rest:
            with contextlib.suppress(EOFError):
                self.rest = self.ask().encode("utf-8", "replace")
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


@contextlib.contextmanager
def capture():
    """What a call prints, in a list of one text once it is over; it also goes where it went before."""
    real, printed = sys.stdout, []
    sys.stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    try:
        yield printed
    finally:
        text = sys.stdout.buffer.getvalue().decode("utf-8", "replace")
        sys.stdout = real
        printed.append(text)
        real.write(text)


@contextlib.contextmanager
def patched(module, name, value, back):
    """For one call: a name of a module's as the tests patched it, a value or a function of theirs."""
    where = importlib.import_module(module)
    missing = object()
    real = getattr(where, name, missing)
    setattr(where, name, functools.partial(back, module, name) if value == ["call"] else decode(value))
    try:
        yield
    finally:
        if real is missing:
            delattr(where, name)
        else:
            setattr(where, name, real)
