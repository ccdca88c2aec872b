"""Rollout workers whose engines are servers of `sppo rollout serve`: each has its own, and one that is lost comes back."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sppo.errors import RecipeError
from sppo.recipe.config import Config
from sppo.rollout.served import of_worker
from sppo.run.run import Run

from ..conftest import SMALL
from ..rollout.test_served import TOKEN, process
from .test_runs import BASE, done, finished, on

A, B = "http://127.0.0.1:8701", "http://127.0.0.1:8702"


def test_each_worker_has_a_server_of_its_own() -> None:
    use = f"served:url=[{A}, {B}],token_file=~/token,timeout=9"
    assert of_worker(use, 1, 2) == f"served:url={B},token_file=~/token,timeout=9"
    assert of_worker("local", 1, 2) == "local"
    with pytest.raises(RecipeError, match=r"names 2 servers, and cluster\.rollouts = 3"):
        of_worker(use, 0, 3)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[list[Any], contextlib.ExitStack]]:
    """Two, and what more are begun with."""
    (tmp_path / "token").write_text(TOKEN)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(process()) for _ in range(2)], stack


def test_a_run_over_two_servers_is_that_of_two_local_workers_though_one_is_lost_and_comes_back(
    servers: tuple[list[Any], contextlib.ExitStack], ray_address: str, tmp_path: Path
) -> None:
    there, stack = servers
    changes = on(ray_address, 1, 2, chunk=6, backoff=1.0) | {"policy.model": SMALL}
    local = done(tmp_path / "local", changes)
    urls = ", ".join(f"http://127.0.0.1:{server.port}" for server in there)
    use = {"rollout.engine": f"served:url=[{urls}],token_file={tmp_path / 'token'}", "run.out": str(tmp_path / "run")}
    run = Run.new(Config.load(None, BASE | changes | use))
    write = run.record

    def striking(step: int, *rest: Any) -> None:
        write(step, *rest)
        if step == 0:
            os.kill(there[0].process.pid, signal.SIGKILL)
            there[0].process.wait()
            stack.enter_context(process(port=there[0].port))

    run.record = striking  # type: ignore[method-assign]
    assert finished(run)["policy_sha256"] == local["policy_sha256"]
    assert run.components.models.metrics()["cluster/lost"] >= 1


def test_several_servers_without_a_cluster_are_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    use = {"rollout.engine": f"served:url=[{A}, {B}],token_file={tmp_path / 'token'}", "run.out": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=r"names 2 servers.*--cluster.rollouts 2"):
        Run.new(Config.load(None, BASE | use))
