"""What makes a run that does not fit need less memory: changes of the recipe, planned anew, the cheapest first.

A change is cheap if it leaves what is learnt alone and costs little time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from ..errors import RecipeError
from ..recipe.config import Config
from .plan import Plan
from .planning import LEAST

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
    """Up to `most` changes, and the plan with them.

    Each makes the run fit by itself (the cheapest first; the plan is with the first one). Where none does, they belong together: one
    after the other saves most of what the ones before it leave.

    Args:
        config: a recipe that does not fit.
        planned: the plan of a recipe; raises RecipeError for one that cannot be obeyed.
    """
    tried = _tried(config, planned)
    enough = [remedy for remedy, _, after in tried if after.fits]
    if enough:
        return enough[:most], next(after for _, _, after in tried if after.fits)
    chosen: list[Remedy] = []
    now = planned(config)
    while tried and not now.fits and len(chosen) < most:
        fitting = [found for found in tried if found[2].fits]
        remedy, config, now = fitting[0] if fitting else max(tried, key=lambda found: found[0].saved)
        chosen.append(remedy)
        tried = _tried(config, planned)
    return chosen, now


def _tried(config: Config, planned: Callable[[Config], Plan]) -> list[tuple[Remedy, Config, Plan]]:
    """Each change that could be made and saves something worth naming, the cheapest first, with what it leads to."""
    before, found = planned(config), []
    for change in _changes(config, before, planned):
        if (after := _with(config, change, planned)) is None:
            continue
        saved = before.total - after[1].total
        if saved > NOTABLE * before.total:
            found.append((Remedy(change, saved, after[1].fits), *after))
    return found


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
        after = _with(config, change, planned)
        if (after is not None and after[1].fits) or now // 2 < least:
            yield change
            return


def _with(config: Config, change: Change, planned: Callable[[Config], Plan]) -> tuple[Config, Plan] | None:
    """The recipe with a change, and its plan; None where it cannot be obeyed."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in change.keys.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    try:
        changed = Config.validated(tree, "the changed recipe")
        return changed, planned(changed)
    except RecipeError:
        return None
