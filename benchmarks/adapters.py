"""Sampling through adapters: their product computed beside the matrix's, against matrices into which it was added. `make bench-adapters`

The log-probabilities of given responses, as three ways find them: the learner's pass, the engine's decoding with separate
products (the default), and the engine's decoding of a model whose matrices are W + scale · B A, rounded to their dtype. All
three read the same adapter of rank 16, after some updates of AdamW towards random advantages. Gaps are to the learner, in
nats; a sequence's is the sum of its tokens', the logarithm of its importance ratio where nothing was learned in between.

With --step: one training step with LoRA of rank 16 and the critic as an adapter, against full fine-tuning with a critic of 1M
parameters: the same prompts, dtype and packs of 1,024 tokens, 64 responses of exactly 96 tokens. Each side is a process of
its own that makes one step when told to, in turns, after one step to warm up.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import Any

import workload
from step import Side, serve_sppo

RANK, ALPHA, LR = 16, 32, 1e-4
SIDES: dict[str, dict[str, Any]] = {
    "lora": {"adapter.rank": RANK, "adapter.alpha": ALPHA, "critic.model": "policy", "training.micro_tokens": 1024},
    "full": {"critic.model": "tiny", "training.micro_tokens": 1024},
}
"""What each side's recipe says beside the benchmark's (step.py)."""
TIGHT = {"run.memory": 1}
"""With --tight: so little that freed memory goes back at once, as it does for whoever has no more than a run needs."""


def adapted(folder: str) -> Any:
    """A float32 policy with a fresh adapter on all linear layers."""
    import torch

    from sppo.models.policy import Policy
    from sppo.recipe.sections import AdapterSection

    section = AdapterSection(rank=RANK, alpha=ALPHA)
    return Policy.load(folder, dtype="float32", device=torch.device("cpu"), seed=0, adapter=section)[0]


def updated(policy: Any, prompts: list[list[int]], responses: list[list[int]], updates: int) -> None:
    """Some policy-gradient steps with advantages of ±1."""
    import torch

    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=LR)
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids_BL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BL[b, : len(row)] = torch.tensor(row)
        action_BL[b, len(prompts[b]) : len(row)] = True
    for update in range(updates):
        part = torch.arange(update % 2, len(rows), 2)
        logp_BT = policy.logps(ids_BL[part], action_BL[part], 1.0).logp_BT
        sign_B = torch.tensor([1.0 if (b // 2) % 2 else -1.0 for b in part.tolist()])
        loss = -(sign_B[:, None] * logp_BT).sum() / action_BL[part].sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"update {update + 1}  {float(loss):.4f}", flush=True)


def merged(policy: Any) -> Any:
    """The policy without adapters: W + scale · B A in float32, rounded to the dtype of W. And how much of the adapters'
    products the rounding leaves out, ‖(W' − W) − scale · B A‖ / ‖scale · B A‖ over all layers."""

    from sppo.kernels.low_rank import is_adapted, low_rank
    from sppo.models.policy import Policy

    model = copy.deepcopy(policy.model)
    lost, whole = 0.0, 0.0
    for name, module in list(model.named_modules()):
        if is_adapted(module) and (beside := low_rank(module)):
            base = module.base_layer
            product = (beside.scale * beside.b_NR.float() @ beside.a_RK.float()).detach()
            before = base.weight.data.float()
            base.weight.data = (before + product).to(base.weight.dtype)
            lost += float((base.weight.data.float() - before - product).square().sum())
            whole += float(product.square().sum())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, base)
    return Policy(model, policy.tokenizer), (lost / whole) ** 0.5


def apart(one: list[list[float]], two: list[list[float]]) -> dict[str, float]:
    """What one way finds of each token and of each sequence, less what the other finds; nats."""
    import torch

    rows = [torch.tensor(a) - torch.tensor(b) for a, b in zip(one, two, strict=True)]
    token, sequence = torch.cat(rows), torch.stack([row.sum() for row in rows])
    figures = {
        "token_mean": token.abs().mean(), "token_max": token.abs().max(), "sequence_mean": sequence.abs().mean(),
        "sequence_max": sequence.abs().max(), "largest_ratio": sequence.abs().max().exp(),
    }  # fmt: skip
    return {name: float(f"{float(x):.3g}") for name, x in figures.items()}


def gaps(folder: str, updates: int, count: int, tokens: int) -> dict[str, Any]:
    """The gaps of either way of decoding in both dtypes, and how far the updates moved the policy."""
    import torch

    from sppo.models.weights import cast
    from sppo.rollout.engine import Sampling
    from sppo.rollout.local import LocalEngine

    policy = adapted(folder)
    assert policy.adapters
    prompts = workload.prompts(policy, count)
    drawn = LocalEngine(policy).generate(prompts, list(range(count)), Sampling(tokens, 1.0, count))
    responses = [list(sample.ids) for sample in drawn]
    updated(policy, prompts, responses, updates)
    found: dict[str, Any] = {"tokens": sum(map(len, responses)), "updates": updates}
    for dtype in (torch.float32, torch.bfloat16):
        cast(policy.model, dtype)
        learner = policy.given_logps(prompts, responses)
        engines = {"separate": LocalEngine(policy)}
        whole, lost = merged(policy)
        engines["merged"] = LocalEngine(whole)
        assert all(engine.compiled for engine in engines.values())
        name = str(dtype).removeprefix("torch.")
        found[name] = {way: apart(engine.score(prompts, responses), learner) for way, engine in engines.items()}
        found[name]["merged"]["share_of_the_products_lost"] = float(f"{lost:.3g}")
        with policy.adapters.using(None):
            found[name]["moved by the updates"] = apart(learner, engines["separate"].score(prompts, responses))
        for way, figures in found[name].items():
            print(f"{name:<9} {way:<22} {figures}", flush=True)
    return found


def step(rounds: int, tight: bool) -> dict[str, Any]:
    """Seconds and peak memory of a step, of LoRA against full fine-tuning."""
    environment = {"HF_HUB_OFFLINE": "1", "BENCH_TIGHT": "1" if tight else ""}
    sides = {name: Side(sys.executable, name, environment, __file__) for name in SIDES}
    for side in sides.values():
        side(0)
    print("warm")
    found = workload.interleaved(sides, rounds)
    seconds = {name: [round(t["seconds"], 2) for t in side.told[1:]] for name, side in sides.items()}
    peak = {name: side.told[-1]["peak"] for name, side in sides.items()}
    return {
        "tight": tight,
        "seconds_vs_full": workload.ratios(seconds["lora"], seconds["full"]),
        "peak_vs_full": round(peak["lora"] / peak["full"], 3),
        "step_seconds": seconds,
        "rollout_seconds": {name: [round(t["rollout"], 2) for t in side.told[1:]] for name, side in sides.items()},
        "peak_mib": {name: round(x / 2**20) for name, x in peak.items()},
        "tokens_per_second": {name: [round(x, 1) for x in v] for name, v in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", action="store_true", help="a training step against full fine-tuning")
    parser.add_argument(
        "--tight", action="store_true", help="--step where memory is tight: peaks are of what is needed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of --step")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of a response, at most")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_sppo(SIDES[args.serve] | (TIGHT if os.environ["BENCH_TIGHT"] else {}))
    elif args.step:
        workload.finish(step(args.rounds, args.tight))
    else:
        workload.finish(gaps(workload.model_folder(), args.updates, args.prompts, args.tokens))


if __name__ == "__main__":
    main()
