"""Every model family that a user may bring, built small with random weights and trained by the real loop. `make families`

For each: a folder with the model and a character tokenizer, two steps of a run, the same two steps with a stop and a
resume between them, and the saved policy loaded in its own class. A family passes where both runs end in the same bits,
the loaded model computes what the policy does, all of its text part has moved, and the rest (a vision tower) has not by
a bit. Tokens per second are of these toys, 32 sequences at once: they tell a batched path from a slow one, no more.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from architectures import TABLE, make
from sppo.recipe.config import Config
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.loop import train
from sppo.run.run import Run

SEQUENCES, TOKENS = 32, 24


def recipe(folder: Path, out: Path, steps: int) -> Config:
    """Two steps of 16 responses to sums."""
    return Config.load(None, {
        "policy.model": str(folder), "critic.model": "tiny:hidden=32,layers=1,heads=2", "task.train": "chain:steps=1-2",
        "rollout.prompts": 16, "rollout.max_tokens": 12, "training.lr": 1e-3, "training.critic_lr": 1e-3,
        "training.steps": steps, "evaluation.n": 8, "evaluation.every": 0, "run.checkpoint_every": 1, "run.threads": 1,
        "run.out": str(out), "monitors.action": "off",
    })  # fmt: skip


def run(config: Config | None = None, resume: Path | None = None, steps: int = 2) -> tuple[Any, str]:
    """The policy as it is trained, and the SHA-256 of its weights."""
    job = Run.new(config) if config is not None else Run.resume(resume, steps=steps)
    try:
        train(job)
        return job.components, job.components.policy.sha256()
    finally:
        job.close()


def check(name: str, work: Path) -> dict[str, Any]:
    """The row of a family. Raises whatever fails."""
    folder = work / "model"
    before = make(name, folder)
    components, sha = run(recipe(folder, work / "whole", 2))
    policy, engine = components.policy, components.engine
    run(recipe(folder, work / "broken", 1))
    _, again = run(resume=work / "broken")
    assert again == sha, "a resumed run ends in other weights"
    saved = work / "whole" / "checkpoints" / "step-000002" / "policy"
    loaded, report = type(before).from_pretrained(saved, output_loading_info=True, dtype=torch.float32)
    lost = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    assert not lost, f"{lost[0]} is lost in the saved checkpoint"
    moved = {
        n: not torch.equal(p, q)
        for (n, p), (_, q) in zip(before.named_parameters(), loaded.named_parameters(), strict=True)
    }
    trained = {n for n, _ in policy.weights()}
    assert not [n for n in moved if moved[n] and n not in trained], "a frozen weight has moved"
    assert sum(moved[n] for n in trained) > len(trained) / 2, "most weights have not moved"
    for n, p in loaded.named_parameters():
        assert torch.equal(p, policy.model.get_parameter(n)), f"{n} is saved as something else"
    if len(trained) < len(moved):
        assert (saved / "preprocessor_config.json").exists(), "the processor's files are lost"
    return {
        "class": type(loaded).__name__, "trained": f"{len(trained)} of {len(moved)}",
        "update": "packed" if policy.packs else f"padded: {policy.scorer.unpacked_why}",
        "sampling": engine.stated.removeprefix("engine local: ") or ("compiled" if engine.compiled else "batched"),
        "head": head(policy.scorer.head),
        "gap": gap(policy, engine), "tokens_per_s": speed(policy),
    }  # fmt: skip


def head(found: Any) -> str:
    """How log-probabilities are computed of a hidden state."""
    if not found.direct:
        return "whole logits"
    return "capped" if found.cap else "direct" if found.scale == 1 else "scaled"


def gap(policy: Any, engine: Any) -> float:
    """The largest difference of a log-probability, in nats, between what sampled a response and what learns from it."""
    prompts = [policy.tokenizer(f"{n}+{n}=")["input_ids"] for n in range(5, 12)]
    samples = engine.generate(prompts, range(len(prompts)), Sampling(TOKENS))
    theirs = policy.given_logps(prompts, [s.ids for s in samples])
    return max(abs(a - b) for s, row in zip(samples, theirs, strict=True) for a, b in zip(s.logps, row, strict=True))


def speed(policy: Any) -> int:
    """Sampled tokens per second, of prompts of several lengths."""
    prompts = [policy.tokenizer("+".join(map(str, range(1 + n % 8))) + "=")["input_ids"] for n in range(SEQUENCES)]
    engine = LocalEngine(policy)
    engine.generate(prompts[:4], range(4), Sampling(4))
    began = time.perf_counter()
    samples = engine.generate(prompts, range(len(prompts)), Sampling(TOKENS))
    return round(sum(len(s.ids) for s in samples) / (time.perf_counter() - began))


def main() -> None:
    """Print a row for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families by name, as the table says")
    parser.add_argument("--trace", action="store_true", help="the whole traceback of what fails")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = args.only or list(TABLE)
    if unknown := [name for name in names if name not in TABLE]:
        sys.exit(f"no family {unknown[0]!r}; there are {', '.join(TABLE)}")
    print(json.dumps(report(names, trace=args.trace)))


def report(names: list[str], trace: bool = False) -> dict[str, Any]:
    """Check families, a line for each; returns what the last line says."""
    rows, failed = {}, []
    for name in names:
        work, began = Path(tempfile.mkdtemp()), time.perf_counter()
        try:
            rows[name] = check(name, work)
            print(f"{name:28} {json.dumps(rows[name])} {time.perf_counter() - began:.1f} s", flush=True)
        except Exception as error:
            failed.append(name)
            print(f"{name:28} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            if trace:
                traceback.print_exc()
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {"families": len(names), "failed": failed, "rows": rows}


if __name__ == "__main__":
    main()
