"""Real ranks: processes that meet over gloo. They are forked from one server that has imported everything, so a group takes a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sppo.distributed.mesh import Mesh
from sppo.distributed.ranks import join

os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the server imports what is tested here
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.distributed.cases"])


def on_ranks(size: int, function: Callable[..., Any], *args: Any, shards: int = 1, timeout: float = 60) -> list[Any]:
    """What `function(mesh, *args)` returns on each rank. Raises AssertionError with the trace of a rank that fails."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, size, shards, folder, timeout, function, args), daemon=True)
            for r in range(size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout)
        hung = [r for r, rank in enumerate(ranks) if rank.is_alive()]
        for r in hung:
            ranks[r].kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not hung, f"ranks {hung} were still waiting after {timeout} s"
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(size)]


def _rank(
    rank: int, size: int, shards: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        mesh = join(rank, size, f"file://{folder}/meet", timeout, "cpu", shards)
        found = function(mesh, *args)
        torch.save(found, Path(folder) / f"{rank}.pt")
        mesh.close()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # the others notice at once


def alone() -> Mesh:
    """The mesh of one process."""
    return Mesh()
