"""Identifies a verifier by a hash of its code, so that a later replay can tell whether it is still the same."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..rewards.base import Reward
from ..rewards.combine import MixedReward
from ..rewards.steps import StepReward
from ..rewards.user_reward import CallableReward

ROOMS = ("rewards", "sandbox")
"""Packages here whose code decides verdicts."""


def verifier_sha256(reward: Reward) -> str:
    """The hash of every source file of this package's rewards and sandbox, and of the file of a user's own reward or
    checker.

    Libraries (parsers, models) are left out. A reward typed into an interpreter has no file, so only its name counts.
    One that is judged elsewhere states what was found there.
    """
    if isinstance(stated := getattr(reward, "verifier_sha256", None), str):
        return stated
    ours = Path(__file__).parent.parent
    files = {p for room in ROOMS for p in (ours / room).rglob("*.py")}
    names = []
    for found in _parts(reward):
        part = getattr(found, "func", found)  # what functools.partial holds
        names.append(getattr(part, "__qualname__", type(part).__qualname__))
        where = part if inspect.isroutine(part) or inspect.isclass(part) else type(part)
        try:
            files.add(Path(inspect.getfile(where)))
        except (TypeError, OSError):
            continue
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: (not p.is_relative_to(ours), p.name, str(p))):
        name = str(path.relative_to(ours)) if path.is_relative_to(ours) else path.name
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    digest.update("\0".join(names).encode())
    return digest.hexdigest()


def _parts(reward: Any) -> Iterator[Any]:
    """The objects that judge, whatever wraps them."""
    if isinstance(reward, MixedReward):
        for part in reward.parts:
            yield from _parts(part.reward)
    elif isinstance(reward, CallableReward):
        yield reward.function
    elif isinstance(reward, StepReward) and reward.checker is not None:
        yield reward.checker
    else:
        yield getattr(reward, "inner", reward)
