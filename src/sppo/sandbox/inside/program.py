"""What a program's own process does, after the zygote has taken everything from it. The code in here is the attacker's to change.

Roles: `script` (run as __main__ with a standard input), `calls` (define, then answer calls with values), `solution` (define, then
answer another jail's calls), `tests` (the task's own test code, whose calls go to the solution in the other jail).
"""

import _sitebuiltins
import bisect
import builtins
import collections
import copy
import dataclasses
import datetime
import decimal
import fractions
import functools
import heapq
import io
import itertools
import json
import math
import operator
import os
import random
import re
import socket
import statistics
import string
import sys
import traceback
import types
import typing

from codec import ITEMS, Handle, Opaque, decode, encode

builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D"), _sitebuiltins.Quitter("quit", "Ctrl-D")
OUT_OF_MEMORY, LINE = 97, 1 << 24
PRELOADED = (
    bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, heapq, io, itertools, math, operator,
    random, re, statistics, string, types, typing,
)  # fmt: skip


def run(request_fd, result_fd, peer_fd):
    """Never returns."""
    code = 0
    try:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        with open(request_fd, "rb") as file:
            request = json.loads(file.read())
        ROLES[request["role"]](request, result_fd, peer_fd)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:
        code = 1
        say(error)
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    os._exit(code & 0xFF)


def say(error):
    """The error on standard error, with the lines of the program and the tests that led to it: nothing of this file's."""
    try:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<")]
        sys.stderr.write("".join("%s, line %s, in %s\n" % (f.filename, f.lineno, f.name) for f in frames[-8:]))
        sys.stderr.write("".join(traceback.format_exception_only(type(error), error)))
    except BaseException:
        pass


def module(name, code, filename):
    """Execute code as a module that `sys.modules` knows (dataclasses and pickling look there)."""
    made = types.ModuleType(name)
    made.__dict__["__builtins__"] = builtins
    sys.modules[name] = made
    exec(compile(code, filename, "exec"), made.__dict__)
    return made.__dict__


def script(request, result_fd, _peer):
    os.close(result_fd)
    module("__main__", request["code"], "<solution>")


def target(names, entry):
    """`f`, or `Solution.f` for a method of a fresh object."""
    head, _, method = entry.partition(".")
    found = names[head]
    return getattr(found(), method) if method else found


def calls(request, result_fd, _peer):
    names = module("solution", request["code"], "<solution>")
    with open(result_fd, "w", encoding="ascii") as out:
        for number, (entry, args, kwargs) in enumerate(request["calls"]):
            try:
                value = target(names, entry)(*decode(args), **decode(kwargs))
                answer = ["ok", encode(value)]
            except Exception as error:
                answer = ["exception", type(error).__name__]
            out.write(json.dumps([number, answer]) + "\n")
            out.flush()


def solution(request, _result, peer_fd):
    """Define, then answer what the tests' jail asks of a name (`of`) or of an object that stayed here (`on`)."""
    names = module("solution", request["code"], "<solution>")
    kept = []

    def plain(value):
        """A plain value, or a handle on an object of the solution's own class."""
        if type(value).__module__ == "solution" and not isinstance(value, PLAIN):
            kept.append(value)
            return ["h", len(kept) - 1]
        return encode(value)

    def mine(number):
        return kept[number]

    def answer(ask):
        root = kept[ask["on"]] if "on" in ask else names[ask["of"]]
        wanted, args, kwargs = ask["do"], decode(ask["args"], handle=mine), decode(ask["kwargs"], handle=mine)
        target = getattr(root, ask["name"]) if ask["name"] else root
        if wanted == "kind" and isinstance(target, type) and issubclass(target, BaseException):
            return ["error", builtin_base(target)]
        if wanted in ("kind", "get"):
            return ["callable"] if callable(target) else ["ok", plain(target), []]
        if wanted == "call":
            value = target(*args, **kwargs)
        elif wanted == "isinstance":
            value = isinstance(args[0], root)
        else:
            value = ASKED[wanted](root, *args)
        return ["ok", plain(value), [plain(a) for a in (*args, *kwargs.values())]]

    with socket.socket(fileno=peer_fd).makefile("rwb") as link:
        for line in link:
            try:
                said = answer(json.loads(line))
            except Exception as error:
                said = ["exception", type(error).__name__, str(error)[:200], builtin_base(type(error))]
            link.write(json.dumps(said).encode() + b"\n")
            link.flush()


def builtin_base(kind):
    """The name of the builtin exception that a class is, or comes from."""
    return next(k.__name__ for k in kind.__mro__ if k.__module__ == "builtins")


def tests(request, result_fd, peer_fd):
    """Run each test against stand-ins for the solution's names, and say which held. The channel is this jail's alone."""
    link = socket.socket(fileno=peer_fd).makefile("rwb")
    errors = {}  # exception classes of the solution's that the tests name
    cannot = []

    def ask(do, where, name="", args=(), kwargs=None):
        kwargs = kwargs or {}
        sent = [outward(a) for a in args], {k: outward(v) for k, v in kwargs.items()}
        link.write(
            json.dumps(dict(where, do=do, name=name, args=encode(sent[0]), kwargs=encode(sent[1]))).encode() + b"\n"
        )
        link.flush()
        line = link.readline(LINE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the solution's process is gone")
        said = json.loads(line)
        if said[0] == "exception":
            error = the_error(*map(str, said[1:4]))
            error.from_the_solution = True
            raise error
        if said[0] == "ok":
            for before, after in zip((*args, *kwargs.values()), said[2]):  # what the call did to its arguments
                if type(before) in (list, dict, set):
                    try:
                        update(before, decode(after, handle=kept_there))
                    except Opaque:
                        pass
        return said

    def value_of(said):
        return decode(said[1], handle=kept_there)

    def the_error(name, text, base):
        kind = errors.get(name) or getattr(builtins, base, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = Exception
        if issubclass(kind, ENDS_AN_ITERATION):
            kind = RuntimeError  # it would end a loop of the test before its assertions
        try:
            return kind(text)
        except Exception:
            return Exception(text)

    def update(before, after):
        if type(before) is type(after) is list:
            before[:] = after
        elif type(before) is type(after) and type(before) in (dict, set):
            before.clear()
            before.update(after)

    def outward(value):
        """What is handed over: an object that lives there goes as its number; a function of the tests' own cannot go."""
        if type(value) is StandIn:
            where = object.__getattribute__(value, "_sppo_where")
            return Handle(where["on"]) if "on" in where and not value._sppo_name else value
        if isinstance(value, FUNCTIONS):
            cannot.append("a function is handed to the program, which does not travel between the jails")
        return value

    def kept_there(number):
        return StandIn({"on": number})

    class StandIn:
        """A name or an object of the solution's, which stays in its jail. It says what it holds; it never judges: no `==`, no `in`."""

        def __init__(self, where, name=""):
            self._sppo_where, self._sppo_name = where, name

        def __getattr__(self, name):
            if name.startswith("__") or self._sppo_name:
                raise AttributeError(name)
            said = ask("get", self._sppo_where, name)
            return StandIn(self._sppo_where, name) if said[0] == "callable" else value_of(said)

        def __call__(self, *args, **kwargs):
            return value_of(ask("call", self._sppo_where, self._sppo_name, args, kwargs))

        def __len__(self):
            return value_of(ask("len", self._sppo_where))

        def __bool__(self):
            return "of" in self._sppo_where or bool(value_of(ask("bool", self._sppo_where)))

        def __iter__(self):
            return iter(value_of(ask("list", self._sppo_where)))

        def __getitem__(self, key):
            return value_of(ask("item", self._sppo_where, args=(key,)))

        def __setitem__(self, key, value):
            ask("set", self._sppo_where, args=(key, value))

        def __str__(self):
            return str(value_of(ask("str", self._sppo_where)))

        def __repr__(self):
            return str(value_of(ask("repr", self._sppo_where)))

        def __instancecheck__(self, other):
            return type(other) is StandIn and value_of(ask("isinstance", self._sppo_where, args=(other,))) is True

    def taken(name):
        """What stands in the tests' world for a name of the solution's: a plain value, an exception class, or a stand-in."""
        try:
            said = ask("kind", {"of": name})
            if said[0] == "error":
                kind = getattr(builtins, str(said[1]), None)
                kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception
                errors[name] = type(name, (kind,), {})
                return errors[name]
            if said[0] == "ok":
                return value_of(said)
        except Exception:
            pass
        made = StandIn({"of": name})
        made.__name__ = name
        return made

    try:
        world = module("__main__", request["setup"], "<setup>")
    except BaseException as error:
        cannot.append("the setup code fails: %s: %s" % (type(error).__name__, str(error)[:200]))
        world = {}
    for name in request["names"]:
        if request["replace"] or name not in world:  # what the task's setup made is the task's, however it made it
            world[name] = taken(name)
    held = []
    for number, test in enumerate(request["tests"]):
        try:
            exec(compile(test, "<test %d>" % number, "exec"), world)
            held.append(True)
        except Exception as error:
            held.append(False)
            if type(error) is ModuleNotFoundError and not hasattr(error, "from_the_solution"):
                cannot.append("a test imports %s, which the jail's Python does not have" % error.name)
            if number == 0 or all(not h for h in held):
                say(error)
    with open(result_fd, "w", encoding="ascii") as out:
        json.dump({"held": held, "cannot": cannot[:1]}, out)


ASKED = {
    "len": len, "bool": bool, "str": str, "repr": repr, "item": operator.getitem, "set": operator.setitem,
    "list": lambda root: list(itertools.islice(root, ITEMS)),
}  # fmt: skip
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
PLAIN = (int, float, str, list, tuple, dict, set, frozenset, bytes, bytearray, complex)
ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)
ROLES = {"script": script, "calls": calls, "solution": solution, "tests": tests}
