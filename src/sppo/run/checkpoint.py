"""What a checkpoint holds besides the two model folders; loaded, a run continues to the same bits.

policy/  critic/     model folders that other tools load
learner.pt           optimiser moments and float32 masters, and what credits have measured
state.pt             counters, the position in the data, global generators
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audit.monitors import Monitors
from ..files import readable
from ..learning.learner import Learner
from .curriculum import Uniform


@dataclass
class State:
    """What changes from step to step besides weights and optimisers."""

    step: int = 0
    seconds: float = 0.0
    seconds_evaluating: float = 0.0
    seconds_bootstrap: float = 0.0
    generated_tokens: int = 0
    masked: int = 0
    responses: int = 0
    truncated: int = 0
    overruled: int = 0
    advantage: float = 0.0
    """Sum over steps of the mean advantage."""
    advantage_steps: int = 0
    canary_limit: float | None = None
    before: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, state: State, learner: Learner, curriculum: Uniform, monitors: Monitors, ahead: list[dict[str, Any]]
) -> None:
    """Fill a (not yet named) checkpoint folder; `ahead` says what was sampled of steps to come."""
    learner.save(folder)
    with (folder / "state.pt").open("wb") as file:  # a file object keeps the system's own error: "no space left"
        torch.save(
            {
                "state": asdict(state),
                "curriculum": curriculum.state_dict(),
                "ahead": ahead,
                "monitors": monitors.state_dict(),
                "rng": _rng_state(),
            },
            file,
        )


def load(folder: Path, learner: Learner, curriculum: Uniform, monitors: Monitors) -> tuple[State, list[dict[str, Any]]]:
    """Restore learner (whose models were loaded from the folder already), curriculum and monitors; returns the counters, and what was
    sampled of steps to come. Raises DataError."""
    with readable(f"{folder} cannot be resumed from"):
        saved = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        if "learner" in saved:  # of a version that kept all in one file
            learner.load_state_dict(saved["learner"])
        else:
            learner.load(folder)
        curriculum.load_state_dict(saved["curriculum"])
        if "monitors" in saved:  # not in checkpoints of older versions
            monitors.load_state_dict(saved["monitors"])
        _set_rng_state(saved["rng"])
        state = State(**saved["state"])
        if state.step != int(folder.name.removeprefix("step-")):
            raise ValueError(f"it is of step {state.step}")
        return state, saved.get("ahead", [])


def _rng_state() -> dict[str, Any]:
    """The global generators: sppo draws nothing from them, but a user's reward may."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": (version, list(internal), gauss),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
