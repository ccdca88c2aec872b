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

from codec import Handle, Opaque, decode, encode

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
    except BaseException:
        code = 1
        try:
            traceback.print_exc(limit=-8)
        except BaseException:
            pass
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    os._exit(code & 0xFF)


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

    with socket.socket(fileno=peer_fd).makefile("rwb") as link:
        for line in link:
            call = json.loads(line)
            try:
                if "get" in call:
                    value, args = getattr(kept[call["on"]], call["get"]), []
                else:
                    args = decode(call["args"], handle=mine)
                    found = getattr(kept[call["on"]], call["name"]) if "on" in call else names[call["name"]]
                    value = found(*args, **decode(call["kwargs"], handle=mine))
                if "get" in call and callable(value):
                    answer = ["method", None, []]
                else:
                    answer = ["ok", plain(value), [plain(a) for a in args]]
            except Exception as error:
                answer = ["exception", type(error).__name__, str(error)[:200]]
            link.write(json.dumps(answer).encode() + b"\n")
            link.flush()


def tests(request, result_fd, peer_fd):
    """Run each test against stand-ins for the solution's names, and say which held. The channel is this jail's alone."""
    link = socket.socket(fileno=peer_fd).makefile("rwb")

    def ask(call):
        link.write(json.dumps(call).encode() + b"\n")
        link.flush()
        line = link.readline(LINE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the solution's process is gone")
        answer = json.loads(line)
        if answer[0] == "exception":
            kind = getattr(builtins, str(answer[1]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = Exception
            if issubclass(kind, ENDS_AN_ITERATION):
                kind = RuntimeError  # it would end a loop of the test before its assertions
            try:
                error = kind(str(answer[2]))
            except Exception:
                error = Exception(str(answer[2]))
            raise error
        return answer

    def invoke(call, args, kwargs):
        answer = ask(
            dict(call, args=encode(list(map(outward, args))), kwargs=encode({k: outward(v) for k, v in kwargs.items()}))
        )
        for before, after in zip(args, answer[2]):  # what the call did to its arguments
            if type(before) in (list, dict, set):
                try:
                    update(before, decode(after, handle=StandIn))
                except Opaque:
                    pass
        return decode(answer[1], handle=StandIn)

    def update(before, after):
        if type(before) is type(after) is list:
            before[:] = after
        elif type(before) is type(after) and type(before) in (dict, set):
            before.clear()
            before.update(after)

    def outward(value):
        return Handle(object.__getattribute__(value, "_sppo_handle")) if type(value) is StandIn else value

    class StandIn:
        """An object that lives in the solution's jail."""

        def __init__(self, number):
            self._sppo_handle = number

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            answer = ask({"on": self._sppo_handle, "get": name})
            if answer[0] == "method":
                return lambda *args, **kwargs: invoke({"on": self._sppo_handle, "name": name}, args, kwargs)
            return decode(answer[1], handle=StandIn)

    def stand_in(name):
        def call(*args, **kwargs):
            return invoke({"name": name}, args, kwargs)

        call.__name__ = name
        return call

    world = module("__main__", request["setup"], "<setup>")
    for name in request["names"]:
        if request["replace"] or name not in world:  # what the task's setup made is the task's, however it made it
            world[name] = stand_in(name)
    held = []
    for number, test in enumerate(request["tests"]):
        try:
            exec(compile(test, "<test %d>" % number, "exec"), world)
            held.append(True)
        except Exception:
            held.append(False)
            if number == 0 or all(not h for h in held):
                traceback.print_exc(limit=-2)
    with open(result_fd, "w", encoding="ascii") as out:
        json.dump({"held": held}, out)


PLAIN = (int, float, str, list, tuple, dict, set, frozenset, bytes, bytearray, complex)
ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)
ROLES = {"script": script, "calls": calls, "solution": solution, "tests": tests}
