"""What makes a run that does not fit need less memory: changes of the recipe, planned anew, the cheapest first.

A change is cheap if it leaves what is learnt alone and costs little time. Each is tried by itself. Those that make the run fit come
first; then those that save most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from ..errors import RecipeError
from ..recipe.config import Config
from .plan import LEAST, Plan

SEQUENCES = 8
"""The smallest `rollout.batch` that is proposed."""
NOTABLE = 0.02
"""Changes that save less than this share of the need are not named."""


@dataclass(frozen=True)
class Change:
    """Recipe keys to set, and what that costs."""

    keys: Mapping[str, Any]
    cost: str

    def __str__(self) -> str:
        lines = [tomli_w.dumps({key.rpartition(".")[2]: value}).strip() for key, value in self.keys.items()]
        return ", ".join(f"{key.rpartition('.')[0]}.{line}" for key, line in zip(self.keys, lines, strict=True))


@dataclass(frozen=True)
class Remedy:
    """A change, the bytes that it saves, and whether the run then fits."""

    change: Change
    saved: int
    fits: bool


def remedies(config: Config, planned: Callable[[Config], Plan], most: int = 3) -> tuple[list[Remedy], Plan]:
    """Up to `most` changes, and the plan with all of them.

    Args:
        config: a recipe that does not fit.
        planned: the plan of a recipe; raises RecipeError for one that cannot be obeyed.
    """
    before = planned(config)
    found: list[Remedy] = []
    for change in _changes(config, before, planned):
        after = _tried(config, [change], planned)
        saved = before.total - after.total if after else 0
        if after and saved > NOTABLE * before.total:
            found.append(Remedy(change, saved, after.fits))
    chosen = sorted(found, key=lambda r: 0 if r.fits else -r.saved)
    chosen = [r for r in chosen if r.fits][:most] or _apart(chosen)[:most]
    return chosen, _tried(config, [r.change for r in chosen], planned) or before


def _changes(config: Config, before: Plan, planned: Callable[[Config], Plan]) -> Iterator[Change]:
    """The changes that could be made, the cheapest first."""
    t, adapter = config.training, config.adapter
    yield from _halved(config, "rollout.batch", config.rollout.batch, SEQUENCES, "slower sampling", planned)
    yield from _halved(config, "training.micro_tokens", before.micro_tokens, LEAST, "slower updates", planned)
    if config.critic_reads == "prompt" and adapter is not None:
        yield Change({"critic.model": "policy"}, "the critic is an adapter on the policy's base")
    if t.optimizer == "adamw":
        yield Change({"training.optimizer": "adamw-8bit"}, "moments are rounded to eight bits")
    if not t.checkpoint_activations:
        yield Change({"training.checkpoint_activations": True}, "one more forward pass per update")
    if before.on_gpu and not t.offload:
        yield Change({"training.offload": True}, "each step moves masters and moments over the bus")
    if adapter is None:
        yield Change({"adapter.rank": 16}, "low-rank matrices are trained instead of all weights")
    if not config.policy.quantize:
        also = {} if adapter is not None else {"adapter.rank": 16}
        yield Change(also | {"policy.quantize": "nf4"}, "the base is rounded to four bits, and slower")


def _halved(
    config: Config, key: str, now: int, least: int, cost: str, planned: Callable[[Config], Plan]
) -> Iterator[Change]:
    """The mildest halving of a number that makes the run fit, else the strongest."""
    while now // 2 >= least:
        now //= 2
        change = Change({key: now}, cost)
        after = _tried(config, [change], planned)
        if (after is not None and after.fits) or now // 2 < least:
            yield change
            return


def _apart(found: list[Remedy]) -> list[Remedy]:
    """Without those that a stronger one contains."""
    return [r for i, r in enumerate(found) if not any(r.change.keys.items() <= s.change.keys.items() for s in found[:i])]


def _tried(config: Config, changes: list[Change], planned: Callable[[Config], Plan]) -> Plan | None:
    """The plan with these changes; None where the recipe cannot be obeyed with them."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for change in changes:
        for key, value in change.keys.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
    try:
        return planned(Config.validated(tree, "the changed recipe"))
    except RecipeError:
        return None
