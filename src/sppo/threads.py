"""How many threads PyTorch computes with, and how long one of them spins for the others; settled before PyTorch is loaded.

GNU OpenMP's threads spin at the end of each product until the last one is there. Where another program holds a core, the last one waits for its turn,
and the others burn theirs: beside one busy loop per core a step took four times as long, where a fair share is twice (docs/performance.md).
So spinning is bounded, and a thread that has waited long enough sleeps. PyTorch also starts a thread for every core that it sees, though
a container may be allowed less.

Nothing here loads PyTorch, and nothing that the user has set is changed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

SPINS = "3000"
"""Rounds of spinning until a thread sleeps, some ten microseconds: longer than most waits for a thread that has a core of its own."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By any of these a user says how threads wait."""
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def settle(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Say in the environment how OpenMP's threads wait, and how many there are where a limit says so; False where PyTorch is loaded already,
    which has read it."""
    if "torch" in sys.modules:
        return False
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS
    allowed = cores()
    if "OMP_NUM_THREADS" not in environment and allowed < affinity():
        environment["OMP_NUM_THREADS"] = str(allowed)
    return True


def fitted(current: int, environment: Mapping[str, str] = os.environ) -> int:
    """The threads to compute with where PyTorch has begun with `current`: as many, unless nobody asked for them and a limit gives less."""
    return current if "OMP_NUM_THREADS" in environment or current != affinity() else cores()


def affinity() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def cores(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores' worth of time that this process may use: its affinity, or what its control groups allow, rounded up."""
    limits = [quota(folder) for folder in folders("cpu", root, membership)]
    return max(1, min([affinity(), *(math.ceil(limit) for limit in limits if limit is not None)]))


def quota(folder: Path) -> float | None:
    """The cores that one control group allows (version 2: cpu.max; version 1: cpu.cfs_quota_us), or None."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(limit) / int(period) if limit != "max" and int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def folders(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[Path]:
    """The control groups of this process that may limit a controller (`cpu`, `memory`), each before the one that holds it.

    A container sees its own group as the root, whatever its name outside is: the root is always among them.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, path = line
        if controllers and controller not in controllers.split(","):
            continue
        bases = [root / name for name in (controllers, controller)] if controllers else [root / "unified", root]
        for base in bases:
            if not base.is_dir():
                continue
            place = base / path.lstrip("/")
            found += [p for p in (place, *place.parents) if p == base or base in p.parents]
    return list(dict.fromkeys(found))
