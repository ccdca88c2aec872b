"""The tool `python`: sessions in the jail."""

from __future__ import annotations

import shutil

import pytest

from sppo.environments.base import Broken, Call
from sppo.environments.toolbox import Toolbox
from sppo.sandbox import Result
from sppo.tools.python import build

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)


@pytest.fixture
def session():
    return build(wall=4.0, memory_mb=256)


def test_what_is_defined_stays_and_is_shown_once(session):
    assert session.python("x = 3\nprint('defined')") == "defined\n"
    assert session.python("x += 1; x * 2") == "8\n"
    assert session.python("print(x)\nx") == "4\n4\n"
    assert session.python("def f(n):\n    return n and f(n - 1) + 1\nf(100)") == "100\n"
    assert session.python("open('a', 'w').write('b' * x)") == "4\n"
    assert session.python("open('a').read()") == "'bbbb'\n"
    assert session.python("None") == ""


def test_an_error_is_read_and_what_came_before_it_stays(session):
    said = session.python("y = 5\nprint('so far')\n1 / 0\ny = 6")
    assert said.startswith("so far\n")
    assert said.endswith("ZeroDivisionError: division by zero\n")
    assert "line 3" in said
    assert "_session" not in said
    assert session.python("y") == "5\n"
    assert "SyntaxError" in session.python("y = = 3")
    assert session.python("y") == "5\n"
    assert session.python("raise SystemExit").endswith("SystemExit\n")


def test_sessions_know_nothing_of_each_other(session):
    session.python("z = 1")
    assert "NameError" in build(wall=4.0, memory_mb=256).python("z")


def test_limits_are_said_and_the_call_is_undone(session):
    session.python("z = 1")
    assert session.python("z = 2\nwhile True: pass").endswith(
        "[the session took longer than 4 s in all; this call is undone]"
    )
    assert session.python("z") == "1\n"
    assert "MB" in session.python("w = [0] * 10 ** 9") or "MemoryError" in session.python("w = [0] * 10 ** 9")
    assert "too much" in session.python("while True: print('x' * 10_000)")[-80:]


def test_it_is_in_the_jail(session):
    said = session.python(
        "import os, socket\nprint(os.path.exists('/etc/passwd'))\ntry:\n    socket.create_connection(('127.0.0.1', 80), 1)\n"
        "except OSError as e:\n    print('no network')"
    )
    assert said in ("False\nno network\n",)


def test_a_sandbox_that_fails_is_no_fault_of_the_call(session, monkeypatch):
    monkeypatch.setattr(
        type(session._runs), "run", lambda self, jobs: [Result("infra_error", detail="gone") for _ in jobs]
    )
    with pytest.raises(Broken, match="gone"):
        Toolbox([session]).call(Call("python", {"code": "1"}))


def test_a_model_calls_it(session):
    box = Toolbox([session])
    assert box.schemas[0]["function"]["name"] == "python"
    assert box.call(Call("python", {"code": "sum(range(10))"})) == ("45\n", True)
