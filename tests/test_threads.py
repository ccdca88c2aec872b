"""How many threads there are, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sppo import threads
from sppo.threads import affinity, cores, folders, quota, settle


def test_spinning_is_bounded_unless_the_user_says_how_threads_wait(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment: dict[str, str] = {}
    assert settle(environment)
    assert environment["GOMP_SPINCOUNT"] == "3000"
    for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5"), ("KMP_BLOCKTIME", "0")):
        environment = {name: value, "OMP_NUM_THREADS": "7"}
        before = dict(environment)
        settle(environment)
        assert environment == before


def test_nothing_is_changed_once_pytorch_has_read_its_environment():
    import torch  # noqa: F401

    environment: dict[str, str] = {}
    assert not settle(environment)
    assert not environment


def test_threads_that_someone_asked_for_stay(monkeypatch):
    monkeypatch.setattr(threads, "affinity", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    assert threads.fitted(8, {}) == 2
    assert threads.fitted(8, {"OMP_NUM_THREADS": "8"}) == 8
    assert threads.fitted(3, {}) == 3  # torch.set_num_threads(3)


@pytest.mark.parametrize("script", ["import sppo", "import sppo.cli.main", "from sppo.threads import cores"])
def test_it_is_settled_wherever_a_user_comes_in(script):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = f"{script}\nimport os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3000", "False"]


def test_a_container_s_quota_of_either_version_limits_the_threads(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path) == 1.5
    membership = tmp_path / "membership"
    membership.write_text("0::/\n")
    assert cores(tmp_path, membership) == min(2, affinity())
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) is None
    assert cores(tmp_path, membership) == affinity()
    old = tmp_path / "cpu" / "job"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("5:cpu:/job\n")
    assert old in folders("cpu", tmp_path, membership)
    assert cores(tmp_path, membership) == 1
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores(tmp_path, membership) == affinity()
    (old / "cpu.cfs_quota_us").write_text("nonsense\n")
    assert cores(tmp_path, membership) == affinity()
