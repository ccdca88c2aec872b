"""reasoning-gym's scorers in a process of their own: a zygote that has imported them, and forks once for each verdict.

    python scorer.py '{"mode": "bwrap", "path": […], "readable": […]}'

One JSON line in, one JSON line out (rewards/workers.py). Only a child ever looks at an answer. It gives up every right
that it can, scores, writes one line and ends: nothing that an answer does outlives its verdict. The child's line is a
claim, whose form the trainer checks.

`mode`: `bwrap` (started inside bubblewrap), `landlock`, or `none` (where neither is to be had; only families whose
scorers never evaluate an answer get here).
"""

import ast
import base64
import ctypes
import functools
import gc
import importlib.machinery
import json
import math
import os
import pickle
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

SETUP = json.loads(sys.argv[1])
sys.path[:0] = SETUP["inside"]
sys.path += SETUP["path"]

import guards  # type: ignore[import-not-found]  # noqa: E402  this folder's
import landlock  # noqa: E402  sandbox/inside
import seccomp  # noqa: E402
from kernel import as_filter, check, drop_capabilities, libc, seconds_in_line  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
MEMORY = 2 << 30
"""Bytes that a verdict may take beyond what the zygote has."""
LONGEST_LINE = 1 << 16
GRACE, LOOK_MILLISECONDS = 3.0, 500
"""Seconds beyond its limit of processor time that a verdict may take on a processor of its own, and how often that is
looked at."""
LINUX = sys.platform == "linux"


class NoPlots(types.ModuleType):
    """Stands for the plotting libraries, which cellpylib imports and no scorer uses: seconds of start, and memory that
    every fork copies."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, cls)  # type: ignore[arg-type]
            if name.partition(".")[0] in ("matplotlib", "mpl_toolkits")
            else None
        )

    @classmethod
    def create_module(cls, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return cls(spec.name)

    @classmethod
    def exec_module(cls, module: types.ModuleType) -> None:
        """Nothing to run."""


class Evaluated(BaseException):
    """A scorer that is taken not to evaluate answers is about to run one."""


caught: list[str] = []
"""What was refused: the library's own `except:` may swallow the exception."""


def confine() -> None:
    """No files, no network, no processes, no more memory than MEMORY: for this process, until it ends."""
    if SETUP["mode"] == "none" and not LINUX:
        return
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    limits = (("AS", size), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0))
    for name, most in limits:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    drop_capabilities()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if SETUP["mode"] == "landlock":
        hold_back(SETUP["readable"])
    if FILTER is not None:
        check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(FILTER), 0, 0), "seccomp")


def hold_back(readable: list[str]) -> None:
    """Landlock: read and execute below these paths, and nothing else."""
    landlock.restrict(landlock.ruleset(landlock.ALL_FILES, dict.fromkeys(readable, landlock.LOOK)))


def make_filter() -> ctypes.Structure | None:
    try:
        code = seccomp.program(False, unix=False)
    except OSError:  # an architecture without a list of calls
        if SETUP["mode"] != "none":
            raise
        return None
    made: ctypes.Structure = as_filter(code)
    return made


def only_known_code(own: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: refuses code that comes from a text (`eval`, SymPy's parser), before it runs.

    `own`: texts that may.
    """
    text = ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal text
        if event == "compile":
            source = arguments[0]
            text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source or "")
            return
        made = (
            event == "exec" and arguments[0].co_filename.startswith("<") and "<frozen" not in arguments[0].co_filename
        )
        if made and (not text or text not in own):
            caught.append(text)
            raise Evaluated

    return hook


@functools.lru_cache(maxsize=16)
def dataset(family: str, seed: int, size: int, options: str) -> Any:
    return reasoning_gym.create_dataset(family, seed=seed, size=size, **json.loads(options))


def verdict(job: dict[str, Any], problems: Any) -> dict[str, Any]:
    """The child's line.

    The problem comes from the trainer, which made it: some families make another one in another process.
    """
    family, entry = job["family"], pickle.loads(base64.b64decode(job["entry"]))
    confine()
    most = math.ceil(time.process_time() + job["limit"])
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))  # SIGXCPU first, which says why
    if family in guards.LITERALS:
        vars(sys.modules[type(problems).__module__])["eval"] = ast.literal_eval
    if family not in guards.EXPRESSIONS:
        sys.addaudithook(only_known_code(repr(entry) if family in guards.EVALUATES_ITS_OWN else ""))
    try:
        score = guards.score(family, problems, entry, job["answer"])
        if caught:
            raise Evaluated
        return {"score": score}
    except guards.Refused as why:
        return {"unread": str(why)}
    except guards.Ungradable as why:
        return {"masked": str(why)}
    except Evaluated:
        return {"masked": f"reasoning-gym's scorer of {family} runs answers as code here; the family cannot be judged"}
    except MemoryError:
        return {"crashed": "out of memory"}
    except Exception as error:  # the library's, of an answer in a form that it does not expect
        return {"unread": (f"{type(error).__name__}: {error}")[:300]}


def answer(job: dict[str, Any]) -> Any:
    """Fork, wait, and say what came of it."""
    try:
        problems = dataset(job["family"], job["seed"], job["size"], json.dumps(job["options"], sort_keys=True))
    except Exception as error:
        return {"masked": (f"reasoning-gym cannot make the family: {type(error).__name__}: {error}")[:300]}
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if LINUX:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.dup2(NOTHING, 0)  # neither the next jobs nor the way to the trainer
            if theirs != 3:
                os.dup2(theirs, 3)
            os.closerange(4, 256)
            os.write(3, json.dumps(verdict(job, problems)).encode()[:LONGEST_LINE])
        finally:
            os._exit(1)
    os.close(theirs)
    said, ended = b"", None
    began = time.monotonic()
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    while len(said) <= LONGEST_LINE:
        if poll.poll(LOOK_MILLISECONDS):
            part = os.read(ours, LONGEST_LINE)
            said += part
            if not part:
                break
        elif time.monotonic() - began > job["patience"]:
            ended = {"late": job["patience"]}
            break
        elif time.monotonic() - began - seconds_in_line(child) > job["limit"] + GRACE:  # it sleeps
            ended = {"timeout": job["limit"]}
            break
    os.close(ours)
    os.kill(child, signal.SIGKILL)
    status = os.wait4(child, 0)[1]
    if ended is not None:
        return ended
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"timeout": job["limit"]}
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return {"crashed": f"the scorer's process ended without a verdict (status {status})"}


if __name__ == "__main__":
    NOTHING = os.open(os.devnull, os.O_RDWR)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(NOTHING, 1)  # whatever the libraries print
    FILTER = None
    if LINUX:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        FILTER = make_filter()
    if SETUP["mode"] == "landlock":
        landlock.require()
    sys.meta_path.insert(0, NoPlots)
    import reasoning_gym
    import sympy  # noqa: F401

    gc.collect()
    gc.freeze()
    print(json.dumps({"ok": "ready"}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"ok": answer(json.loads(line))}), file=answers, flush=True)
