"""`audit.jsonl`: one line a step, each holding the hash of the line before it, so that a changed, missing or reordered
line (or rollouts file) breaks the chain from there on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

GENESIS = "0" * 64


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AuditChain:
    """Appends to, or truncates, one run's chain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.head = json.loads(lines[-1])["sha256"] if lines else GENESIS

    def append(self, entry: dict[str, Any]) -> None:
        """Add a step: `entry` plus the hash of what came before, under one hash; on disk before this returns."""
        body = {**entry, "previous": self.head}
        self.head = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.path.open("a") as file:
            file.write(json.dumps({**body, "sha256": self.head}) + "\n")
            file.flush()
            os.fsync(file.fileno())
