"""The C files of this folder, compiled for this processor when they are first needed (two or three seconds), and kept
in the user's cache.

They do what PyTorch's CPU kernels are not made for: a decoding step of few rows (decode.c), attention of many short
sequences (attention.c), log-probabilities over a large vocabulary (head.c), norms, gated units and rotations of an
update (elementwise.c). Every caller has another way where there is no compiler.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")


class NoCompiler(Exception):
    """The C code cannot be compiled here; the message says why."""


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled `name.c` for weights of a dtype. Raises NoCompiler."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # PyTorch loads its OpenMP for all to see, where it has one
        raise NoCompiler("PyTorch runs without GNU OpenMP here")
    try:
        compiler = _compiler()
        flags = [*COMPILE, f"-DBF16={int(dtype == torch.bfloat16)}"]
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        source = FOLDER / f"{name}.c"
        headers = [path.read_text() for path in sorted(FOLDER.glob("*.h"))]
        identity = "\n".join([source.read_text(), *headers, *flags, version, _processor()])
        path = _cache() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, flags, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, UnicodeError) as error:
        raise NoCompiler(str(error)) from None


def _compiler() -> list[str]:
    """`$CC`, or what a machine calls its C compiler."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"]]:
        if shutil.which(command[0]):
            return command
    raise NoCompiler(f"no C compiler ({given[0] if given else 'cc, gcc'}) is installed")


def _cache() -> Path:
    """The user's cache where nobody else can write; else a folder of this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sppo"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    made = Path(tempfile.mkdtemp(prefix="sppo-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _compile(compiler: list[str], flags: list[str], source: Path, path: Path) -> None:
    """Atomic: another process may be doing the same. Linked without OpenMP, whose symbols come from the copy that
    PyTorch has loaded: the threads of two copies would spin for each other."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder, "made.o"), Path(folder, path.name)
        for command in (
            [*compiler, *flags, "-c", str(source), "-o", str(made)],
            [*compiler, "-shared", str(made), "-o", str(linked), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "error" in line] or [
                    f"exit code {done.returncode}"
                ]
                raise NoCompiler(f"{compiler[0]} does not compile {source.name}: {said[0].strip()}")
        with linked.open("rb") as file:
            os.fsync(file.fileno())  # a library cut short by a lost supply of power would crash whoever loads it
        linked.replace(path)


def _processor() -> str:
    """What this processor can do: a cache in a home that machines share must not serve another kind."""
    flags = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {next(flags, platform.node())}"
