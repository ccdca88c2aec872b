"""`asserts`: the program in one jail, the task's own test code in another, which calls it through stand-ins.

A test sees values. What has no plain form (an object of the program's own class, a function, a match) stays in its jail and answers
there; it never judges: `==`, `in` and `<` are not asked of it. What a test prepares for a call goes along with it: files, a seed,
standard input, patched functions; what the program printed or wrote to a file comes back, as text and bytes.

A failed `assert` is noted and the test goes on, so that a program cannot tell from the number of its calls which answer was right.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import io
import itertools
import json
import operator
import os
import random
import re
import socket
import stat
import sys
import types
from _thread import RLock  # `threading` would slow every fork down

from codec import ITEMS, PREDICATES, Handle, Opaque, decode, encode
from nodes import KINDS, decode_graph, encode_graph, is_node

LINE, LARGEST_FILES, LARGEST_TEXT = 1 << 24, 4 << 20, 1 << 20
ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
FILES = ("open(", "tempfile", "pathlib", "Path(", "os.", "shutil")
LOADERS = {
    "pickle", "marshal", "shelve", "dill", "joblib", "allow_pickle", "torch", "yaml", "importlib", "runpy", "exec", "eval", "subprocess",
    "__import__", "discover",
}  # fmt: skip
CODE = (".py", ".pyc", ".so", ".pth", ".zip", ".egg")
"""What may run what a file holds: into such a test's jail no file of the program's is copied, and no such file into any."""


# -- the program's jail ------------------------------------------------------------------------------------------------


def solution(names, peer_fd):
    """Answer what the tests' jail asks of a name (`of`) or of an object that stayed here (`on`)."""
    kept, numbers, asked = [], {}, {}
    with socket.socket(fileno=peer_fd).makefile("rwb") as link:

        def send(message):
            link.write(json.dumps(message).encode() + b"\n")
            link.flush()

        def back(module, name, *args, **kwargs):
            """Call a function of the tests' world in the middle of their call: `input`, a line of stdin, what they patched."""
            if not asked:
                raise EOFError("there is no standard input")
            send({"back": [module, name], "args": encode(list(args)), "kwargs": encode(kwargs)})
            said = json.loads(link.readline(LINE))
            if said[0] == "exception":
                raise getattr(builtins, said[3])(said[2])
            return decode(said[1])

        def keep(value):
            if is_node(value) and type(value).__name__ in asked["nodes"]:
                return encode_graph(value, plain)
            if id(value) not in numbers:
                numbers[id(value)] = len(kept)
                kept.append(value)
            return ["h", numbers[id(value)]]

        def plain(value):
            return encode(value, keep=keep)

        def theirs(tree, part):
            """Of what has no plain form the tests hand over linked nodes and what the standard library names."""
            if tree[:1] == ["library"]:
                return getattr(importlib.import_module(tree[1]), tree[2])
            return decode_graph(tree, classes(names), part)

        def mine(tree):
            return decode(tree, handle=kept.__getitem__, graph=theirs)

        def answer():
            root = kept[asked["on"]] if "on" in asked else names[asked["of"]]
            wanted, args, kwargs = asked["do"], mine(asked["args"]), mine(asked["kwargs"])
            target = getattr(root, asked["name"]) if asked["name"] else root
            if wanted == "kind" and isinstance(target, type) and issubclass(target, BaseException):
                return ["error", builtin_base(target)]
            if wanted in ("kind", "get"):
                return ["callable"] if callable(target) else ["ok", plain(target), []]
            if wanted == "call":
                value = target(*args, **kwargs)
                if isinstance(value, types.CoroutineType):
                    return ["coroutine", keep(value)[1]]
            elif wanted == "isinstance":
                value = isinstance(args[0], root)
            else:
                value = ASKED[wanted](root, *args)
            return ["ok", plain(value), [plain(a) for a in (*args, *kwargs.values())]]

        builtins.input = functools.partial(back, "builtins", "input")
        sys.stdin = io.TextIOWrapper(
            io.BufferedReader(Asking(functools.partial(back, "sys", "stdin"))), "utf-8", "replace"
        )
        folder = Folder()
        for line in link:
            try:
                asked.update(json.loads(line))
                if "random" in asked:
                    random.setstate(decode(asked["random"]))
                folder.apply(asked.get("files", ()))
                with contextlib.ExitStack() as stack:
                    for module, name, value in asked["patched"]:
                        stack.enter_context(patched(module, name, value, back))
                    printed = stack.enter_context(capture()) if asked["out"] else None
                    try:
                        said = answer()
                    except Exception as error:
                        said = failure(error)
                reply = {"said": said}
                if printed is not None:
                    reply["out"] = printed[0][:LARGEST_TEXT]
                if "files" in asked:
                    reply["files"] = folder.changes()
            except Exception as error:
                reply = {"said": failure(error)}
            asked.clear()
            send(reply)


ASKED = {
    "len": len, "bool": bool, "truth": lambda root: truth(root), "str": str, "repr": repr, "item": operator.getitem,
    "set": operator.setitem, "setattr": setattr,
    "list": lambda root: list(itertools.islice(root, ITEMS)), "enter": lambda root: root.__enter__(),
    "exit": lambda root: bool(root.__exit__(None, None, None)), "next": next, "await": lambda root: importlib.import_module("asyncio").run(root),
}  # fmt: skip


def truth(root):
    """Whether a value of the library's is true, such as a match. An object of the program's own is not asked to be a verdict."""
    if type(root).__module__ == "solution":
        raise TypeError("the truth of an object of the program's own class is not asked")
    return bool(root)


def classes(names):
    """The node classes of a world: its own, else plain ones."""
    return {kind: names.get(kind, type(kind, (), {})) for kind in KINDS}


def failure(error):
    return ["exception", type(error).__name__, str(error)[:200], builtin_base(type(error))]


def builtin_base(kind):
    """The name of the builtin exception that a class is, or comes from."""
    return next(k.__name__ for k in kind.__mro__ if k.__module__ == "builtins")


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


class Folder:
    """The regular files and folders below the working folder, and how they changed since they were last looked at."""

    def __init__(self):
        self.root = os.getcwd()
        self.seen = self.look()

    def look(self):
        found = {}
        for at, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = os.path.join(at, name)
                status = os.lstat(path)
                if stat.S_ISDIR(status.st_mode):
                    found[os.path.relpath(path, self.root)] = None
                elif stat.S_ISREG(status.st_mode):
                    found[os.path.relpath(path, self.root)] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def changes(self):
        """`[path, "file" | "folder" | "gone", bytes as hexadecimal]`, folders before what is in them."""
        now = self.look()
        changed = []
        room = LARGEST_FILES
        for path, status in sorted(now.items()):
            if path in self.seen and self.seen[path] == status:
                continue
            data = b""
            if status is not None:
                room -= status[1]
                if room < 0:
                    raise ValueError("the files hold more than %d bytes" % LARGEST_FILES)
                with open(os.path.join(self.root, path), "rb") as file:
                    data = file.read(LARGEST_FILES)
            changed.append([path, "folder" if status is None else "file", data.hex()])
        changed += [[path, "gone", ""] for path in sorted(self.seen, reverse=True) if path not in now]
        self.seen = now
        return changed

    def apply(self, changes):
        """Make the other side's changes here. Raises ValueError for a path that leads out of the folder."""
        for path, kind, data in changes:
            if os.path.isabs(path) or ".." in path.split("/"):
                raise ValueError("a path leads out of the folder")
            here = os.path.join(self.root, path)
            if kind == "folder":
                os.makedirs(here, exist_ok=True)
            elif kind == "gone":
                with contextlib.suppress(OSError):
                    (os.rmdir if os.path.isdir(here) else os.unlink)(here)
            else:
                with open(os.open(here, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as file:
                    file.write(bytes.fromhex(data))
        if changes:
            self.seen = self.look()


# -- the tests' jail ---------------------------------------------------------------------------------------------------


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
        """What is patched just now, as the program's jail is told."""
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
        """An object of the program's goes as its number, a node as its attributes; a function of the tests' own cannot go."""

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
        """The answer to a call in the other direction: of `input`, of a line of stdin, of what the tests patched; nothing else."""
        try:
            module, name = reply["back"]
            args, kwargs = decode(reply["args"]), decode(reply["kwargs"])
            if (module, name) == ("sys", "stdin"):
                return ["ok", encode(sys.stdin.readline())]
            if (module, name) != ("builtins", "input") and (module, name) not in self.patches:
                raise ValueError("it is not patched")
            value = getattr(sys.modules[module], name)(*args, **kwargs)
            return ["ok", encode(value, keep=lambda value: None)]  # what a mock of `print` returns is nobody's concern
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
        """What stands in the tests' world for a name of the program's: a plain value, an exception class, or a stand-in."""
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


LIBRARY = getattr(sys, "stdlib_module_names", sys.builtin_module_names)  # Python 3.9 knows the built-in ones only


def library_name(value):
    """(module, name) of a function or class of the standard library's, which both jails have."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if (
        isinstance(module, str)
        and isinstance(name, str)
        and module in sys.stdlib_module_names
        and module in sys.modules
    ):
        return (module, name) if getattr(sys.modules[module], name, None) is value else None
    return None


STREAMS = (("sys", "stdin"), ("sys", "stdout"), ("sys", "stderr"))


def update(before, after):
    if type(before) is type(after) is list:
        before[:] = after
    elif type(before) is type(after) and type(before) in (dict, set):
        before.clear()
        before.update(after)
    elif type(before) is type(after) and is_node(before):
        before.__dict__ = after.__dict__


class StandIn:
    """A name or an object of the program's, which stays in its jail. It says what it holds; it never judges: no `==`, no `in`."""

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


# -- running the tests -------------------------------------------------------------------------------------------------

NOTE = "__sppo_note__"


def tests(request, result_fd, peer_fd, world, say):
    """Run each test in `world` against stand-ins for the program's names, and say which held. The channel is this jail's alone."""
    text = "\n".join([request["setup"], *request["tests"]])
    failed = []  # what the running test found wrong, without ending for it
    world[NOTE], world["all"] = lambda *message: failed.append(AssertionError(*message)), every
    if "thread" in text.lower():
        importlib.import_module("threading").excepthook = lambda lost: failed.append(lost.exc_value)
    sys.argv = ["tests"]
    goes_on = not excuses(text)
    if "unittest" in text:
        watch_unittest(failed, goes_on)
    link = Link(peer_fd, text, world)

    def compiled(code, name):
        tree = ast.parse(code, name)
        return compile(ast.fix_missing_locations(Onward().visit(tree)) if goes_on else tree, name, "exec")

    try:
        exec(compiled(request["setup"], "<setup>"), world)
    except BaseException as error:
        link.cannot.append("the setup code fails: %s: %s" % (type(error).__name__, str(error)[:200]))
    for name in request["names"]:
        if request["replace"] or name not in world or world[name] is every:  # what the task's setup made is the task's
            world[name] = link.taken(name)
    held = []
    for number, test in enumerate(request["tests"]):
        failed.clear()
        try:
            exec(compiled(test, "<test %d>" % number), world)
        except SystemExit as error:  # unittest.main() ends with one
            if error.code not in (None, 0):
                failed.append(error)
        except Exception as error:
            failed.append(error)
            if type(error) is ModuleNotFoundError and not hasattr(error, "from_the_solution"):
                link.cannot.append("a test imports %s, which the jail's Python does not have" % error.name)
        held.append(not failed)
        if failed and held.count(False) == 1:
            say(failed[0])
    with open(result_fd, "w", encoding="ascii") as out:
        json.dump({"held": held, "cannot": link.cannot[:1]}, out)


def every(items):
    """`all` that looks at every item, also after a false one."""
    held = True
    try:
        for item in items:
            held = bool(item) and held
    except Exception:
        if held:
            raise
    return held


def excuses(text):
    """Whether test code may catch a failed assertion on purpose, so that each must be raised where it fails."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:  # one test alone may still be Python
        return True
    caught = {getattr(t, "id", getattr(t, "attr", "")) for n in nodes if isinstance(n, ast.ExceptHandler)
              for t in (n.type.elts if isinstance(n.type, ast.Tuple) else [n.type])}  # fmt: skip
    raised = {
        id(n) for r in nodes if isinstance(r, ast.Raise) for n in ast.walk(r)
    }  # `raise AssertionError` excuses nothing
    named = {
        getattr(n, "id", getattr(n, "attr", ""))
        for n in nodes
        if isinstance(n, (ast.Name, ast.Attribute)) and id(n) not in raised
    }
    return bool(
        caught & {"", "Exception", "BaseException"} or named & {"AssertionError", "suppress", "expectedFailure"}
    )


class Onward(ast.NodeTransformer):
    """`assert a and b, message` becomes: note it if not a; note it if not b; go on."""

    def visit_Assert(self, node):
        parts = (
            node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else [node.test]
        )
        message = [] if node.msg is None else [node.msg]
        return [
            ast.copy_location(
                ast.If(
                    ast.UnaryOp(ast.Not(), part),
                    [ast.Expr(ast.Call(ast.Name(NOTE, ast.Load()), message, []))],
                    [],
                ),
                node,
            )
            for part in parts
        ]


def watch_unittest(failed, goes_on):
    """Note every failure that unittest finds, whoever reads its result, and go on after a failed assertion where that is meant."""
    import unittest

    def noting(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except AssertionError as error:
                failed.append(error)

        return run

    for name in dir(unittest.TestCase):
        if goes_on and name.startswith("assert") and not any(word in name for word in ("Raises", "Warns", "Logs")):
            setattr(unittest.TestCase, name, noting(getattr(unittest.TestCase, name)))

    def added(method):
        @functools.wraps(method)
        def run(self, test, error=None, *rest):
            found = rest[0] if rest else error  # addSubTest(test, subtest, error) says None where it passed
            if found is not None or method.__name__ == "addUnexpectedSuccess":
                failed.append(found[1] if isinstance(found, tuple) else AssertionError(str(test)))
            return method(self, *((test,) if method.__name__ == "addUnexpectedSuccess" else (test, error, *rest)))

        return run

    for name in ("addFailure", "addError", "addSubTest", "addUnexpectedSuccess"):
        setattr(unittest.TestResult, name, added(getattr(unittest.TestResult, name)))
