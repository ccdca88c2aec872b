"""The host's side of one jail: starts it, hands in a program, and reads the zygote's report."""

from __future__ import annotations

import array
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import SandboxUnavailable
from .job import Limits, Result, Status
from .pipes import Pipes

INSIDE = (
    "world.py", "zygote.py", "program.py", "answering.py", "asserts.py", "standins.py", "workfolder.py", "nodes.py", "codec.py", "seccomp.py",
    "landlock.py", "kernel.py", "counter.py",
)  # fmt: skip
SYSTEM_PYTHON = "/usr/bin/python3"
FIRST_UID = 65_000
"""As root, slot k's jail belongs to this user id + k, so that neither limits nor signals are shared with anything."""
GRACE = 3.0
"""Seconds beyond a program's wall time after which the jail itself counts as hung, and is restarted."""
START_LIMIT = 20.0
OUT_OF_MEMORY = 97  # inside/program.py


class Starter:
    """A thread that starts the jails of this process, and lives as long as it.

    The kernel ends a jail with the thread that started it (prctl(2), PR_SET_PDEATHSIG), so none is started by a thread
    that comes and goes.
    """

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # threads do not follow into a child

    def _begin(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], list[str], dict[str, Any]]] = (
            queue.SimpleQueue()
        )
        self._lock, self._running = threading.Lock(), False

    def start(self, command: list[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
        """`subprocess.Popen` in that thread."""
        with self._lock:
            if not self._running:
                self._running = True
                threading.Thread(target=self._serve, name="sppo-jails", daemon=True).start()
        made: Future[subprocess.Popen[bytes]] = Future()
        self._asked.put((made, command, options))
        return made.result()

    def _serve(self) -> None:
        while True:
            made, command, options = self._asked.get()
            try:
                made.set_result(subprocess.Popen(command, **options))
            except BaseException as error:
                made.set_exception(error)


STARTER = Starter()


class Jail:
    """A running zygote. `run` may be called from any thread, by one at a time."""

    def __init__(self, backend: str, slot: int, python: str | None = None) -> None:
        self.backend, self.slot = backend, slot
        self.python = python or (sys.executable if backend == "unsafe-subprocess" else SYSTEM_PYTHON)
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()  # over the control socket's writing side

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the zygote. Raises SandboxUnavailable with the cause and the remedy."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keep = [theirs.fileno()]
        try:
            command, options = self._command(theirs.fileno(), keep)
            with tempfile.TemporaryFile() as errors:
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
                self.process = STARTER.start(command, {"pass_fds": keep, **pipes, **options})
                theirs.close()
                ours.settimeout(START_LIMIT)
                try:
                    hello = ours.recv(64)
                except OSError:
                    hello = b""
                if hello != b"ready":
                    self.process.kill()
                    self.process.wait()
                    errors.seek(0)
                    said = errors.read().decode(errors="replace").strip().splitlines()
                    raise SandboxUnavailable(_with_remedy(said[-1] if said else "it ended without output"))
        except BaseException as error:
            ours.close()
            self.close()
            if isinstance(error, FileNotFoundError):
                raise SandboxUnavailable(_with_remedy(str(error))) from None
            if isinstance(error, PermissionError):
                raise SandboxUnavailable(_with_remedy(f"{self.python} is not for the jail's user")) from None
            raise
        finally:
            for fd in keep[1:]:
                os.close(fd)
            with contextlib.suppress(OSError):
                theirs.close()
        self.control = ours

    def ready(self) -> None:
        """Start the zygote unless it runs. Raises SandboxUnavailable as `start` does."""
        if not self.alive:
            self.close()
            self.start()

    def close(self) -> None:
        """Kill the jail; with its first process everything in it dies."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.control is not None:
            self.control.close()
        if self._folder is not None:
            with contextlib.suppress(OSError, RecursionError):  # what a program left there is not worth a run
                self._folder.cleanup()
        self.process = self.control = self._folder = None

    @property
    def alive(self) -> bool:
        """Whether the zygote still runs."""
        return self.process is not None and self.process.poll() is None

    def _command(self, control: int, keep: list[int]) -> tuple[list[str], dict[str, Any]]:
        source = files("sppo.sandbox") / "inside"
        uid = FIRST_UID + self.slot
        user = {"user": uid, "group": uid, "extra_groups": []} if os.geteuid() == 0 else {}
        if self.backend != "bwrap":
            self._folder = tempfile.TemporaryDirectory(prefix="sppo-sandbox-")
            folder = self._folder.name
            for name in INSIDE:
                (Path(folder) / name).write_bytes((source / name).read_bytes())
            mode = "none"
            if self.backend == "landlock":
                mode = "landlock"
                if user:
                    os.chown(folder, uid, uid)
            first = "world.py" if self.backend == "landlock" else "zygote.py"
            command = [self.python, "-s", "-S", "-B", os.path.join(folder, first), str(control), mode]
            options = {"cwd": folder, "env": _environment(folder), "start_new_session": True}
            return command, options | (user if self.backend == "landlock" else {})
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise FileNotFoundError("bubblewrap (`bwrap`) is not installed")
        if not os.path.exists(self.python):
            raise FileNotFoundError(f"{self.python} does not exist")
        command = [
            bwrap, "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--die-with-parent", "--new-session",
            "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "jail",
            "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin",
        ]  # fmt: skip
        for name in INSIDE:  # by descriptor: the jail's user need not be able to read this package's folder
            fd = os.memfd_create(name)
            os.write(fd, (source / name).read_bytes())
            os.lseek(fd, 0, os.SEEK_SET)
            keep.append(fd)
            command += ["--perms", "0444", "--ro-bind-data", str(fd), f"/opt/sppo/{name}"]
        python = os.path.realpath(self.python)
        if not python.startswith("/usr/"):  # its file and its library, not the folder around them
            prefix = os.path.dirname(os.path.dirname(python))
            for path in (python, *(os.path.join(prefix, name) for name in ("lib", "lib64"))):
                command += ["--ro-bind-try", path, path]
        command += [
            "--proc", "/proc", "--dev", "/dev", "--dir", "/opt/root",
            "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--clearenv",
        ]  # fmt: skip
        for name, value in _environment("/tmp").items():
            command += ["--setenv", name, value]
        command += [python, "-s", "-S", "-B", "/opt/sppo/world.py", str(control), "bwrap"]
        return command, user

    # -- one program -----------------------------------------------------------------------------------------------

    def run(
        self, request: dict[str, Any], limits: Limits, stdin: bytes = b"", peer: socket.socket | None = None
    ) -> Result:
        """Run one program to its end (or its limits) and return what is known. Never raises for what a program does."""
        self.ready()
        assert self.control is not None
        ends: dict[str, tuple[int, int]] = {n: os.pipe() for n in ("request", "channel", "stdin", "stdout", "stderr")}
        theirs = [ends["request"][0], ends["channel"][1], ends["stdin"][0], ends["stdout"][1], ends["stderr"][1]]
        mine = {"request": ends["request"][1], "stdin": ends["stdin"][1]}
        mine |= {name: ends[name][0] for name in ("channel", "stdout", "stderr")}
        handed = [*theirs, *([peer.fileno()] if peer else [])]
        try:
            with self._lock:
                self.control.sendmsg(
                    [json.dumps(asdict(limits)).encode()],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", handed))],
                )
        except OSError as error:
            for fd in mine.values():
                os.close(fd)
            return Result("infra_error", detail=f"the jail is gone: {error}", backend=self.backend)
        finally:
            for fd in theirs:
                os.close(fd)
            if peer:
                peer.close()
        feeds = {"request": json.dumps(request).encode(), "stdin": stdin}
        pipes = Pipes(self.control, mine, feeds, limits.output_bytes)
        report = pipes.pump(time.monotonic() + limits.wall_seconds + GRACE, self.cancel)
        if report is None:
            self.close()
            return Result("infra_error", detail="the jail did not answer and was killed", backend=self.backend)
        if report["stuck"]:  # killed, and not gone: the jail goes with it
            self.close()
        return self._result(report, pipes, limits)

    def cancel(self) -> None:
        """End the running program early (its result says `cancelled`)."""
        with self._lock, contextlib.suppress(OSError):
            if self.control is not None:
                self.control.send(b"stop")

    def _result(self, report: dict[str, Any], pipes: Pipes, limits: Limits) -> Result:
        status: Status = "ok"
        code = number = None
        detail = ""
        if not report["ready"] and report["ended_by"] != "cancelled":  # a timeout too: its own code has not begun
            status, detail = "infra_error", str(report.get("failure", "the program's process could not be set up"))
        elif report["ended_by"] is not None:
            status = report["ended_by"]
        elif not report["ended"]:
            status, detail = "killed", "its namespace was torn down"
        elif os.WIFSIGNALED(report["status"]):
            number = os.WTERMSIG(report["status"])
            status = "timeout" if number == signal.SIGXCPU or report["cpu_seconds"] >= limits.cpu_seconds else "killed"
        else:
            code = os.WEXITSTATUS(report["status"])
            status = "memory" if code == OUT_OF_MEMORY else "exception" if code else "ok"
        if status in ("ok", "cancelled") and pipes.truncated:
            status = "output_limit"
        return Result(
            status,
            bytes(pipes.kept["stdout"]),
            bytes(pipes.kept["stderr"]),
            bytes(pipes.kept["channel"]),
            code,
            number,
            float(report.get("cpu_seconds", 0.0)),
            float(report["seconds"]),
            int(report.get("max_rss_bytes", 0)),
            tuple(sorted(pipes.truncated)),
            detail,
            self.backend,
            int(report["instructions"]) if report.get("instructions", -1) >= 0 else None,
        )


def _environment(home: str) -> dict[str, str]:
    return {
        "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip


def _with_remedy(cause: str) -> str:
    remedy = "see docs/sandbox.md"
    if "not installed" in cause:
        remedy = "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
    elif "source path" in cause or "jail's user" in cause:
        remedy = "name an interpreter outside of a private home with python=…, which everybody may read and run"
    elif "landlock" in cause:
        remedy = "it needs Linux 6.12 or newer with Landlock switched on (lsm=landlock,…)"
    elif "namespace" in cause or "Permission denied" in cause or "Operation not permitted" in cause:
        remedy = (
            "the kernel refuses user namespaces here: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or docker run --security-opt seccomp=unconfined"
        )
    return f"the sandbox cannot start: {cause}; {remedy}, use a remote one (backend=remote,url=…), or name a weaker backend yourself"
