"""The host's ends of one program's pipes: fed and drained in one loop until the zygote reports."""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

CHUNK, PIPE = 1 << 16, 1 << 20
"""Bytes of one read or write; bytes that a pipe holds at most."""


class Pipes:
    """`kept`: what the program wrote, up to `output_bytes` per pipe; `truncated`: the pipes to which it wrote more."""

    def __init__(
        self, control: socket.socket, fds: Mapping[str, int], feeds: Mapping[str, bytes], output_bytes: int
    ) -> None:
        """`fds`: our end of each pipe, closed by `pump`; those of `feeds` are written to, the others are read."""
        self.control, self.fds, self.output_bytes = control, dict(fds), output_bytes
        self.left = {name: memoryview(data) for name, data in feeds.items()}
        self.kept = {name: bytearray() for name in fds if name not in feeds}
        self.truncated: set[str] = set()
        self.selector = selectors.DefaultSelector()

    def pump(self, deadline: float, cancel: Callable[[], None]) -> dict[str, Any] | None:
        """The zygote's report, or None where it gives none until `deadline`. Calls `cancel` once when output is
        truncated.

        After the report it takes what the pipes still hold, without waiting for their end.
        """
        report: dict[str, Any] | None = None
        flooded = False
        with self.selector:
            self._register()
            while report is None and time.monotonic() < deadline:
                if self.truncated and not flooded:  # nothing that comes after can make it right: end it
                    flooded = True
                    cancel()
                for key, _ in self.selector.select(max(deadline - time.monotonic(), 0)):
                    if key.data == "control":
                        report = self._report()
                    elif key.data in self.left:
                        self._feed(key.data)
                    else:
                        self._drain(key.data)
            for name in [n for n in self.fds if n in self.kept]:
                for _ in range(1 + PIPE // CHUNK):  # its writers are dead
                    if name not in self.fds or not self._drain(name):
                        break
            for fd in self.fds.values():
                os.close(fd)
        return report or None

    def _register(self) -> None:
        for name, fd in self.fds.items():
            os.set_blocking(fd, False)
            self.selector.register(fd, selectors.EVENT_WRITE if name in self.left else selectors.EVENT_READ, name)
        self.selector.register(self.control, selectors.EVENT_READ, "control")
        for name in [n for n, data in self.left.items() if not data]:
            self._close(name)

    def _report(self) -> dict[str, Any]:
        try:
            said = self.control.recv(1 << 16)
            found: dict[str, Any] = json.loads(said) if said else {}
        except (OSError, ValueError):
            return {}
        return found

    def _feed(self, name: str) -> None:
        try:
            self.left[name] = self.left[name][os.write(self.fds[name], self.left[name][:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.left[name] = memoryview(b"")
        if not self.left[name]:
            self._close(name)

    def _drain(self, name: str) -> bool:
        """Whether something was read."""
        try:
            data = os.read(self.fds[name], CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close(name)
            return False
        room = self.output_bytes - len(self.kept[name])
        if room < len(data):
            self.truncated.add(name)
        self.kept[name] += data[: max(room, 0)]
        return True

    def _close(self, name: str) -> None:
        fd = self.fds.pop(name)
        self.selector.unregister(fd)
        os.close(fd)
