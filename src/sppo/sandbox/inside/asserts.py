"""`asserts`: the program in one jail, the task's own test code in another, which calls it through stand-ins.

A test sees values. What has no plain form (an object of the program's own class, a function, a match) stays in its jail
and answers there; it never judges: `==`, `in` and `<` are not asked of it. What a test prepares for a call goes along
with it: files, a seed, standard input, patched functions; what the program printed or wrote to a file comes back, as
text and bytes.

A failed `assert` is noted and the test continues, so that a program cannot tell from the number of its calls which answer
was right.
"""

import ast
import functools
import importlib
import json
import sys

from standins import Link

NOTE = "__sppo_note__"


def tests(request, result_fd, peer_fd, world, say):
    """Run each test in `world` against stand-ins for the program's names, and say which held.

    The channel is this jail's alone.
    """
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
    """`assert a and b, message` becomes: note it if not a; note it if not b; continue."""

    def visit_Assert(self, node):
        parts = (
            node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else [node.test]
        )
        message = [] if node.msg is None else [node.msg]
        return [
            ast.copy_location(
                ast.If(ast.UnaryOp(ast.Not(), part), [ast.Expr(ast.Call(ast.Name(NOTE, ast.Load()), message, []))], []),
                node,
            )
            for part in parts
        ]


def watch_unittest(failed, goes_on):
    """Note every failure that unittest finds, whoever reads its result, and continue after a failed assertion where that
    is meant."""
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
