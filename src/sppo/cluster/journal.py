"""What was sampled, on disk before it is used: a crash costs no more than what was in flight.

A chunk is found again by what decided it: the weights, the prompts, the seeds, and how it was sampled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_atomic
from ..rollout.engine import Sample, Sampling


class Journal:
    """Chunks of samples in a folder, by the version of the weights that wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, version: int, key: str) -> list[Sample] | None:
        """A chunk that was sampled before; None where it was not, or its file is cut off."""
        try:
            rows = json.loads((self._place(version) / f"{key}.json").read_text())
            return [Sample(**row) for row in rows]
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, version: int, key: str, samples: Sequence[Sample]) -> None:
        """Write a chunk down."""
        place = self._place(version)
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / f"{key}.json", json.dumps([asdict(s) for s in samples]))

    def copy(self, version: int, folder: Path) -> None:
        """Put all chunks of a version into another journal's folder."""
        if self._place(version).is_dir():
            shutil.copytree(self._place(version), Journal(folder)._place(version), dirs_exist_ok=True)

    def forget(self, before: int) -> None:
        """Remove what weights before a version wrote."""
        if not self.folder.is_dir():
            return
        for place in self.folder.iterdir():
            if place.name.isdigit() and int(place.name) < before:
                shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Remove all of it: the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, version: int) -> Path:
        return self.folder / f"{version:06d}"


def key(
    fingerprint: str,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    limits: Sequence[int] | None,
) -> str:
    """What decides a chunk, as a name."""
    whole: list[Any] = [fingerprint, asdict(sampling), [list(p) for p in prompts], list(seeds), limits and list(limits)]
    return hashlib.blake2b(json.dumps(whole).encode(), digest_size=20).hexdigest()
