"""The program's own process, after the zygote has dropped its rights. A program may change any code in here.

Roles: `script` (run as __main__ with a standard input), `calls` (define, then answer calls with values), `solution` and
`tests` (the program and the task's own test code, in two jails: answering.py and asserts.py).
"""

import _sitebuiltins
import atexit
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
import statistics
import string
import sys
import traceback
import types
import typing

import answering  # this folder's
import asserts
import nodes
from codec import decode, encode

builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D"), _sitebuiltins.Quitter("quit", "Ctrl-D")
OUT_OF_MEMORY = 97
PRELOADED = (
    bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, heapq, io, itertools, math, operator,
    random, re, statistics, string, types, typing,
)  # fmt: skip


def run(request_fd, result_fd, peer_fd):
    """Never returns."""
    code = 0
    try:
        sys.argv = ["solution.py"]
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
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
        sys.__stdout__.flush()  # where the program put another in its place
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


def new_module(name):
    """The names of an empty module that `sys.modules` knows (dataclasses and pickling look there)."""
    made = types.ModuleType(name)
    made.__dict__["__builtins__"] = builtins
    sys.modules[name] = made
    return made.__dict__


def module(name, code, filename):
    """Execute code as a module; its names."""
    names = new_module(name)
    exec(compile(code, filename, "exec"), names)
    return names


def script(request, result_fd, _peer):
    os.close(result_fd)
    try:
        module("__main__", request["code"], "<solution>")
    finally:  # as Python ends: threads are waited for, then what was registered is called
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()


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
                function = target(names, entry)
                types_of = getattr(function, "__annotations__", {})
                given, named = decode(args), decode(kwargs)
                if types_of:  # linked lists and trees are written as lists
                    wanted = [t for name, t in types_of.items() if name not in ("return", *named)]
                    given = [nodes.built(v, t, names) for v, t in zip(given, wanted)] + given[len(wanted) :]
                    named = {k: nodes.built(v, types_of.get(k), names) for k, v in named.items()}
                value = function(*given, **named)
                answer = ["ok", encode(nodes.written(value, types_of.get("return", "")))]
            except Exception as error:
                answer = ["exception", type(error).__name__]
            out.write(json.dumps([number, answer]) + "\n")
            out.flush()


def solution(request, _result, peer_fd):
    answering.solution(module("solution", request["code"], "<solution>"), peer_fd)


def tests(request, result_fd, peer_fd):
    asserts.tests(request, result_fd, peer_fd, new_module("__main__"), say)


ROLES = {"script": script, "calls": calls, "solution": solution, "tests": tests}
