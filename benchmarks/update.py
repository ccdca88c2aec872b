"""Forward and backward of a policy update against the ordinary way: full logits and cross-entropy. `make bench-update`

sppo        packed sequences, the head and log-softmax in chunks at response positions, SPPO's loss; micro-batches of 1,024 tokens,
            as in recipes/smollm2-arithmetic.toml
ordinary    padded batches of eight in the order given, logits of every position, transformers' own cross-entropy on the responses

The same 16 sequences, prompts of 40 to 240 tokens and responses as long as SmolLM2 wrote them under a limit of 256 (`mixed`), and
16 of 96 + 96 tokens, where there is no padding to save and both take all at once (`equal`). Every measurement is a process of
its own, so that its peak memory is its own, and they take turns. On a GPU four times as many sequences, and packs of 16,384 tokens (the
default): fewer would leave it waiting. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import workload

LENGTHS = (3, 8, 9, 14, 21, 28, 35, 37, 39, 43, 47, 59, 67, 118, 190, 256)
"""Response lengths of one run of `make bench-rollout`: every fourth of the 64, in order."""
KINDS = {"mixed": (8, 1024), "equal": (16, 16384)}
ON_GPU = {"mixed": (8, 16384), "equal": (64, 16384)}
"""Sequences a padded batch, and tokens a packed one."""


def batch(policy: Any, kind: str) -> tuple[list[list[int]], list[int]]:
    """Whole sequences, and how long their prompts are."""
    count = 64 if policy.device.type == "cuda" else 16
    prompts = workload.prompts(policy, count)
    if kind == "equal":
        prompts = [(p * 3)[:96] for p in prompts]
    order = [(7 * i) % 16 for i in range(count)]  # as sampling leaves them: long beside short
    lengths = [96 if kind == "equal" else LENGTHS[order[i]] for i in range(count)]
    rows = [
        [*p, *[(31 * i + 7 * t) % 40000 for t in range(n)]]
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return rows, [len(p) for p in prompts]


def sppo_pass(policy: Any, rows: list[list[int]], prompt_lens: list[int], budget: int) -> float:
    """One update's forward and backward passes; seconds."""
    import torch

    from sppo.learning.batch import micro_batches
    from sppo.objective.ratio import log_ratio
    from sppo.objective.surrogate import normalised_sum, surrogate

    width = max(map(len, rows))
    ids_BL = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    prompt_B, length_B = torch.tensor(prompt_lens), torch.tensor([len(r) for r in rows])
    column_L = torch.arange(width)
    action_BL = (column_L >= prompt_B[:, None]) & (column_L < length_B[:, None])
    began = time.perf_counter()
    for part in micro_batches(torch.arange(len(rows)), length_B, budget, policy.packs):
        scored = policy.logps(ids_BL[part], action_BL[part], 1.0)
        log_r = log_ratio(scored.logp_BT, scored.logp_BT.detach(), scored.mask_BT, "sequence", 0.5)
        value, _ = surrogate(log_r, torch.ones(len(part), device=log_r.device), (0.2, 0.2), 3.0)
        (-normalised_sum(value, torch.ones_like(log_r, dtype=torch.bool), len(rows))).backward()
    return workload.since(began)


def ordinary_pass(model: Any, rows: list[list[int]], prompt_lens: list[int], size: int) -> float:
    """The same tokens through `model(labels=…)`."""
    import torch

    began = time.perf_counter()
    for start in range(0, len(rows), size):
        part, lens = rows[start : start + size], prompt_lens[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in part], device=model.device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in part], device=model.device)
        labels = torch.tensor(
            [[-100] * n + r[n:] + [-100] * (width - len(r)) for r, n in zip(part, lens, strict=True)],
            device=model.device,
        )
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return workload.since(began)


def measure(side: str, kind: str) -> dict[str, float]:
    """Seconds of the second pass, and the peak memory above the loaded model with its gradients."""
    import torch

    from sppo.memory import keep_memory
    from sppo.models.loading import pick_device
    from sppo.models.policy import Policy

    keep_memory()
    policy, _ = Policy.load(workload.model_folder(), dtype="auto", device=pick_device(), seed=0)
    rows, prompt_lens = batch(policy, kind)
    size, budget = (ON_GPU if policy.device.type == "cuda" else KINDS)[kind]
    if side == "ordinary":
        policy.model.set_attn_implementation("sdpa")
        run = lambda: ordinary_pass(policy.model, rows, prompt_lens, size)  # noqa: E731
    else:
        run = lambda: sppo_pass(policy, rows, prompt_lens, budget)  # noqa: E731
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = workload.peak_bytes()
    run()
    seconds = run()
    after = workload.peak_bytes()
    tokens = sum(map(len, rows))
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": after - before, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for kind in KINDS:
            for side in ("sppo", "ordinary") if turn % 2 == 0 else ("ordinary", "sppo"):
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", side, kind], stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                runs.setdefault((side, kind), []).append(found)
                print(
                    f"{kind:<6} {side:<9} {found['tokens_per_second']:8.0f} tokens/s   {found['peak_bytes'] / 2**20:8.0f} MiB",
                    flush=True,
                )
    speed, memory = {}, {}
    for kind in KINDS:
        ours, theirs = runs["sppo", kind], runs["ordinary", kind]
        speed[kind] = workload.ratios([r["tokens_per_second"] for r in ours], [r["tokens_per_second"] for r in theirs])
        memory[kind] = round(
            statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in zip(ours, theirs, strict=True)), 3
        )
    workload.finish(
        {
            "ratio_vs_full_logits": speed["mixed"],
            "peak_memory_ratio": memory["mixed"],
            "ratio_equal_lengths": speed["equal"],
            "peak_memory_ratio_equal_lengths": memory["equal"],
            "tokens_per_second": {" ".join(k): [round(r["tokens_per_second"], 1) for r in v] for k, v in runs.items()},
        }
    )


if __name__ == "__main__":
    main()
