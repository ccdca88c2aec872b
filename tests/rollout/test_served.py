"""`sppo rollout serve` and the engine `served`: a real server process, real HTTP, and those who wish it ill."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch

from sppo.cli.main import main
from sppo.errors import RecipeError, RunFailure, WorkerLost
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.models.weights import fingerprint
from sppo.recipe.sections import AdapterSection
from sppo.rollout.canary import Canary
from sppo.rollout.engine import Sampling, load_engine
from sppo.rollout.local import LocalEngine
from sppo.rollout.sampler import Cut
from sppo.rollout.serve import Server
from sppo.rollout.wire import layout, layout_hash

from ..conftest import SMALL, small_policy

TOKEN = "a-token-of-this-test"
PATIENCE = 60.0
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
SEEDS = [1, 2**64 - 1, 3, 4]


@dataclass
class Served:
    """A server, and how to ask it without the engine."""

    port: int
    process: subprocess.Popen | None = None

    @property
    def use(self) -> str:
        return f"served:url=http://127.0.0.1:{self.port}"

    def ask(self, path: str, tree=None, *, body: bytes | None = None, token: str = TOKEN) -> tuple[int, list[dict]]:
        """Status and lines of JSON of one request; GET without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            body = json.dumps(tree).encode() if tree is not None else body
            connection.request("GET" if body is None else "POST", path, body, {"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            return response.status, [json.loads(line) for line in response.read().splitlines()]
        finally:
            connection.close()

    def health(self) -> dict:
        status, (found,) = self.ask("/health")
        assert status == 200
        return found

    def begin(self, policy: Policy, version: int = 1) -> str:
        status, (found,) = self.ask("/load", {"version": version, "layout": layout_hash(layout(policy))})
        assert status == 200
        return found["load"]

    def weight(self, load: str, name: str, tensor: torch.Tensor, content: bytes | None = None) -> tuple[int, list]:
        """Send one weight, or other bytes in its name."""
        content = (
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if content is None else content
        )
        return self.ask(f"/weight?{query(load, name, tensor)}", body=content)


def query(load: str, name: str, tensor: torch.Tensor) -> str:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
    given = {"load": load, "name": name, "dtype": dtype, "shape": shape}
    return urlencode(given | {"fingerprint": fingerprint([(name, tensor)])})


@contextlib.contextmanager
def process(*options: str, port: int = 0) -> Iterator[Served]:
    """`sppo rollout serve` of the small model."""
    command = [sys.executable, "-m", "sppo.cli.main", "rollout", "serve", "--model", SMALL, "--json", "--quiet"]
    with subprocess.Popen(
        [*command, "--port", str(port), *options], env=os.environ | {"SPPO_ROLLOUT_TOKEN": TOKEN},
        stdout=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            assert running.stdout is not None
            yield Served(int(json.loads(running.stdout.readline())["url"].rpartition(":")[2]), running)
        finally:
            running.kill()


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with process() as found:
        yield found
        found.process.terminate()
        assert found.process.wait(20) == 0


@pytest.fixture
def served(shared: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    return shared


@contextlib.contextmanager
def here(policy: Policy) -> Iterator[Served]:
    """The server in a thread, over any policy."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(listener, policy, LocalEngine(policy), "local", TOKEN)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Served(listener.getsockname()[1])
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def nudged(policy: Policy, by: float = 5e-2) -> Policy:
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn_like(p) * by)
    return policy


def local(policy: Policy, version: int) -> LocalEngine:
    """The local engine with the policy's weights, of a version."""
    engine = LocalEngine(policy)
    engine.load(policy.weights(), version)
    return engine


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "limits"),
    [
        (Sampling(8, 0.8), None),
        (Sampling(8, 1.0, batch=2), [1, 8, 3, 2]),
        (Sampling(8, 0.0), None),
        (Sampling(8, 1.0, cut=Cut(top_k=5, top_p=0.9)), None),
        (Sampling(8, 1.0, stop=("1", "ü")), None),
    ],
)
def test_samples_are_the_local_engines_bit_for_bit(served, policy, monkeypatch, sampling, limits):
    there, mine = load_engine(served.use, policy), local(policy, 0)
    seen: list[int] = []
    found = there.generate(PROMPTS, SEEDS, sampling, seen.append, limits)
    assert found == mine.generate(PROMPTS, SEEDS, sampling, None, limits)
    assert seen[-1] == len(PROMPTS)
    responses = [s.ids for s in found]
    assert there.score(PROMPTS, responses) == mine.score(PROMPTS, responses)
    assert there.context == policy.context
    assert there.stated.startswith(f"engine served: local at http://127.0.0.1:{served.port}")
    monkeypatch.setenv("SPPO_ROLLOUT_URL", f"http://127.0.0.1:{served.port}/")
    assert load_engine("served", policy).stated == there.stated
    assert there.generate([], [], sampling) == there.score([], []) == []


def test_weights_that_are_loaded_are_sampled_from_and_held(served, policy):
    there, canary = load_engine(served.use, policy), Canary(policy)
    first = there.generate(PROMPTS, SEEDS, Sampling(8))
    assert [s.version for s in first] == [0] * len(PROMPTS)
    before = policy.fingerprint()
    assert there.holds(before)
    nudged(policy)
    assert not there.holds(policy.fingerprint())
    there.load(policy.weights(), 7)
    assert there.holds(policy.fingerprint())
    assert not there.holds(before)
    assert canary.check(there, policy, policy.fingerprint()) < 1e-5
    found = there.generate(PROMPTS, SEEDS, Sampling(8))
    assert found == local(policy, 7).generate(PROMPTS, SEEDS, Sampling(8)) != first
    assert served.health()["weights"]["fingerprint"] == policy.fingerprint()


def test_a_new_engine_does_not_sample_from_what_another_run_left(served, policy):
    load_engine(served.use, policy).load(nudged(small_policy()).weights(), 9)
    mine = load_engine(served.use, policy)
    assert mine.generate(PROMPTS, SEEDS, Sampling(8)) == local(policy, 0).generate(PROMPTS, SEEDS, Sampling(8))


def test_a_run_whose_weights_were_replaced_is_told_and_can_load_again(served, policy):
    mine = load_engine(served.use, policy)
    mine.load(policy.weights(), 1)
    load_engine(served.use, policy).load(nudged(small_policy()).weights(), 1)
    with pytest.raises(WorkerLost, match="other weights"):
        mine.generate(PROMPTS, SEEDS, Sampling(8))
    mine.load(policy.weights(), 2)
    assert mine.generate(PROMPTS, SEEDS, Sampling(8))[0].version == 2


def narrow() -> Policy:
    model, tokenizer = tiny.build(seed=0, hidden=32, layers=2, heads=2)
    return Policy(model.to(torch.bfloat16), tokenizer)


def adapted(alpha: int = 8) -> Policy:
    section = AdapterSection(rank=2, alpha=alpha)
    return Policy.load(SMALL, dtype="float32", device=torch.device("cpu"), seed=3, adapter=section)[0]


@pytest.mark.parametrize("make", [narrow, adapted])
def test_weights_in_bfloat16_and_of_adapters_arrive(monkeypatch, make):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    with here(make()) as server:
        policy = make()
        with torch.no_grad():
            for p in policy.trained.values():
                p.add_(0.1)
        there = load_engine(server.use, policy)
        there.load(policy.weights(), 1)
        assert there.holds(policy.fingerprint())
        assert there.generate(PROMPTS, SEEDS, Sampling(8)) == local(policy, 1).generate(PROMPTS, SEEDS, Sampling(8))
        if make is adapted:
            with pytest.raises(RecipeError, match=r"\[adapter\] is another one"):
                load_engine(server.use, adapted(alpha=16))


def test_a_model_that_broke_is_reported_as_it_is_here(served, policy):
    there = load_engine(served.use, policy)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(float("nan"))
    there.load(policy.weights(), 1)
    assert there.score([[5, 6]], [[7]])[0] == pytest.approx([float("nan")], nan_ok=True)
    with pytest.raises(RunFailure, match="not finite") as caught:
        there.generate(PROMPTS, SEEDS, Sampling(8))
    assert not isinstance(caught.value, WorkerLost)  # another worker would fail just the same


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_token_that_is_wrong_or_missing_is_refused_everywhere(served, policy, monkeypatch):
    before = served.health()
    for path in ("/health", "/layout", "/nowhere"):
        assert [served.ask(path, token=t)[0] for t in ("", "wrong", TOKEN[:-1], TOKEN + "x")] == [401] * 4
    for path in ("/load", "/weight", "/loaded", "/generate", "/score", "/holds"):
        assert served.ask(path, {"version": 1, "layout": before["layout"]}, token="wrong")[0] == 401
    assert served.health() == before
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", "another-token-than-that")
    with pytest.raises(RecipeError, match="another token"):
        load_engine(served.use, policy)
    monkeypatch.delenv("SPPO_ROLLOUT_TOKEN")
    with pytest.raises(RecipeError, match="token_file"):
        load_engine(served.use, policy)


def test_another_model_is_refused_by_name(served):
    for changes, word in (
        ({"hidden": 64}, "model.embed_tokens.weight has shape"),
        ({"layers": 1}, "model.layers.1.input_layernorm.weight is not trained here"),
        ({"layers": 3}, "no weight model.layers.2.input_layernorm.weight"),
    ):
        model, tokenizer = tiny.build(seed=0, **{"hidden": 32, "layers": 2, "heads": 2} | changes)
        with pytest.raises(RecipeError, match=word):
            load_engine(served.use, Policy(model, tokenizer))
    model, tokenizer = tiny.build(seed=0, hidden=32, layers=2, heads=2)
    with pytest.raises(RecipeError, match="has dtype float32, and here bfloat16"):
        load_engine(served.use, Policy(model.to(torch.bfloat16), tokenizer))
    assert served.ask("/load", {"version": 1, "layout": "0" * 32})[0] == 409


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("", "SPPO_ROLLOUT_URL"), ("url=ftp://x", "not http://"), ("url=http://u:p@x", "not http://"),
        ("url=http://127.0.0.1:99999", "not http://"), ("url=http://127.0.0.1:1", "nobody answers"),
        ("url=http://x,timeout=nan", "timeout"), ("url=http://x,token_file=/nowhere/at/all", "token file"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_obeyed_are_refused(served, policy, options, word):
    with pytest.raises(RecipeError, match=word):
        load_engine(f"served:{options}", policy)


def test_something_else_that_answers_is_not_taken_for_a_worker(policy, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    for said in (
        b"", b"hello\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n[1]\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"[" * 2000,
    ):  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=say_once, args=(listener, said))
            thread.start()
            with pytest.raises(RecipeError, match="is lost: "):
                load_engine(f"served:url=http://127.0.0.1:{listener.getsockname()[1]}", policy)
            thread.join(PATIENCE)


def test_the_token_is_not_told_to_whoever_has_taken_the_address(policy, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    guess = json.dumps({"proof": "0" * 64}).encode() + b"\n"
    heard: list[bytes] = []
    for said, word in (
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(guess) + guess, "another token"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}\n", "another token"),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "is lost"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=lambda at=listener, said=said: heard.append(say_once(at, said)))
            thread.start()
            with pytest.raises(RecipeError, match=word):
                load_engine(f"served:url=http://127.0.0.1:{listener.getsockname()[1]}", policy)
            thread.join(PATIENCE)
    assert len(heard) == 3
    assert all(h.startswith(b"GET /hello?nonce=") and TOKEN.encode() not in h for h in heard)


def say_once(listener: socket.socket, said: bytes) -> bytes:
    """Answer one client; returns all that it sent."""
    client, _ = listener.accept()
    with client:
        heard = client.recv(1 << 16)
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        while more := client.recv(1 << 16):
            heard += more
    return heard


def changed(**changes) -> dict:
    """A request to generate, with changes."""
    sampling = {
        "max_tokens": 4, "temperature": 1.0, "batch": 4, "cut": {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, "stop": [],
    }  # fmt: skip
    sampling |= {k: v for k, v in changes.items() if k in sampling}
    whole = {"load": "", "prompts": [[5, 6]], "seeds": [1], "sampling": sampling, "limits": None}
    return whole | {k: v for k, v in changes.items() if k not in sampling}


GENERATE = [
    {"prompts": [[5, 6], []], "seeds": [1, 2]}, {"prompts": []}, {"prompts": [[99]]}, {"prompts": [[-1]]}, {"prompts": [[1.5]]},
    {"prompts": [[True]]}, {"prompts": {"0": [1]}}, {"prompts": [[10**400]]}, {"prompts": [["5"]]}, {"seeds": []}, {"seeds": [2**64]},
    {"seeds": [-1]}, {"seeds": None}, {"max_tokens": 0}, {"max_tokens": 2**31}, {"max_tokens": 10**9, "limits": [1]},
    {"max_tokens": 2047}, {"temperature": -1}, {"temperature": 10**400}, {"temperature": "1"}, {"temperature": True}, {"batch": 0},
    {"cut": {}}, {"cut": {"top_k": 0, "top_p": 2, "min_p": 0}}, {"cut": []}, {"stop": [""]}, {"stop": ["x" * 2000]}, {"stop": "x"},
    {"stop": ["\ud800"]}, {"limits": [0]}, {"limits": [5]}, {"limits": [1, 1]}, {"sampling": None}, {"load": 5}, {"load": "x" * 999},
    {"unknown": 1}, {"unknown\ud800" * 50: 1},
]  # fmt: skip


def test_malformed_requests_are_refused_in_a_sentence_and_change_nothing(served, policy):
    there = load_engine(served.use, policy)
    there.load(policy.weights(), 3)
    before = served.health()
    load = before["weights"]["load"]
    for changes in GENERATE:
        status, (answer,) = served.ask("/generate", {"load": load} | changed(**{"load": load} | changes))
        assert status == 400, (changes, answer)
        assert 0 < len(answer["error"]) < 300
    for path in ("/load", "/loaded", "/generate", "/score", "/holds"):
        for body in (
            b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"version": NaN}', b'{"version": 1e999}', b'{"load": Infinity}',
            b"[1]," * 10_000_000, b'{"version": ' + b"9" * 5000 + b"}", b"{}", b'{"load": null}', b"\x80\x04\x95", b'{"version": -1, "layout": ""}',
        ):  # fmt: skip
            status, (answer,) = served.ask(path, body=body)
            assert status == 400, (path, body[:40], answer)
    for score in (
        {"prompts": [[5]], "responses": []}, {"prompts": [[5]], "responses": [[]]}, {"prompts": [[5]], "responses": [[5], [6]]},
        {"prompts": [[5]], "responses": [[5] * 4000]},
    ):  # fmt: skip
        assert served.ask("/score", {"load": load} | score)[0] == 400
    name, tensor = next(iter(policy.weights()))
    for asked in (
        "",
        "load=x",
        "a=b&" * 50,
        query("x", name, tensor) + "&load=y",
        query("x", name, tensor) + "&shape=a",
    ):
        assert served.ask(f"/weight?{asked}", body=b"1234")[0] in (400, 409), asked
    assert served.ask("/../etc/passwd")[0] == served.ask("//health")[0] == served.ask("/health/")[0] == 404
    assert served.health() == before
    assert there.generate(PROMPTS, SEEDS, Sampling(4)) == local(policy, 3).generate(PROMPTS, SEEDS, Sampling(4))


# -- transfers ---------------------------------------------------------------------------------------------------------


def holds_nothing(served: Served, load: str) -> bool:
    """Whether it says so, and samples nothing, neither with old weights nor with new ones."""
    assert served.health()["weights"] is None
    status, (answer,) = served.ask("/generate", changed(load=load))
    return status == 409 and "holds nothing" in answer["error"]


def test_a_spoiled_weight_is_refused_by_name_and_nothing_is_sampled_until_a_whole_load(served, policy):
    there = load_engine(served.use, policy)
    there.load(policy.weights(), 3)
    old = served.health()["weights"]["load"]
    load = served.begin(policy)
    assert holds_nothing(served, old)
    weights = dict(policy.weights())
    name = "model.layers.1.mlp.up_proj.weight"
    content = bytearray(weights[name].detach().view(-1).view(torch.uint8).numpy().tobytes())
    content[100] ^= 1
    status, (answer,) = served.weight(load, name, weights[name], bytes(content))
    assert status == 409
    assert answer["error"].startswith(f"weight {name} is not what was sent")
    assert holds_nothing(served, old)
    assert holds_nothing(served, load)
    assert served.weight(load, name, weights[name])[0] == 409  # that load is over
    with pytest.raises(WorkerLost, match="holds nothing"):
        there.generate(PROMPTS, SEEDS, Sampling(4))
    there.load(policy.weights(), 4)
    assert there.holds(policy.fingerprint())


def test_a_transfer_that_is_short_leaves_nothing_to_sample_from(served, policy):
    weights = dict(policy.weights())
    *most, last = weights
    load = served.begin(policy)
    for name in most:
        assert served.weight(load, name, weights[name])[0] == 200
    status, (answer,) = served.ask("/loaded", {"load": load})
    assert (status, answer["error"]) == (409, f"1 weights did not come, {last} among them")
    whole = weights[last].numel() * 4
    for wrong in (0, whole - 4, whole + 4):
        status, (answer,) = served.weight(load, last, weights[last], bytes(wrong))
        assert status == 400
        assert answer["error"].startswith(f"weight {last} has {whole} bytes")
    with socket.create_connection(("127.0.0.1", served.port)) as client:  # half of it, and gone
        head = (
            f"POST /weight?{query(load, last, weights[last])} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        )
        client.sendall(f"{head}Content-Length: {whole}\r\n\r\n".encode() + bytes(whole // 2))
    time.sleep(0.5)
    assert holds_nothing(served, load)
    assert served.weight(load, last, weights[last])[0] == 200  # in its place still
    assert served.ask("/loaded", {"load": load})[1][0]["held"]["fingerprint"] == policy.fingerprint()


def test_a_learner_that_dies_in_a_load_leaves_nothing_to_sample_from(served, policy):
    there = load_engine(served.use, policy)
    there.load(policy.weights(), 3)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(nudged(small_policy()).weights())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.load(breaks_off(), 4)
    assert served.health()["weights"] is None
    other = load_engine(served.use, policy)
    assert other.generate(PROMPTS, SEEDS, Sampling(8)) == local(policy, 0).generate(PROMPTS, SEEDS, Sampling(8))


def test_of_two_loads_the_later_one_counts(served, policy):
    new = nudged(small_policy())
    weights = dict(policy.weights())
    first = served.begin(policy, 1)
    name = next(iter(weights))
    assert served.weight(first, name, weights[name])[0] == 200
    second = served.begin(policy, 2)
    assert served.weight(first, name, weights[name])[0] == 409
    for name, tensor in new.weights():
        assert served.weight(second, name, tensor)[0] == 200
    assert served.ask("/loaded", {"load": first})[0] == 409
    assert served.ask("/loaded", {"load": second})[1][0]["held"] == {"version": 2, "fingerprint": new.fingerprint()}


# -- at work -----------------------------------------------------------------------------------------------------------


def test_health_and_progress_answer_during_a_generation_that_ends_when_its_client_leaves(served, policy):
    there = load_engine(served.use, policy)
    there.load(policy.weights(), 1)
    many, seen, answered = [[5, 6, 7]] * 3000, [], []
    sampling = Sampling(1000, 1.0, batch=4)

    def leave(finished: int) -> None:
        seen.append(finished)
        began = time.monotonic()
        busy = served.health()["busy"]
        answered.append(time.monotonic() - began)
        assert busy["what"] == "generate"
        assert busy["of"] == 3000
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.generate(many, list(range(3000)), sampling, leave)
    assert 0 < seen[0] < seen[1] < 3000
    assert max(answered) < 5
    end = time.monotonic() + 10
    while served.health()["busy"] is not None and time.monotonic() < end:
        time.sleep(0.1)
    assert served.health()["busy"] is None
    assert there.generate(PROMPTS, SEEDS, Sampling(4)) == local(policy, 1).generate(PROMPTS, SEEDS, Sampling(4))


def test_several_clients_at_once_get_what_each_would_alone(served, policy):
    there = load_engine(served.use, policy)
    there.load(policy.weights(), 1)
    load = served.health()["weights"]["load"]
    asked = [changed(load=load, seeds=[seed], max_tokens=8) for seed in range(8)]
    alone = [served.ask("/generate", tree)[1][-2] for tree in asked]
    together: dict[int, dict] = {}
    threads = [
        threading.Thread(target=lambda n=n, tree=tree: together.update({n: served.ask("/generate", tree)[1][-2]}))
        for n, tree in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [together[n] for n in range(8)] == alone


def test_a_server_that_dies_or_hangs_is_lost_soon_and_can_come_back(policy, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    right = local(policy, 0).generate(PROMPTS, SEEDS, Sampling(8))
    with process() as server:
        there = load_engine(f"{server.use},timeout=2", policy)
        there.load(policy.weights(), 0)
        server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(WorkerLost, match=f"127.0.0.1:{server.port} is lost: it gave no sign of life for 2 seconds"):
            there.generate(PROMPTS, SEEDS, Sampling(8))
        assert time.monotonic() - began < 8
        server.process.send_signal(signal.SIGCONT)
        there.load(policy.weights(), 0)
        assert there.generate(PROMPTS, SEEDS, Sampling(8)) == right

        def kill(finished: int) -> None:
            server.process.kill()
            server.process.wait(PATIENCE)

        began = time.monotonic()
        with pytest.raises(WorkerLost, match="the connection broke"):
            there.generate([[5, 6, 7]] * 3000, list(range(3000)), Sampling(1000, batch=4), kill)
        with pytest.raises(WorkerLost, match="nobody answers there"):
            there.load(policy.weights(), 1)
        assert time.monotonic() - began < 8
    with process(port=server.port):
        there.load(policy.weights(), 0)
        assert there.generate(PROMPTS, SEEDS, Sampling(8)) == right


def test_a_signal_ends_the_server_in_the_middle_of_a_generation(policy, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    with process() as server:
        there = load_engine(server.use, policy)
        with pytest.raises(WorkerLost):
            there.generate(
                [[5, 6, 7]] * 3000, list(range(3000)), Sampling(1000, batch=4), lambda n: server.process.terminate()
            )
        assert server.process.wait(10) == 0


# -- the command -------------------------------------------------------------------------------------------------------


def test_what_the_command_cannot_do_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    short = tmp_path / "short"
    short.write_text("short\n")
    short.chmod(0o600)
    writable = tmp_path / "writable"
    writable.write_text(TOKEN)
    writable.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, word in (
            ([], "give a recipe"),
            (["--model", SMALL, "--port", str(taken.getsockname()[1])], "choose another --port"),
            (["--model", SMALL, "--port", "99999"], "choose another --port"),
            (["--model", SMALL, "--port", "0", "--host", "no.such.host.invalid"], "choose another --port or --host"),
            (["--model", str(tmp_path / "nowhere"), "--port", "0"], "nowhere"),
            (["--model", SMALL, "--port", "0", "--token-file", str(short)], "holds no token"),
            (["--model", SMALL, "--port", "0", "--token-file", str(tmp_path)], "token file"),
            (["--model", SMALL, "--port", "0", "--token-file", str(tmp_path / "no" / "file")], "cannot be written"),
            (["--model", SMALL, "--port", "0", "--token-file", str(writable)], "may have written"),
            (["--model", SMALL, "--port", "0", "--engine", "control"], "cannot be served"),
            (["--model", SMALL, "--port", "0", "--engine", "served:url=http://127.0.0.1:1"], "cannot be served"),
            (["--model", SMALL, "--port", "0", "--engine", "locl"], "did you mean 'local'"),
            (["--model", "mlp:pendulum", "--port", "0"], "control"),
        ):
            assert main(["rollout", "serve", "--quiet", *options]) == 2, options
            said = capsys.readouterr().err.strip().splitlines()
            assert word in said[-1], said
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", "short")
    assert main(["rollout", "serve", "--quiet", "--model", SMALL, "--port", "0"]) == 2


def test_a_token_file_is_made_for_its_owner_alone_and_used_again(policy, tmp_path):
    file = tmp_path / "token"
    with process("--token-file", str(file)) as server:
        assert file.stat().st_mode & 0o777 == 0o600
        token = file.read_text().strip()
        assert len(token) >= 16
        assert token != TOKEN
        assert served_by(server, file, policy)
    with process("--token-file", str(file)) as server:
        assert file.read_text().strip() == token
        assert served_by(server, file, policy)


def served_by(server: Served, file: Path, policy: Policy) -> bool:
    return load_engine(f"{server.use},token_file={file}", policy).holds(policy.fingerprint())


def test_a_run_through_a_server_learns_the_same_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPPO_ROLLOUT_TOKEN", TOKEN)
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.toml")
    given = ["--seed", "5", "--run.threads", "2"]
    cut = [
        "--steps", "2", "--bootstrap.steps", "20", "--evaluation.n", "16", "--rollout.prompts", "32", "--json", "--quiet",
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "sppo.cli.main",
        "rollout",
        "serve",
        recipe,
        *given,
        "--port",
        "0",
        "--json",
        "--quiet",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            use = f"served:url={json.loads(running.stdout.readline())['url']}"
            found = []
            for engine in (use, "local"):
                out = str(tmp_path / engine[:5])
                assert main(["train", recipe, *given, *cut, "--rollout.engine", engine, "--run.out", out]) == 0
                found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["policy_sha256"])
            assert found[0] == found[1]
        finally:
            running.kill()
