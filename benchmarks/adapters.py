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
import json
from typing import Any

import workload

RANK, ALPHA, LR = 16, 32, 1e-4


def adapted(folder: str) -> Any:
    """A float32 policy with a fresh adapter on all linear layers."""
    import peft
    import torch

    from sppo.models.policy import Policy

    policy, _ = Policy.load(folder, dtype="float32", device=torch.device("cpu"), seed=0)
    options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    torch.manual_seed(0)
    peft.get_peft_model(policy.model, options, autocast_adapter_dtype=False)
    return Policy(policy.model, policy.tokenizer)


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
