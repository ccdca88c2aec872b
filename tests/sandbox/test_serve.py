"""`sppo sandbox serve` under attack: a real server process, real sockets, and the real jail behind it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sppo import connections
from sppo.connections import authorised
from sppo.sandbox import Limits, Sandbox, serve
from sppo.sandbox.serve import Server

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
TOKEN = "a-token-of-this-test"
PRINTS = {"jobs": [{"role": "script", "code": "print(6 * 7)"}]}
PATIENCE = 30.0
"""Seconds: more than a loaded machine takes over an answer, less than those who keep others out would."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of `sppo sandbox serve` in a process of its own, with one slot."""
    command = [sys.executable, "-m", "sppo.cli.main", "sandbox", "serve", "--port", "0", "--slots", "1"]
    environment = os.environ | {"SPPO_SANDBOX_TOKEN": TOKEN}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        assert found
        yield int(found[1])
        process.terminate()
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()


def ask(port: int, tree: object = PRINTS, token: str = TOKEN, timeout: float = PATIENCE) -> tuple[int, str]:
    """One job by a client of its own. Raises TimeoutError after `timeout` seconds without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/run", json.dumps(tree), {"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def raw(port: int, *parts: bytes, answers: int = 1) -> bytes:
    """What a server says to these bytes: until that many answers, and a second more for those that nobody asked for."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(0.2)
            while part := client.recv(1 << 16):
                said += part
                client.settimeout(1.0 if said.count(b"HTTP/1.1 ") >= answers else PATIENCE)
        except (TimeoutError, ConnectionError):
            pass
    return said


def test_drips_without_a_token_keep_nobody_out(port: int) -> None:
    drips: list[socket.socket] = []
    try:
        for _ in range(connections.MOST_CONNECTIONS + 90):
            drip = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            drip.sendall(b"GET /health HTTP/1.1\r\nX: ")
            drips.append(drip)
            if len(drips) % 100 == 0:
                assert ask(port)[0] == 200
        for _ in range(3):
            for drip in drips:
                with contextlib.suppress(OSError):  # it had to make room
                    drip.sendall(b"a")
            assert ask(port)[0] == 200
    finally:
        for drip in drips:
            drip.close()


def test_a_client_with_the_token_keeps_its_connection_among_drips(port: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client.request("POST", "/run", json.dumps(PRINTS), headers)
    assert client.getresponse().read()
    first = client.sock
    drips = [
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        for _ in range(connections.MOST_CONNECTIONS + 50)
    ]
    try:
        client.request("POST", "/run", json.dumps(PRINTS), headers)
        assert client.getresponse().status == 200
        assert client.sock is first
    finally:
        client.close()
        for drip in drips:
            drip.close()


def test_each_request_has_one_answer_or_its_connection_is_closed(port: int) -> None:
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    key = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    body = json.dumps(PRINTS).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for head in (
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"DELETE /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
        b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: -1\r\n\r\n",
        b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: %d\r\n\r\n" % (serve.LARGEST_REQUEST + 1),
        b"POST /run HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"POST /elsewhere HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: %d\r\n\r\n" % len(inner),
    ):  # fmt: skip
        said = raw(port, head + inner)
        assert said.count(b"HTTP/1.1 ") == 1, (head, said)
        assert re.match(rb"HTTP/1.1 4\d\d ", said), (head, said)
    victim = b"POST /run HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: %d\r\n\r\n" % len(body) + body
    swallow = b"POST /run_code HTTP/1.1\r\nHost: x\r\nX-Swallow: "
    said = raw(port, b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(swallow) + swallow, victim)
    assert said.count(b"HTTP/1.1 ") == 1  # the victim's request was not taken for another
    assert raw(port, victim * 3, answers=3).count(b"HTTP/1.1 200") == 3  # plain requests, one after the other


def test_jobs_of_a_client_that_left_are_ended(port: int) -> None:
    sleeps = {"jobs": [{"role": "script", "code": "import time; time.sleep(25)"}] * 6, "limits": {"wall_seconds": 30}}
    clients = []
    for _ in range(3):  # one runs, the others wait for the slot
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        client.request("POST", "/run", json.dumps(sleeps), {"Authorization": f"Bearer {TOKEN}"})
        clients.append(client)
    time.sleep(0.5)
    for client in clients:
        client.sock.close()
    status, text = ask(port, timeout=60)  # far less than the 450 s of sleep that were asked for
    assert (status, json.loads(text)["results"][0]["status"]) == (200, "ok")


def test_the_token_is_one_header_and_all_of_it(port: int) -> None:
    assert [ask(port, token=t)[0] for t in ("", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN)] == [401, 401, 401, 401, 200]
    header = (b"authorization", b"Bearer " + TOKEN.encode())
    assert authorised([header], TOKEN)
    assert not authorised([header, header], TOKEN)
    assert not authorised([], TOKEN)


def test_a_request_has_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "BODY_SECONDS", 1.0)
    with Sandbox(slots=1, limits=Limits(wall_seconds=5)) as sandbox:
        server = Server(("127.0.0.1", 0), sandbox, TOKEN)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        head = b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        for begin, drop in (
            (b"", b""),
            (b"GET /health HTTP/1.1\r\nX: ", b"a"),
            (head, b"X: a\r\n"),
            (head + b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n", b" "),
        ):
            assert closed_on(server.server_address[1], begin, drop), begin
        slow = {"jobs": [{"role": "script", "code": "import time; time.sleep(2)"}]}
        assert ask(server.server_address[1], slow, timeout=30)[0] == 200  # an answer takes as long as its job
        server.shutdown()
        thread.join(20)
        assert not thread.is_alive()


def closed_on(port: int, begin: bytes, drop: bytes) -> bool:
    """Whether the server ends a connection that begins so and goes on drop by drop; 30 s are given up on."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(begin)
        client.settimeout(0.1)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                client.sendall(drop)
                if client.recv(1) == b"":
                    return True
            except TimeoutError:
                continue
            except ConnectionError:
                return True
    return False


def test_a_signal_ends_the_server_and_what_it_runs() -> None:
    command = [sys.executable, "-m", "sppo.cli.main", "sandbox", "serve", "--port", "0", "--slots", "1"]
    sleeps = {"jobs": [{"role": "script", "code": "import time; time.sleep(25)"}] * 12, "limits": {"wall_seconds": 30}}
    with subprocess.Popen(
        command, env=os.environ | {"SPPO_SANDBOX_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        assert found
        client = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        client.request("POST", "/run", json.dumps(sleeps), {"Authorization": f"Bearer {TOKEN}"})
        time.sleep(1.0)
        process.terminate()
        try:
            assert process.wait(60) == 0  # of the 300 s that its jobs asked for
        finally:
            process.kill()
            client.close()
