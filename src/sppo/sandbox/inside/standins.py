"""The tests' side of `asserts`: stand-ins for the program's names and objects, and the link over which they ask the
other jail.

A stand-in returns what its object holds; it never judges: `==`, `in` and `<` are not asked of it.
"""

import builtins
import contextlib
import functools
import json
import random
import re
import socket
import sys
import types
from _thread import RLock  # `threading` would slow every fork down

from codec import LINE, PREDICATES, Handle, Opaque, decode, encode, failure
from nodes import KINDS, decode_graph, encode_graph, is_node
from workfolder import Folder

ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
FILES = ("open(", "tempfile", "pathlib", "Path(", "os.", "shutil")
LOADERS = {
    "pickle", "marshal", "shelve", "dill", "joblib", "allow_pickle", "torch", "yaml", "importlib", "runpy", "exec", "eval", "subprocess",
    "__import__", "discover",
}  # fmt: skip
CODE = (".py", ".pyc", ".so", ".pth", ".zip", ".egg")
"""What may run what a file holds: into such a test's jail no file of the program's is copied, and no such file into
any."""
LIBRARY = getattr(sys, "stdlib_module_names", sys.builtin_module_names)  # Python 3.9 knows the built-in ones only
STREAMS = (("sys", "stdin"), ("sys", "stdout"), ("sys", "stderr"))


class Link:
    """The tests' side: asks the program's jail, and hands over what the tests prepared for the call."""

    def __init__(self, peer_fd, text, world):
        self.file, self.lock, self.world = socket.socket(fileno=peer_fd).makefile("rwb"), RLock(), world
        self.errors = {}  # exception classes of the program's that the tests name
        self.cannot = []
        self.reads_stdout = "stdout" in text
        self.folder = Folder() if any(word in text for word in FILES) else None
        self.takes_files = not (LOADERS & set(re.findall(r"[A-Za-z_]+", text)) or "sys.path" in text)
        self.input = builtins.input
        self.patches = []  # (module, name), as unittest.mock made them
        self.seeded = False
        if "random" in text:
            random.seed = self.seed
        if "mock" in text:
            self.watch_patches()

    def seed(self, *args, **kwargs):
        random._inst.seed(*args, **kwargs)
        self.seeded = True

    def watch_patches(self):
        from unittest import mock

        enter, leave, patches = mock._patch.__enter__, mock._patch.__exit__, self.patches

        def entering(patch):
            value = enter(patch)
            if isinstance(patch.target, types.ModuleType):
                patches.append((patch.target.__name__, patch.attribute))
            return value

        def leaving(patch, *exc_info):
            if isinstance(patch.target, types.ModuleType):
                patches.remove((patch.target.__name__, patch.attribute))
            return leave(patch, *exc_info)

        mock._patch.__enter__, mock._patch.__exit__ = entering, leaving

    def patched(self):
        """The current patches, in the form sent to the program's jail."""
        out = []
        for module, name in self.patches:
            value = getattr(sys.modules[module], name)
            if callable(value):
                out.append([module, name, ["call"]])
            elif (module, name) not in STREAMS:
                out.append([module, name, encode(value)])
        return out

    def ask(self, do, where, name="", args=(), kwargs=None):
        kwargs = kwargs or {}
        message = {k: v for k, v in where.items() if k != "root"}
        message.update(
            do=do, name=name, args=self.outward(list(args)), kwargs=self.outward(kwargs), out=self.reads_stdout
        )
        message.update(nodes=[k for k in KINDS if isinstance(self.world.get(k), type)], patched=self.patched())
        if self.folder is not None:
            message["files"] = self.folder.changes()
        if self.seeded:
            message["random"], self.seeded = encode(random.getstate()), False
        with self.lock:
            self.send(message)
            while True:
                line = self.file.readline(LINE)
                if not line.endswith(b"\n"):
                    raise ConnectionError("the solution's process is gone")
                reply = json.loads(line)
                if "back" not in reply:
                    break
                self.send(self.called_back(reply))
        if self.reads_stdout and reply.get("out"):
            sys.stdout.write(str(reply["out"]))
        if self.folder is not None and self.takes_files:
            self.folder.apply([change for change in reply.get("files", ()) if not change[0].lower().endswith(CODE)])
        said = reply["said"]
        if said[0] == "exception":
            error = self.error(*map(str, said[1:4]))
            error.from_the_solution = True
            raise error
        if said[0] == "ok":
            for before, after in zip((*args, *kwargs.values()), said[2]):  # what the call did to its arguments
                with contextlib.suppress(Opaque):
                    if type(before) in (list, dict, set) or is_node(before):
                        update(before, self.inward(after, where["root"]))
        return said

    async def later(self, number, root):
        """What awaiting a coroutine of the program's gives."""
        return self.value(self.ask("await", {"on": number, "root": root}), root)

    def value(self, said, root):
        return self.inward(said[1], root)

    def inward(self, tree, root):
        def stand_in(number):
            return StandIn(self, {"on": number, "root": root})

        return decode(tree, handle=stand_in, graph=lambda tree, part: decode_graph(tree, self.world, part))

    def outward(self, value):
        """An object of the program's goes as its number, a node as its attributes; a function of the tests' own cannot
        go."""

        def keep(value):
            if type(value) is StandIn:
                where = object.__getattribute__(value, "_sppo_where")
                if "on" in where and not value._sppo_name:
                    return encode(Handle(where["on"]))
            if is_node(value):
                return encode_graph(value, lambda x: encode(x, keep=keep))
            if (name := library_name(value)) is not None:
                return ["N", ["library", *name]]
            if StandIn not in (value, type(value)):  # which a program could bring about
                what = "function" if isinstance(value, FUNCTIONS) else "value of type " + type(value).__name__
                self.cannot.append("a %s is handed to the program, which does not travel between the jails" % what)
            return encode(value)

        return encode(value, keep=keep)

    def called_back(self, reply):
        """The answer to a call in the other direction: of `input`, of a line of stdin, of what the tests patched;
        nothing else."""
        try:
            module, name = reply["back"]
            args, kwargs = decode(reply["args"]), decode(reply["kwargs"])
            if (module, name) == ("sys", "stdin"):
                return ["ok", encode(sys.stdin.readline())]
            if (module, name) != ("builtins", "input") and (module, name) not in self.patches:
                raise ValueError("it is not patched")
            value = getattr(sys.modules[module], name)(*args, **kwargs)
            return ["ok", encode(value, keep=lambda value: None)]  # the return value of a mocked `print` is not needed
        except Exception as error:
            return failure(error)

    def send(self, message):
        self.file.write(json.dumps(message).encode() + b"\n")
        self.file.flush()

    def error(self, name, text, base):
        kind = self.errors.get(name) or getattr(builtins, base, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = Exception
        if issubclass(kind, ENDS_AN_ITERATION):
            kind = RuntimeError  # it would end a loop of the test before its assertions
        try:
            return kind(text)
        except Exception:
            return Exception(text)

    def taken(self, name):
        """What stands in the tests' world for a name of the program's: a plain value, an exception class, or a
        stand-in."""
        where = {"of": name, "root": name}
        try:
            said = self.ask("kind", where)
            if said[0] == "error":
                kind = getattr(builtins, str(said[1]), None)
                kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception
                self.errors[name] = type(name, (kind,), {})
                return self.errors[name]
            if said[0] == "ok":
                return self.value(said, name)
        except Exception:
            pass
        made = StandIn(self, where)
        made.__name__ = name
        return made


def library_name(value):
    """(module, name) of a function or class of the standard library's, which both jails have."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(module, str) and isinstance(name, str) and module in LIBRARY and module in sys.modules:
        return (module, name) if getattr(sys.modules[module], name, None) is value else None
    return None


def update(before, after):
    if type(before) is type(after) is list:
        before[:] = after
    elif type(before) is type(after) and type(before) in (dict, set):
        before.clear()
        before.update(after)
    elif type(before) is type(after) and is_node(before):
        before.__dict__ = after.__dict__


class StandIn:
    """A name or an object of the program's, which stays in its jail.

    It returns what it holds and never judges: no `==`, no `in`.
    """

    def __init__(self, link, where, name=""):
        self._sppo_link, self._sppo_where, self._sppo_name = link, where, name

    def _sppo_ask(self, do, *args):
        return self._sppo_link.value(self._sppo_link.ask(do, self._sppo_where, args=args), self._sppo_where["root"])

    def __getattr__(self, name):
        where = self._sppo_where
        if (
            name.startswith("__")
            or self._sppo_name
            or (name in PREDICATES and where["root"][:1].islower() and "on" in where)
        ):
            raise AttributeError(name)
        said = self._sppo_link.ask("get", where, name)
        return (
            StandIn(self._sppo_link, where, name)
            if said[0] == "callable"
            else self._sppo_link.value(said, where["root"])
        )

    def __call__(self, *args, **kwargs):
        link, root = self._sppo_link, self._sppo_where["root"]
        said = link.ask("call", self._sppo_where, self._sppo_name, args, kwargs)
        return link.later(said[1], root) if said[0] == "coroutine" else link.value(said, root)

    def __setattr__(self, name, value):
        if name.startswith(("_sppo_", "__")):
            object.__setattr__(self, name, value)
        else:
            self._sppo_link.ask("setattr", self._sppo_where, args=(name, value))

    def __len__(self):
        return self._sppo_ask("len")

    def __bool__(self):
        is_class = not self._sppo_where["root"][:1].islower()
        return "of" in self._sppo_where or bool(self._sppo_ask("bool" if is_class else "truth"))

    def __iter__(self):
        return iter(self._sppo_ask("list"))

    def __next__(self):
        try:
            return self._sppo_ask("next")
        except RuntimeError as error:
            raise StopIteration if str(error) == "" else error from None

    def __getitem__(self, key):
        return self._sppo_ask("item", key)

    def __setitem__(self, key, value):
        self._sppo_link.ask("set", self._sppo_where, args=(key, value))

    def __enter__(self):
        return self._sppo_ask("enter")

    def __exit__(self, *exc_info):
        self._sppo_ask("exit")
        return False  # an assertion that failed is not the program's to excuse

    def __str__(self):
        return str(self._sppo_ask("str"))

    def __repr__(self):
        return str(self._sppo_ask("repr"))

    def __instancecheck__(self, other):
        return type(other) is StandIn and self._sppo_ask("isinstance", other) is True
