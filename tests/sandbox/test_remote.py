"""The remote sandbox: a real client against a real server on loopback, with the real jail behind it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from sppo.errors import RecipeError, SandboxUnavailable
from sppo.rewards.loading import load_reward
from sppo.sandbox import Case, Job, Limits, RemoteSandbox, Sandbox, TestCode, asserts, calls, stdio
from sppo.sandbox import remote as remote_module
from sppo.sandbox.serve import Server
from sppo.types import Rollout, Task

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
TOKEN = "a-token-of-this-test"
MOST = Limits(cpu_seconds=1, wall_seconds=1.5)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Sandbox(slots=2, limits=MOST) as sandbox:
        made = Server(("127.0.0.1", 0), sandbox, TOKEN)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()
        made.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def post(server: Server, path: str, tree: object, token: str = TOKEN) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("POST", path, json.dumps(tree), {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_verdicts_are_those_of_the_local_sandbox(server: Server) -> None:
    good, bad = "def f(x): return x * x", "def f(x): raise SystemExit(0)"
    main = "\nprint(f(int(input())))"
    with RemoteSandbox(url(server), token=TOKEN) as far, Sandbox(slots=1, limits=MOST) as near:
        for sandbox in (near, far):
            cases = [Case(49, entry="f", args=[7]), Case(4, entry="f", args=[2])]
            assert [r.passed for r in calls(sandbox, [(good, cases), (bad, cases)])] == [(True, True), (False, False)]
            test = TestCode(["assert f(7) == 49"])
            assert [r.passed for r in asserts(sandbox, [(good, test), (bad, test)])] == [(True,), (False,)]
            assert stdio(sandbox, [(good + main, [Case("49", stdin="7")])])[0].passed == (True,)
        raw = far.run([Job("script", "import sys\nsys.stdout.buffer.write(bytes(range(256)))")])[0]
        assert (raw.stdout, raw.backend) == (bytes(range(256)), "remote bwrap")


def test_the_servers_limits_are_the_highest(server: Server) -> None:
    with RemoteSandbox(url(server), limits=Limits(cpu_seconds=100, wall_seconds=100), token=TOKEN) as far:
        assert far.run([Job("script", "while True: pass")])[0].status == "timeout"
        fork = Limits(fork=True)
    with RemoteSandbox(url(server), limits=fork, token=TOKEN) as far:
        assert b"SAFE" in far.run([Job("script", "import os\ntry: os.fork()\nexcept OSError: print('SAFE')")])[0].stdout


def test_nothing_without_the_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert post(server, "/run", {"jobs": [{"role": "script", "code": "print(1)"}]}, "wrong")[0] == 401
    monkeypatch.delenv("SPPO_SANDBOX_TOKEN", raising=False)
    with pytest.raises(SandboxUnavailable, match="SPPO_SANDBOX_TOKEN"):
        load_reward(f"code:backend=remote,url={url(server)}")


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ([], "object"), ({}, "jobs"), ({"jobs": []}, "jobs"), ({"jobs": [{"role": "script"}]}, "code"), ({"jobs": [3]}, "role"),
        ({"jobs": [{"role": "tests", "code": ""}]}, "role"), ({"jobs": [{"role": "script", "code": 3}]}, "code"),
        ({"jobs": [{"role": "script", "code": "", "x": 1}]}, "x"),
        ({"jobs": [{"role": "script", "code": ""}], "limits": {"wall_seconds": -1}}, "above 0"),
        ({"jobs": [{"role": "script", "code": ""}], "limits": {"memory_bytes": "lots"}}, "above 0"),
        ({"jobs": [{"role": "asserts", "code": "", "tests": [1]}]}, "texts"),
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused_with_its_reason(server: Server, tree: object, why: str) -> None:
    status, answer = post(server, "/run", tree)
    assert status == 400
    assert why in str(answer["error"])


def test_sandboxfusions_form(server: Server) -> None:
    status, answer = post(server, "/run_code", {"code": "print(input() * 2)", "language": "python", "stdin": "ab"})
    assert (status, answer["status"]) == (200, "Success")
    assert answer["run_result"]["stdout"] == "abab\n"  # type: ignore[index]
    _, answer = post(server, "/run_code", {"code": "while True: pass", "run_timeout": 0.5})
    assert answer["run_result"]["status"] == "TimeLimitExceeded"  # type: ignore[index]
    assert post(server, "/run_code", {"code": "x", "language": "cobol"})[0] == 400


def test_a_server_that_goes_away_masks_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PAUSES", (0.0, 0.0))
    with Sandbox(slots=1, limits=MOST) as sandbox:
        made = Server(("127.0.0.1", 0), sandbox, TOKEN)
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("SPPO_SANDBOX_TOKEN", TOKEN)
        reward = load_reward(f"code:backend=remote,url={url(made)}")
        task = Task("t", "?", {"tests": ["assert f(7) == 49"]})
        rollout = Rollout.answer(task, [1], [1], [0.0], "stop", "def f(x): return x * x")
        assert reward.judge([rollout])[0].outcome == "correct"
        made.shutdown()
        made.server_close()
        reward.close()
        verdict = reward.judge([rollout])[0]
        assert (verdict.outcome, verdict.masked) == ("infra_error", True)
        assert "127.0.0.1" in str(verdict.evidence)
    with pytest.raises(SandboxUnavailable, match="sppo sandbox serve"):
        RemoteSandbox(url(made), token=TOKEN).probe()
    for spec in ("code:backend=remote", "code:url=http://x", "code:backend=remote,url=ftp://x", "code:slots=none"):
        with pytest.raises(RecipeError):
            load_reward(spec)


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-m", "sppo.cli.main", "sandbox", "serve", "--port", "0", "--slots", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = "".join(process.stdout.readline() for _ in range(3))
        address, token = re.search(r"http://127.0.0.1:\d+", told), re.search(r"made for this run: (\S+)", told)
        assert address
        assert token
        with RemoteSandbox(address[0], token=token[1]) as far:
            assert far.run([Job("script", "print(6 * 7)")])[0].stdout == b"42\n"
        process.terminate()
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()  # a server that stays would keep this test for ever
