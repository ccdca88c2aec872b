"""Every model family that a user may bring, built small with random weights and trained by the real loop. `make families`

For each: a folder with the model and a character tokenizer, two steps of a run, the same two steps with a stop and a
resume between them, and the saved policy loaded in its own class; then two steps of an adapter, which peft loads onto
that class. A family passes where both runs end in the same bits, what is loaded holds or computes what the policy
does, the text part has moved, and the rest (a vision tower) has not by a bit. Tokens per second are of these toys, 32
sequences at once: they tell a batched path from a slow one, no more. The last line is JSON.
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
from peft import PeftModel

from architectures import TABLE, make
from sppo.recipe.config import Config
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.loop import train
from sppo.run.run import Run

SEQUENCES, TOKENS = 32, 24
SAVED = "checkpoints/step-000002/policy"


def recipe(folder: Path, out: Path, steps: int, rank: int = 0) -> Config:
    """Steps of 16 responses to sums; of an adapter, if it has a rank."""
    return Config.load(None, {
        "policy.model": str(folder), "critic.model": "tiny:hidden=32,layers=1,heads=2", "task.train": "chain:steps=1-2",
        "rollout.prompts": 16, "rollout.max_tokens": 12, "training.lr": 1e-3, "training.critic_lr": 1e-3,
        "training.steps": steps, "evaluation.n": 8, "evaluation.every": 0, "run.checkpoint_every": 1, "run.threads": 1,
        "run.out": str(out), "monitors.action": "off", **({"adapter.rank": rank} if rank else {}),
    })  # fmt: skip


def run(config: Config | None = None, resume: Path | None = None, steps: int = 2) -> Any:
    """What a run was made of, as it has become."""
    job = Run.new(config) if config is not None else Run.resume(resume, steps=steps)
    try:
        train(job)
        return job.components
    finally:
        job.close()


def check(name: str, work: Path) -> dict[str, Any]:
    """The row of a family. Raises whatever fails."""
    folder = work / "model"
    before = make(name, folder)
    components = run(recipe(folder, work / "whole", 2))
    policy, engine = components.policy, components.engine
    run(recipe(folder, work / "broken", 1))
    again = run(resume=work / "broken").policy
    assert again.fingerprint() == policy.fingerprint(), "a resumed run ends in other weights"
    saved = work / "whole" / SAVED
    loaded, report = type(before).from_pretrained(saved, output_loading_info=True, dtype=torch.float32)
    lost = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    assert not lost, f"{lost[0]} is lost in the saved checkpoint"
    names = {n for n, _ in policy.weights()}
    whole = dict(loaded.named_parameters())
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, whole[n])}
    assert moved <= names, "a frozen weight has moved"
    assert len(moved) > len(names) / 2, "most weights have not moved"
    for n, p in whole.items():
        assert torch.equal(p, policy.model.get_parameter(n)), f"{n} is saved as something else"
    if len(names) < len(whole):
        assert (saved / "preprocessor_config.json").exists(), "the processor's files are lost"
    row = {
        "class": type(loaded).__name__, "trained": f"{len(names)} of {len(whole)}",
        "update": f"padded: {policy.scorer.unpacked_why}" if policy.scorer.unpacked_why else "packed",
        "sampling": sampling(engine), "head": head(policy.scorer.head),
        "gap": gap(policy, engine), "tokens_per_s": speed(policy),
    }  # fmt: skip
    assert row["gap"] < 1e-4, f"engine and learner disagree by {row['gap']:.1g} nats"
    check_adapter(type(before), folder, work / "adapter")
    return row


def check_adapter(kind: Any, folder: Path, work: Path) -> None:
    """Train an adapter, and load it with peft. Raises whatever fails."""
    policy = run(recipe(folder, work, 2, rank=4)).policy
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # transformers to peft
        base = kind.from_pretrained(folder, dtype=torch.float32).eval()
        saved = PeftModel.from_pretrained(base, work / SAVED)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        theirs, mine = (model(input_ids=ids, use_cache=False).logits for model in (saved, policy.model))
        with saved.disable_adapter():
            without = saved(input_ids=ids, use_cache=False).logits
    assert torch.allclose(theirs, mine, atol=1e-4), "peft's model of the saved adapter computes something else"
    assert not torch.equal(without, theirs), "the adapter does nothing"


def sampling(engine: Any) -> str:
    """How responses are sampled."""
    if engine.plain is None:
        return "compiled" if engine.compiled else "batched"
    return "plain loop" if engine.plain.cached else "without a cache"


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
            row, seconds = rows[name], time.perf_counter() - began
            print(
                f"{name:28}{row['sampling']:16}{row['head']:13}{row['tokens_per_s']:6} tokens/s {seconds:5.1f} s  {row['update']}",
                flush=True,
            )
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
