"""This interpreter with its own libraries in a jail, for library code that handles a model's output.

Programs run in the jails of `pool.py`, which see the system's Python alone. Where a library has to look at a response
(a scorer that evaluates it), a worker of the trainer's own Python is started inside bubblewrap, or it takes rights away
from itself by Landlock. It reads the interpreter and its packages, writes nowhere, and has no network, no home and no
environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from .inside import landlock

REMEDY = "install bubblewrap (apt-get install bubblewrap), or use Linux 6.12 or newer with Landlock switched on"
BARE = (
    "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--new-session", "--cap-drop", "ALL", "--hostname", "jail",
    "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/proc/self/statm")


@lru_cache(maxsize=1)
def confinement() -> str:
    """The confinement that this machine offers for such a worker: `bwrap`, else `landlock`, else `none`."""
    bwrap = shutil.which("bwrap")
    if bwrap and subprocess.run([bwrap, *BARE, "/usr/bin/true"], capture_output=True, check=False).returncode == 0:
        return "bwrap"
    try:
        landlock.require()
    except (OSError, AttributeError):  # no such system call; no such system
        return "none"
    return "landlock"


def command(script: Path, package: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a worker.

    Args:
        script: run as `script SETUP`, where SETUP is JSON: `mode` (of `confinement`), `path` (folders for sys.path, last),
            `inside` (folders for sys.path, first: the script's own and sandbox/inside), `readable` (for Landlock).
        package: that its libraries must hold, wherever it is installed.
    """
    mode = confinement()
    python, library = os.path.realpath(sys.executable), sysconfig.get_config_var("LIBDIR") or ""
    packages = _packages(package)
    own = [str(script.parent), str(files("sppo.sandbox") / "inside")]
    interpreter = sorted({python, library, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")} - {""})
    readable = [path for path in [*interpreter, *packages, *own] if os.path.exists(path)]
    inside = [f"/opt/sppo/{i}" for i in range(len(own))] if mode == "bwrap" else own
    setup = {
        "mode": mode,
        "path": packages,
        "inside": inside,
        "readable": ["/usr", "/lib", "/lib64", *DEVICES, *readable],
    }
    environment = {
        "LANG": "C.UTF-8", "HOME": "/", "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LD_LIBRARY_PATH": library,
    }  # fmt: skip
    run = [python, "-I", "-S", "-B", os.path.join(inside[0], script.name), json.dumps(setup)]
    if mode != "bwrap":
        return run, environment
    jail = [shutil.which("bwrap") or "bwrap", *BARE]
    for path in readable:
        if path not in own and not path.startswith("/usr/"):
            jail += ["--ro-bind", path, path]
    for there, here in zip(inside, own, strict=True):
        jail += ["--ro-bind", here, there]
    jail += [
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--clearenv",
    ]  # fmt: skip
    for name, value in environment.items():
        jail += ["--setenv", name, value]
    return [*jail, *run], environment


def _packages(package: str) -> list[str]:
    """The folders of installed packages, and that of `package` where it lies elsewhere."""
    folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    found = find_spec(package)
    if found is not None and found.origin:
        folders.append(str(Path(found.origin).parent.parent))
    return list(dict.fromkeys(os.path.abspath(p) for p in folders))
