"""Versions that must be the same in every process of a run. Nothing is imported to find them: a verifier needs no torch."""

from __future__ import annotations

import sys
from importlib import metadata

from .. import __version__
from ..errors import UserError


def same_versions(name: str, theirs: dict[str, str]) -> None:
    """Raises UserError where an actor runs another version of what decides its numbers."""
    for package, own in versions().items():
        if theirs.get(package) != own:
            raise UserError(
                f"{name} runs {package} {theirs.get(package)}, and this process {own}: install the same on every node"
            )


def versions() -> dict[str, str]:
    """What decides the numbers of a process."""
    libraries = {package: metadata.version(package) for package in ("torch", "transformers")}
    return {"sppo": __version__, **libraries, "Python": ".".join(map(str, sys.version_info[:2]))}
