"""The algorithms, as presets: `objective.algorithm = "grpo"` sets a few keys of a recipe, and nothing else.

Keys that a recipe gives win over its preset. An algorithm is its baseline (where the advantage comes from), its ratio,
its surrogate and what the loss averages over; `samples` is the number per prompt of its paper or reference code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

SPPO: dict[str, dict[str, Any]] = {
    "objective": {
        "ratio": "auto", "baseline": "critic", "baseline_weight": 1.0, "optimal_baseline": False, "scale": "none",
        "surrogate": "clip", "average": "auto", "clip": [0.2, 0.2], "gate_temperature": [1.0, 1.05], "dual_clip": 3.0,
        "value_loss": "cross-entropy", "value_clip": 0.0,
    },
    "rollout": {"samples": 1, "resample": 0, "overlong": 0.0},
}  # fmt: skip


def _like_sppo(
    samples: int = 1, resample: int = 0, overlong: float = 0.0, **objective: Any
) -> dict[str, dict[str, Any]]:
    rollout = {"samples": samples, "resample": resample, "overlong": overlong}
    return {"objective": SPPO["objective"] | objective, "rollout": rollout}


SHORT = 64
"""Up to this many tokens, the exact importance weight of a whole response is used."""
LONG_RATIO: dict[str, Any] = {"ratio": "token"}
"""`objective.ratio = "auto"` for several updates per step and responses longer than SHORT.

The scale of a token ratio does not grow with length, so the clip stays 0.2; before the first update its gradient is the
exact one (docs/evidence.md). Another ratio brings its own keys here (geometric: a far narrower "clip"); a recipe's own
keys win."""
DEFAULT = "sppo"
"""The algorithm of a recipe that names none: SPPO as published (docs/evidence.md compares the others)."""
CHANCES = ("critic", "centred")
"""Baselines that are a chance of success, whose odds `objective.optimal_baseline` can shift."""
GROUP: dict[str, Any] = {"ratio": "token", "baseline": "group", "dual_clip": 0.0}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Sequence-Level PPO, arXiv 2604.08865: Â = R − V(x), one sample per prompt, the whole response's ratio clipped.
    "sppo": SPPO,
    # SPPO with the prompt's baseline of least variance: V(x), its odds shifted by squared scores. docs/algorithm.md
    "sppo-optimal": _like_sppo(optimal_baseline=True),
    # SPPO with V(x) corrected by the critic's mean residual on the step's other problems. docs/algorithm.md
    "sppo-centred": _like_sppo(baseline="centred"),
    # SPPO with a baseline that also reads the scores of the steps written so far. docs/exploration.md
    "sppo-hybrid": _like_sppo(ratio="token", baseline="hybrid"),
    # PPO, arXiv 1707.06347 eq. 7, with a value per token that learns by squared error (eq. 9), GAE (arXiv 1506.02438
    # eq. 16) and whitened advantages.
    "ppo": _like_sppo(
        ratio="token", baseline="token-critic", value_loss="squared", scale="batch", average="tokens", dual_clip=0.0
    ),
    # REINFORCE, Williams 1992, against the mean of the batch's other rewards.
    "reinforce": _like_sppo(ratio="sequence", baseline="batch", surrogate="plain", dual_clip=0.0),
    # REINFORCE leave-one-out, arXiv 2402.14740 eq. 6: the prompt's other samples, without a ratio or a clip.
    "rloo": _like_sppo(samples=4, ratio="sequence", baseline="others", surrogate="plain", dual_clip=0.0),
    # ReMax, arXiv 2310.10505 algorithm 2: against the reward of the greedy response.
    "remax": _like_sppo(ratio="sequence", baseline="greedy", surrogate="plain", dual_clip=0.0),
    # GRPO, arXiv 2402.03300 eq. 3: group mean and deviation, token ratios, the mean over responses of their means.
    "grpo": _like_sppo(samples=8, **GROUP, scale="group", average="responses"),
    # Dr. GRPO, arXiv 2503.20783 §3.2: without the division by deviation and by length.
    "dr-grpo": _like_sppo(samples=8, **GROUP, average="constant"),
    # GSPO, arXiv 2507.18071 eq. 5 and 7, with the clip of its section 5.1.
    "gspo": _like_sppo(samples=8, **GROUP | {"ratio": "geometric"}, scale="group", clip=[3e-4, 4e-4]),
    # GSPO-token, arXiv 2507.18071 eq. 13 and 14: the same ratio and clip, but each token may have its own advantage.
    # All tokens of a response share one here, as in gspo; with objective.baseline = "hybrid" they do not.
    "gspo-token": _like_sppo(
        samples=8, **GROUP | {"ratio": "geometric-token"}, scale="group", average="responses", clip=[3e-4, 4e-4]
    ),
    # GMPO, arXiv 2507.20673: the geometric mean of a response's token ratios, each clipped to [e^-0.4, e^0.4].
    "gmpo": _like_sppo(
        samples=8, **GROUP, scale="group", surrogate="gmpo", average="responses",
        clip=[-math.expm1(-0.4), math.expm1(0.4)],
    ),
    # SAPO, arXiv 2511.20347: a sigmoid gate on each token's ratio in place of the clip.
    "sapo": _like_sppo(samples=8, **GROUP, scale="group", surrogate="sapo", average="responses"),
    # CISPO, arXiv 2506.13585 eq. 4 and 5: the ratio's weight is clipped (up to 5) and detached; every token keeps its
    # gradient.
    "cispo": _like_sppo(samples=8, **GROUP, scale="group", surrogate="cispo", average="tokens", clip=[1.0, 4.0]),
    # DAPO, arXiv 2503.14476 eq. 8 to 13: clip-higher, the mean over tokens, groups of equal scores sampled again, and a
    # penalty on the last fifth of a response's tokens (4,096 of 20,480 in the paper).
    "dapo": _like_sppo(
        samples=8, resample=3, overlong=0.2, **GROUP, scale="group", average="tokens", clip=[0.2, 0.28]
    ),
}  # fmt: skip


def preset(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A recipe's tree with the values of an algorithm's preset for keys that it leaves out."""
    out = dict(tree)
    for section, values in PRESETS[name].items():
        given = tree.get(section, {})
        if isinstance(given, Mapping):  # anything else is refused by validation
            out[section] = {**copy.deepcopy(values), **given}
    return out


def with_algorithm(tree: Mapping[str, Any], name: str, samples: int | None = None) -> dict[str, Any]:
    """A recipe's tree as another algorithm runs it, with the same number of responses per step.

    Keys in which the two presets differ are removed; those in which they agree are the recipe's own choice and stay (a
    clip, say). A recipe of that very algorithm stays as it is. `samples` per prompt replaces the preset's number.
    ReMax's greedy responses count.
    """
    out = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    objective, rollout = out.setdefault("objective", {}), out.setdefault("rollout", {})
    if not isinstance(objective, dict) or not isinstance(rollout, dict):
        return dict(tree)  # refused by validation
    present = objective.get("algorithm", DEFAULT)
    before = PRESETS.get(present, SPPO) if isinstance(present, str) else SPPO
    after = PRESETS[name]
    if after is before:
        return dict(tree)
    given = rollout.get("prompts"), rollout.get("samples") or before["rollout"]["samples"]
    for section, values in before.items():
        for key in values:
            if values[key] != after[section][key]:
                out[section].pop(key, None)
    kept = rollout.get("samples", after["rollout"]["samples"])
    if all(isinstance(x, int) for x in (*given, kept)):
        responses = given[0] * (given[1] + _greedy(before))
        rollout["prompts"] = max(1, responses // ((samples or kept) + _greedy(after)))
    if after["objective"]["baseline"] != "token-critic":
        objective.pop("value_loss", None)
        objective.pop("value_clip", None)
    if after["objective"]["baseline"] not in CHANCES:
        objective.pop("optimal_baseline", None)
    objective["algorithm"] = name
    return out


def _greedy(algorithm: Mapping[str, Any]) -> int:
    """Responses per prompt that are sampled but not trained on."""
    return int(algorithm["objective"]["baseline"] == "greedy")
