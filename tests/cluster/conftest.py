"""A Ray cluster for the tests of this folder, as a user would start one: `ray start --head`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; this cluster listens here alone
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Of a cluster of this process's own."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets must have short names
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else other tests stop its workers
    begun = subprocess.Popen(
        [RAY, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=16", "--include-dashboard=false",
         f"--temp-dir={folder}", "--object-store-memory=200000000", "--block", "--dashboard-agent-listen-port=0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
    )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if begun.poll() is not None:
                pytest.fail("Ray ended at its start")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        begun.terminate()
        begun.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
