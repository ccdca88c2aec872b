"""Model-written programs against the sandbox: 0 false passes, 0 escapes, 0 survivors. The list is in attacks.py."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sppo.errors import RecipeError, SandboxUnavailable
from sppo.sandbox import Case, Job, Limits, Report, Result, Sandbox, TestCode, asserts, calls, stdio
from sppo.sandbox.inside import codec
from sppo.sandbox.jail import Jail
from sppo.sandbox.names import ambiguous
from sppo.sandbox.verdict import matches

from . import attacks

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)
LIMITS = Limits(cpu_seconds=1, wall_seconds=1.5)
SQUARE = "def f(x): return x * x"
MAIN = "\nif __name__ == '__main__':\n value = f(int(input()))\n print(value)\n"
MODES = ("stdio", "calls", "asserts")
SOURCE = str(Path(codec.__file__).parents[3])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(slots=1, limits=LIMITS) as made:
        yield made


def judged(sandbox: Sandbox, mode: str, program: str, expected: object = 49) -> Report:
    if mode == "stdio":
        return stdio(sandbox, [(program + MAIN, [Case(str(expected), stdin="7\n")])])[0]
    if mode == "calls":
        return calls(sandbox, [(program, [Case(expected, entry="f", args=[7])])])[0]
    return asserts(sandbox, [(program, TestCode([f"assert f(7) == {expected!r}"], names=["f"]))])[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_right_program_passes_and_a_wrong_one_does_not(sandbox: Sandbox, mode: str) -> None:
    assert judged(sandbox, mode, SQUARE).passed == (True,)
    assert judged(sandbox, mode, "def f(x): return x + x").passed == (False,)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attack", attacks.VERDICT)
def test_no_attack_is_paid(sandbox: Sandbox, mode: str, attack: str) -> None:
    report = judged(sandbox, mode, attacks.VERDICT[attack])
    assert report.passed == (False,), report
    assert report.status != "infra_error", report  # a program must not be able to leave the count either
    assert judged(sandbox, mode, SQUARE).passed == (True,)  # and leaves nothing behind


@pytest.mark.parametrize("mode", MODES)
def test_raising_is_not_the_same_as_nothing(sandbox: Sandbox, mode: str) -> None:
    program = "def f(x): raise ValueError"
    expected: object = "" if mode == "stdio" else None
    assert judged(sandbox, mode, program, expected).passed == (False,)
    assert judged(sandbox, "calls", program, "").passed == (False,)


def test_a_program_cannot_replace_the_tasks_own_helpers(sandbox: Sandbox) -> None:
    setup = "def close(a, b): return abs(a - b) < 1e-6"
    tests = TestCode(["assert close(f(7), 49)"], setup)
    cheat = "def close(a, b): return True\ndef f(x): return 0"
    assert asserts(sandbox, [(cheat, tests)])[0].passed == (False,)
    assert asserts(sandbox, [(SQUARE, tests)])[0].passed == (True,)
    fake = "class math:\n isclose = staticmethod(lambda a, b: True)\ndef f(x): return 0"
    assert asserts(sandbox, [(fake, TestCode(["assert math.isclose(f(7), 49)"], "import math"))])[0].passed == (False,)


def test_the_solutions_process_never_holds_the_tests(sandbox: Sandbox) -> None:
    """Everything that a program can reach in its own process, searched for the tests' text."""
    spy = (
        "def f(x):\n import gc\n mark = ''.join(reversed('REKRAM'))\n"
        " texts = (t for o in gc.get_objects() if type(o) in (list, tuple, dict) for t in (o.values() if type(o) is dict else o))\n"
        " return sum(1 for t in texts if type(t) is str and mark in t)"
    )
    known = f"KEPT = ['MARKER']\n{spy}"  # the spy works: it finds what is there
    tests = TestCode(["MARK = 'MARKER'; assert f(7) == 0"], names=["f"])
    assert asserts(sandbox, [(spy, tests), (known, tests)])[0].passed == (True,)
    assert asserts(sandbox, [(known, TestCode(["assert f(7) >= 1"], names=["f"]))])[0].passed == (True,)


def _landlocked() -> bool:
    try:
        with Sandbox("landlock", slots=1):
            return True
    except SandboxUnavailable:
        return False


BACKENDS = ["bwrap", pytest.param("landlock", marks=pytest.mark.skipif(not _landlocked(), reason="needs Linux 6.12"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attack", attacks.ISOLATION)
def test_no_attack_gets_out(backend: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_TEST_SECRET", "hush-1234")
    secret = tmp_path / "secret"
    secret.write_text("hush")
    os.chmod(tmp_path, 0o755)
    os.chmod(secret, 0o644)
    victim = subprocess.Popen(["sleep", "60"])
    abstract = f"sppo-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + abstract)
        unix.listen()
        code = attacks.ISOLATION[attack]
        values = {
            "secret_file": secret, "secret": "hush-1234", "port": tcp.getsockname()[1], "abstract": abstract, "pid": victim.pid
        }  # fmt: skip
        for name, value in values.items():
            code = code.replace("{" + name + "}", str(value))
        try:
            with Sandbox(backend, slots=1, limits=LIMITS) as sandbox:
                result = sandbox.run([Job("script", code)])[0]
                if attack == "kill 1 and -1":
                    assert result.status in ("ok", "killed", "exception"), result
                elif (backend, attack) == ("landlock", "the host's processes"):
                    assert b"PermissionError" in result.stderr, result  # /proc is there, but closed
                else:
                    assert result.stdout.strip() == b"SAFE", result
                assert sandbox.run([Job("script", "print(1)")])[0].stdout == b"1\n"
            assert victim.poll() is None
        finally:
            victim.kill()
            victim.wait()


def test_nothing_is_left_for_the_next_program(sandbox: Sandbox) -> None:
    first, second = (sandbox.run([Job("script", code)])[0] for code in (attacks.LEAVES, attacks.FINDS))
    assert (first.stdout, second.stdout) == (b"SAFE\n", b"SAFE\n"), (first, second)


READABLE = os.path.realpath("/usr/bin/python3")  # a file that every program may read


REMEMBERS = [(backend, attack) for backend in ("bwrap", "landlock") for attack in attacks.REMEMBERS]
REMEMBERS.remove(("landlock", "times of files"))  # there they are the machine's


@pytest.mark.parametrize(("backend", "attack"), REMEMBERS)
def test_nothing_is_remembered_from_run_to_run(backend: str, attack: str) -> None:
    if backend == "landlock" and not _landlocked():
        pytest.skip("needs Linux 6.12")
    program = attacks.REMEMBERS[attack].replace("{FILE}", READABLE)
    jobs = [Job("script", program.replace("{RUN}", str(run))) for run in (2, 1, 2, 1, 2)]
    with Sandbox(backend, slots=1, limits=LIMITS) as sandbox:
        results = sandbox.run_groups([jobs])[0]
    assert {r.status for r in results} == {"ok"}, results
    assert len({r.stdout for r in results}) == 1, [r.stdout for r in results]
    assert b"DONE" not in results[0].stdout


def test_no_name_is_looked_up_faster_for_having_been_looked_up_before(sandbox: Sandbox) -> None:
    """Whatever a program can look up in: a file system that others see too remembers names that are not there."""
    folders = (
        "/",
        "/usr",
        os.path.dirname(os.__file__.replace(sys.base_prefix, "/usr")),
        "/usr/lib",
        "/usr/share",
        "/opt/sppo",
        "/dev",
    )
    for folder in folders:
        before = Job("script", attacks.LOOKS_UP.replace("{FOLDER}", folder))
        after = Job("script", attacks.TIMES_LOOKUPS.replace("{FOLDER}", folder))
        ratios = [float(r.stdout) for r in sandbox.run_groups([[before, after] * 3])[0][1::2]]
        assert sorted(ratios)[1] < 1.8, (folder, ratios)  # about 4 where it is remembered


@pytest.mark.parametrize("attack", attacks.SIGNALS_TO_ANOTHER)
def test_two_programs_that_run_at_a_time_do_not_see_each_other(attack: str) -> None:
    first, second = (Job("script", code.replace("{FILE}", READABLE)) for code in attacks.SIGNALS_TO_ANOTHER[attack])
    with Sandbox(slots=2, limits=LIMITS) as sandbox:
        alone = sandbox.run([second])[0]
        seen = []
        for _ in range(3):
            beside = threading.Thread(target=sandbox.run, args=([first],))
            beside.start()
            time.sleep(0.1)
            seen.append(sandbox.run([second])[0])
            beside.join()
    assert alone.status == "ok", alone
    assert {r.stdout for r in seen} == {alone.stdout}


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_see_the_interpreter_and_its_library_and_nothing_else(backend: str) -> None:
    reads = (
        "import os\ndef opens(path):\n try: open(path, 'rb').close()\n except OSError: return False\n return True\n"
        "print([opens(p) for p in ('/usr/bin/python3', os.__file__, '/usr/bin/env', '/usr/share/doc', '/usr/include', '/etc/hostname')])\n"
        "import ssl, sqlite3, lzma, bz2, ctypes, decimal, unittest.mock, asyncio, xml.etree.ElementTree, curses, concurrent.futures\n"
        "import hashlib, inspect, statistics, zoneinfo\n"
        "print(inspect.getsource(statistics.mean)[:8], hashlib.sha3_256(b'').hexdigest()[:4], open('/dev/null', 'w').write('x'))\n"
    )
    with Sandbox(backend, slots=1, limits=LIMITS) as sandbox:
        result = sandbox.run([Job("script", reads)])[0]
    assert result.stdout == b"[True, True, False, False, False, False]\ndef mean a7ff 1\n", result


def test_an_interpreter_in_a_home_does_not_show_the_home() -> None:
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        os.chmod(home, 0o755)
        (home / "bin").mkdir()
        shutil.copy(READABLE, home / "bin" / "python3")
        (home / "key").write_text("PRIVATE")
        look = (
            f"import os, sys\nfound = [n for d, _, names in os.walk('{home}') for n in names]\nprint(found)\n"
            f"try: print(open('{home}/key').read())\nexcept OSError: print('SAFE', sys.executable)"
        )
        for backend in ("bwrap", "landlock") if _landlocked() else ("bwrap",):
            with Sandbox(backend, slots=1, python=str(home / "bin" / "python3"), limits=LIMITS) as sandbox:
                result = sandbox.run([Job("script", look)])[0]
            assert f"SAFE {home}/bin/python3" in result.stdout.decode(), result
            assert b"key" not in result.stdout
    finally:
        shutil.rmtree(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="as an ordinary user the jail's user is oneself")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interpreter_that_the_jail_may_not_read_is_refused_in_one_sentence(backend: str) -> None:
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))  # for its owner alone
    try:
        shutil.copy(READABLE, home / "python3")
        with pytest.raises(SandboxUnavailable, match="outside of a private home"):
            Sandbox(backend, slots=1, python=str(home / "python3")).probe()
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jails_outlive_the_threads_that_use_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    start = Jail.start
    monkeypatch.setattr(Jail, "start", lambda self: (starts.append(self), start(self))[1])
    runs: list[str] = []
    run = Jail.run

    def watched(self: Jail, *args: Any, **options: Any) -> Result:
        result = run(self, *args, **options)
        runs.append(result.status)
        return result

    monkeypatch.setattr(Jail, "run", watched)
    job = Job("asserts", SQUARE, names=["f"], replace=True, tests=["assert f(7) == 49"])
    with Sandbox(backend, slots=4) as sandbox:
        for _ in range(8):  # each time in a thread that is gone afterwards, and in those that it starts
            thread = threading.Thread(target=sandbox.run, args=([job] * 4,))
            thread.start()
            thread.join()
    assert len(starts) <= 8
    assert set(runs) == {"ok"}


def test_a_child_of_the_trainer_has_jails_of_its_own() -> None:
    with Sandbox(slots=1) as sandbox:
        assert sandbox.run([Job("script", "print(1)")])[0].status == "ok"
        code = (
            "import os\nfrom sppo.sandbox import *\nwith Sandbox(slots=1): pass\n"
            "if os.fork() == 0:\n with Sandbox(slots=1) as s: os._exit(s.run([Job('script', '')])[0].status != 'ok')\n"
            "print(os.wait()[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": SOURCE}
        )
        assert done.stdout == "0\n", done.stderr


def test_what_fills_every_kind_of_memory_stays_within_the_limit() -> None:
    limits = Limits(memory_bytes=256 << 20, wall_seconds=20, cpu_seconds=10)
    with Sandbox(slots=1, limits=limits) as sandbox:
        result = sandbox.run([Job("script", attacks.FILLS)])[0]
        assert result.status == "ok", result
        assert 128 < int(result.stdout) <= 256


def test_a_program_that_will_not_die_has_timed_out_and_costs_its_jail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for a disk cannot be killed. Here no time is given at all, so that any program that is killed is such a one."""
    shutil.copytree(Path(codec.__file__).parent, tmp_path / "inside")
    zygote = tmp_path / "inside" / "zygote.py"
    patched = zygote.read_text().replace("STUCK_SECONDS = 2.0", "STUCK_SECONDS = -1.0")
    assert patched != zygote.read_text()
    zygote.write_text(patched)
    monkeypatch.setattr("sppo.sandbox.jail.files", lambda _: tmp_path)
    with Sandbox(slots=1, limits=LIMITS) as sandbox:
        first = sandbox._jails[0][0].process
        assert sandbox.run([Job("script", "import time\ntime.sleep(60)")])[0].status == "timeout"
        assert sandbox.run([Job("script", "print(1)")])[0].stdout == b"1\n"
        assert sandbox._jails[0][0].process is not first


@pytest.mark.parametrize("attack", attacks.RESOURCES)
def test_no_attack_takes_more_than_its_share(sandbox: Sandbox, attack: str) -> None:
    code, statuses = attacks.RESOURCES[attack]
    result = sandbox.run([Job("script", code)])[0]
    assert result.status in statuses, result
    assert sandbox.run([Job("script", "print(1)")])[0].stdout == b"1\n"


@pytest.mark.parametrize("attack", attacks.FORKING)
def test_processes_are_counted_and_ended_together(attack: str) -> None:
    code, statuses = attacks.FORKING[attack]
    with Sandbox(slots=1, limits=Limits(cpu_seconds=1, wall_seconds=1.5, memory_bytes=256 << 20, fork=True)) as sandbox:
        result = sandbox.run([Job("script", code)])[0]
        assert result.status in statuses, result
        if attack == "a daemon that holds stdout":
            assert result.stdout == b"done\n"
        assert sandbox.run([Job("script", "print(1)")])[0].stdout == b"1\n"
        assert _below(sandbox) <= 2, "a program outlived its run"  # bubblewrap's own process and the zygote


def _below(sandbox: Sandbox) -> int:
    """Processes below the first jail's bubblewrap."""
    process = sandbox._jails[0][0].process
    assert process is not None
    seen, pending = 0, [process.pid]
    while pending:
        pid = pending.pop()
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            continue
        seen += len(children)
        pending += map(int, children)
    return seen


def test_a_large_input_that_is_never_read_and_one_that_is(sandbox: Sandbox) -> None:
    big = "x" * (10 << 20)
    ignored, read = sandbox.run(
        [Job("script", "print('bye')", stdin=big), Job("script", "import sys\nprint(len(sys.stdin.read()))", stdin=big)]
    )
    assert (ignored.status, ignored.stdout) == ("ok", b"bye\n")
    assert read.stdout == b"%d\n" % len(big)


def test_killed_when_its_wall_time_is_over(sandbox: Sandbox) -> None:
    result = sandbox.run([Job("script", "import time\ntime.sleep(600)")])[0]
    assert result.status == "timeout"
    assert LIMITS.wall_seconds < result.wall_seconds < 60  # 1.5 s; on a busy machine it may take a while to be seen


def test_a_thousand_runs_leave_nothing_behind() -> None:
    with Sandbox(slots=2, limits=LIMITS) as sandbox:
        sandbox.run([Job("script", "print(1)")] * 50)
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        resident = _resident(sandbox)
        results = sandbox.run([Job("script", "print(1)")] * 1000)
        assert {r.status for r in results} == {"ok"}
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
        assert _resident(sandbox) - resident < 4 << 20
        assert _below(sandbox) <= 2


def _resident(sandbox: Sandbox) -> int:
    process = sandbox._jails[0][0].process
    assert process is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    inner = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
    pids = [process.pid, *map(int, children), *map(int, inner)]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * 4096


def test_a_jail_that_dies_is_started_anew(sandbox: Sandbox) -> None:
    process = sandbox._jails[0][0].process
    assert process is not None
    process.kill()
    process.wait()
    assert sandbox.run([Job("script", "print(1)")])[0].stdout == b"1\n"


def test_without_bubblewrap_it_says_so_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxUnavailable, match="install it"):
        Sandbox(slots=1).probe()
    with pytest.raises(RecipeError, match="bwrap"):
        Sandbox(backend="bwarp")
    with pytest.raises(RecipeError, match="gets anew"):
        Sandbox(python="/tmp/venv/bin/python")


@pytest.mark.skipif(not _landlocked(), reason="needs Linux 6.12")
@pytest.mark.parametrize(
    "attack", [a for a in attacks.RESOURCES if a != "many files"]
)  # no inode limit without a mount
def test_landlock_holds_resources_too(attack: str) -> None:
    code, statuses = attacks.RESOURCES[attack]
    with Sandbox("landlock", slots=1, limits=LIMITS) as sandbox:
        assert sandbox.run([Job("script", code)])[0].status in statuses
        leaves = Job("script", "import os\nopen('kept', 'w').write('x')\nprint(os.listdir('.'))")
        assert [r.stdout for r in sandbox.run([leaves] * 2)] == [b"['kept']\n"] * 2  # each in a fresh folder of its own
    with pytest.raises(RecipeError, match="take bwrap"):
        Sandbox("landlock", limits=Limits(fork=True))


def test_the_weaker_backend_is_named_in_every_result() -> None:
    with Sandbox("unsafe-subprocess", slots=1, limits=LIMITS) as sandbox:
        results = sandbox.run([Job("script", "print(1)"), Job("script", "while True: pass")])
    assert [(r.status, r.backend) for r in results] == [("ok", "unsafe-subprocess"), ("timeout", "unsafe-subprocess")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
def test_it_works_as_an_ordinary_user() -> None:
    backends = ["bwrap", "landlock"] if _landlocked() else ["bwrap"]
    code = (
        f"from sppo.sandbox import *\nfor name in {backends}:\n"
        " with Sandbox(name, slots=1) as s: print(name, s.run([Job('script', 'print(6*7)')])[0].stdout)"
    )
    open_to_all = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shutil.copytree(Path(__file__).parents[2] / "src" / "sppo", open_to_all / "sppo")
        os.chmod(open_to_all, 0o755)
        done = subprocess.run(
            ["/usr/bin/python3", "-B", "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
            cwd="/", env={"PYTHONPATH": str(open_to_all), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    finally:
        shutil.rmtree(open_to_all)
    assert done.stdout == "".join(f"{name} b'42\\n'\n" for name in backends), done.stderr


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(10**5000), 1.5, float("inf"), -0.0, "\udcff\x00é", [1, [2, (3,)]], {1: {2, 3}, "a": None}, b"\x00", 1j, range(3)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_survive_the_journey(value: object) -> None:
    back = codec.decode(json.loads(json.dumps(codec.encode(value))))
    assert type(back) is type(value)
    assert back == value


def test_an_answer_matches_by_plain_value() -> None:
    def same(given: object, expected: object) -> bool:
        return matches(json.loads(json.dumps(codec.encode(given))), expected)

    assert same((1, 2), [1, 2])
    assert same(0.1 + 0.2, 0.3)
    assert same(float("nan"), float("nan"))
    assert same(2, 2.0)
    assert same(2.0, 2)
    assert same({"a": [1], 2: None}, {2: None, "a": (1,)})
    assert same({1, 2}, frozenset([2, 1]))
    assert same(-(10**50), -(10**50))
    assert same(1j, 1j)
    assert not same(True, 1)
    assert not same(1, True)
    assert not same("1", 1)
    assert not same(iter([1]), [1])
    assert not same(None, 0)
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert not same(10**400, 1.0)


@pytest.mark.parametrize(
    "line",
    [
        "b'[0,[\"ok\",[\"S\",['+b','.join(b'[\"i\",\"%x\"]'%((2**61-1)*k) for k in range(1,36000))+b']]]]\\n'",
        "b'[0,[\"ok\",[\"Q\",\"'+b'f'*500000+b'\",\"'+b'e'*499999+b'\"]]]\\n'",
        "b'[0,[\"ok\",'+b'['*400000+b']]\\n'",
        "b'[0,[\"ok\",'+b'9'*500000+b']]\\n'",
    ],
)
def test_no_answer_keeps_the_trainer_busy(sandbox: Sandbox, line: str) -> None:
    code = f"import os\ndef f(x):\n b={line}\n while b: b=b[os.write(11,b):]\n os._exit(0)"
    began = time.process_time()  # of this process: what the trainer does with it
    assert judged(sandbox, "calls", code).passed == (False,)
    assert time.process_time() - began < LIMITS.wall_seconds + 1.0


TRY = "try:\n import nothing\nexcept ImportError:\n def close(a, b): return abs(a - b) < 1"


@pytest.mark.parametrize(
    ("cheat", "test", "setup"),
    [
        ("def isclose(a, b): return True\ndef f(x): return 0", "assert isclose(f(7), 49)", "from math import *"),
        ("def close(a, b): return True\ndef f(x): return 0", "assert close(f(7), 49)", TRY),
        ("def e(a): return True\ndef f(x): return 0", "assert e(f(7))", "(e := (lambda a: a == 49))"),
        ("def e(a): return True\ndef f(x): return 0", "assert e(f(7))", "for e in [lambda a: a == 49]: pass"),
        ("def isclose(a, b): return True\ndef f(x): return 0", "assert isclose(f(7), 49)", ""),
        ("def abs(a): return 0\ndef f(x): return 0", "assert abs(f(7) - 49) < 1", ""),
        ("def sum(a): return 0\ndef f(x): return 0", "assert f(7) == sum([40, 9])", ""),
        ("class J:\n def __contains__(s, x): return True\n def __iter__(s): return iter([])\ndef f(x): return J()", "assert 49 in f(7)", ""),
        ("class J:\n def __gt__(s, x): return True\n def __lt__(s, x): return True\ndef f(x): return J()", "assert 48 < f(7) < 50", ""),
        ("class J:\n def __sub__(s, x): return 0\n def __abs__(s): return 0\ndef f(x): return J()", "assert abs(f(7) - 49) < 1", ""),
        ("class J:\n def __round__(s, n=0): return 49\n def __eq__(s, o): return True\ndef f(x): return J()", "assert f(7) == J() != 49", ""),
        ("class f(Exception):\n def __eq__(s, o): return True", "assert f(7) == 49", ""),
        ("class J(type):\n def __instancecheck__(s, o): return True\nclass int(metaclass=J): pass\ndef f(x): return 'no'", "assert isinstance(f(7), int)", ""),
        ("class math:\n isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return None", "assert math.isclose(f(7), 49.0)", ""),
        ("class np:\n allclose = staticmethod(lambda *a, **k: True)\ndef f(x): return None", "assert np.allclose(f(7), 49.0)", ""),
        ("def isclose(a, b): return True\ndef f(x): return 0", "r = f(7)\nassert isclose(r, 49)", ""),
        ("def isclose(a, b): return True\ndef f(x): return 0", "for r in [f(7)]:\n assert isclose(r, 49)", ""),
        ("def sorted(*a, **k): return 49\nglobals()['f'] = lambda x: 0", "d = sorted([3], key=lambda x: -x)\nassert f(d) == 49", ""),
        ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x * x, range(10)))", ""),
        ("def f(x): raise StopIteration", "for got, want in zip(map(f, [1, 2]), [1, 4]):\n assert got == want", ""),
    ],
)  # fmt: skip
def test_a_program_does_not_bring_its_own_judge(sandbox: Sandbox, cheat: str, test: str, setup: str) -> None:
    assert asserts(sandbox, [(cheat, TestCode([test], setup))])[0].passed == (False,)


BAG = """
class Bag:
    kind = 'bag'
    def __init__(self, *a): self.a = list(a)
    def __len__(self): return len(self.a)
    def __iter__(self): return iter(self.a)
    def __getitem__(self, i): return self.a[i]
    def __setitem__(self, i, v): self.a[i] = v
    def __str__(self): return 'Bag!'
    @staticmethod
    def of(n): return Bag(*range(n))
    @classmethod
    def none(cls): return cls()
"""


def test_right_programs_pass_that_a_careless_jail_fails(sandbox: Sandbox) -> None:
    named = "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x): return P(1, 2)"
    numbered = "class N:\n def __init__(s, v): s.number = v\ndef f(x): return N(49)"
    own_error = "class E(ValueError):\n def __init__(s, m='none'): super().__init__(m)\ndef f(x): raise E('bad')"
    days = "import datetime\ndef f(d): return d + datetime.timedelta(days=1)\ndef g(a, b): return b - a"
    pairs = [
        ("def sum(a, b): return 6", "assert sum(10, 15) == 6"),  # the function asked for has a builtin's name
        (named, "assert f(7) == (1, 2)"),
        ("class D(dict): pass\ndef f(x): return D(a=1)", "assert f(7) == {'a': 1}"),
        (numbered, "assert f(7).number == 49"),
        (own_error, "try:\n f(7)\nexcept E as error: assert str(error) == 'bad'\nelse: raise AssertionError"),
        (own_error, "try:\n f(7)\nexcept ValueError: pass\nelse: raise AssertionError"),
        (
            BAG,
            "b = Bag(1, 2)\nassert len(b) == 2 and list(b) == [1, 2] and b[1] == 2 and 2 in b and 3 not in b and str(b) == 'Bag!'",
        ),
        (
            BAG,
            "b = Bag.of(3)\nb[0] = 9\nassert b.a == [9, 1, 2] and Bag.kind == 'bag' and not Bag.none() and isinstance(b, Bag)",
        ),
        ("PI = 3\ndef f(x): return x * PI", "assert f(7) == 7 * PI and PI == 3"),
        ("def f(*, xs): xs.append(1)", "a = []\nf(xs=a)\nassert a == [1]"),
        (days, "import datetime\nassert f(datetime.date(2024, 2, 28)) == datetime.date(2024, 2, 29)"),
        (
            days,
            "import datetime as d\nassert g(d.datetime(2024, 1, 1), d.datetime(2024, 1, 1, 1)) == d.timedelta(hours=1)",
        ),
    ]
    reports = asserts(sandbox, [(code, TestCode([test])) for code, test in pairs])
    assert [r.passed for r in reports] == [(True,)] * len(pairs), reports


def test_a_row_whose_tests_could_be_judged_by_the_program_is_named(sandbox: Sandbox) -> None:
    assert ambiguous(["assert isclose(f(7), 49)"], "") == "isclose"
    assert ambiguous(["r = f(7)\nassert isclose(r, 49)"], "") == "isclose"
    assert ambiguous(["assert np.allclose(f(7), 49)"], "") == "np"
    for tests, setup in (
        (["assert math.isclose(f(7), 49)"], ""), (["assert isclose(f(7), 49)"], "from math import *"),
        (["assert area(Square(2)) == 4"], ""), (["s = Stack()\npush(s, 1)\nassert s.top() == 1"], ""),
        (["assert f(f(2)) == 16"], ""), (["a = [1]\nf(a)\nassert a == [2]"], ""), (["assert sorted(f(7)) == [4, 9]"], ""),
    ):  # fmt: skip
        assert ambiguous(tests, setup) is None, tests
    # a standard module that the tests use is imported for them, whoever else imports it
    assert asserts(sandbox, [(SQUARE, TestCode(["assert math.isclose(f(7), 49.0)"]))])[0].passed == (True,)


def test_a_test_that_hands_over_a_function_is_the_rows_fault_and_said(sandbox: Sandbox) -> None:
    report = asserts(sandbox, [("def f(g): return g(7)", TestCode(["assert f(lambda x: x * x) == 49"]))])[0]
    assert report.passed == (False,)
    assert "a function is handed" in report.evidence["cannot"]
    # no program can bring it about: what it returns is never a function in the tests' jail
    for program in ("def f(x): return lambda y: y", "class K:\n def m(s): return 1\ndef f(x): return K().m", "f = len"):
        report = asserts(sandbox, [(program, TestCode(["assert f(f(7)) == 49"]))])[0]
        assert "cannot" not in report.evidence
