"""What can be known of a chain problem's difficulty before solving it: `python benchmarks/critic_limit.py RUN`

For a finished run on `chain`: logistic regressions of single verdicts of its last policy on 20,000 training problems, judged on its
held-out problems against the success rates of 64 samples each (as in critic_quality.py), with features that know more and more:

    length      how many operations
    visible     and which operators with which operands: all that lies open in the prompt
    computed    and every sum as it will come up, running value included: who knows these has solved the problem

and, with --critics, of critics that learn from the same verdicts in one pass (names as critic.model, each with a rate: NAME@1e-3).

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from critic_quality import figures, intervals, measured
from sppo.learning.optimizer import MasterAdamW
from sppo.models.critic import Critic
from sppo.rollout.collect import collect
from sppo.run.run import Run
from sppo.tasks.chain import MODULUS
from sppo.types import Task

KINDS = ("length", "visible", "computed")
PART = 2048


def features(task: Task, kind: str) -> Tensor:
    """Counts: of operations, of (operator, operand), of (value, operator, operand)."""
    out = torch.zeros(1 + 3 * MODULUS + 3 * MODULUS**2)
    found = re.match(r"(\d)((?:[-+*]\d)+)\?", task.text)
    assert found, f"{task.id} is no chain problem"
    value = int(found[1])
    for operator, digit in re.findall(r"([-+*])(\d)", found[2]):
        operand = int(digit)
        pair = "+-*".index(operator) * MODULUS + operand
        out[0] += 1
        if kind != "length":
            out[1 + pair] += 1
        if kind == "computed":
            out[1 + 3 * MODULUS + pair * MODULUS + value] += 1
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS
    return out


def regression(x_NF: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and offset, slightly shrunk."""
    weight, offset = torch.zeros(x_NF.size(1), requires_grad=True), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, offset], max_iter=60)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(x_NF @ weight + offset, correct_N) + 2e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), offset.detach()


def fitted(name: str, lr: float, seen: list[tuple[Task, float]], tasks: list[Task]) -> Tensor:
    """V(x) of the tasks, from a critic that has seen every verdict once, 128 at a time."""
    critic, stated = Critic.load(name, dtype="float32", device=torch.device("cpu"), seed=0)
    print(stated, flush=True)
    critic.start_at(sum(c for _, c in seen) / len(seen))
    optimiser = MasterAdamW(critic.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    ids, correct_N = [critic.prompt_ids(t) for t, _ in seen], torch.tensor([c for _, c in seen])
    for part in torch.randperm(len(seen), generator=torch.Generator().manual_seed(0)).split(128):
        binary_cross_entropy_with_logits(
            critic.prompt_logits([ids[i] for i in part.tolist()]), correct_N[part]
        ).backward()
        optimiser.step(lr, 1.0)
    return critic.logits(tasks).sigmoid()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--problems", type=int, default=20_480)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--critics", nargs="*", default=[], metavar="NAME@LR")
    args = parser.parse_args()
    run = Run.resume(args.run)
    c = run.components
    seen: list[tuple[Task, float]] = []
    while len(seen) < args.problems:
        rollouts = collect(
            c.engine, c.policy, c.reward, c.curriculum.sample(PART), c.sampling, seed=(0, "limit", len(seen))
        )
        seen += [(r.task, r.verdict.correct) for r in rollouts if r.verdict and not r.verdict.masked]
        print(f"{len(seen)} training problems", flush=True)
    reward_BN, value_B, tasks = measured(run, args.samples)
    run.close()
    correct_N = torch.tensor([c for _, c in seen])
    result = {"the run's critic": intervals(reward_BN, value_B, figures)}
    for kind in KINDS:
        weight, offset = regression(torch.stack([features(t, kind) for t, _ in seen]), correct_N)
        predicted_B = torch.sigmoid(torch.stack([features(t, kind) for t in tasks]) @ weight + offset)
        result[kind] = intervals(reward_BN, predicted_B, figures)
    for name, _, lr in (text.rpartition("@") for text in args.critics):
        result[name] = intervals(reward_BN, fitted(name, float(lr), seen, tasks), figures)
    shown = ("explained_variance", "ceiling", "share_of_ceiling", "pearson_without_noise", "ece")
    print(json.dumps({name: {k: found[k] for k in shown} for name, found in result.items()}))


if __name__ == "__main__":
    main()
