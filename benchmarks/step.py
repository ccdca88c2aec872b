"""One training step against TRL's GRPOTrainer: 64 responses of exactly 96 tokens, SmolLM2-135M. `make bench-step`

sppo    64 prompts, one response each; a critic of 1M parameters; one optimiser step
TRL     8 prompts, 8 responses each (its groups); one optimiser step, per-device batches of 8; no KL, no old-policy pass

Both with the same dtype, threads and prompts of 48 tokens, a reward that costs nothing, and EOS out of reach so that the work is
the same. Each side is a process of its own that makes one step when told to, in turns, after one step to warm up. TRL runs in
an environment of its own (`make trl-env`). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import workload

TRL_PYTHON = ".venv-trl/bin/python"
RESPONSES, TOKENS, PROMPT = 64, 96, 48
WORDS = [
    "the",
    "sum",
    "of",
    "one",
    "and",
    "two",
    "is",
    "three",
    "but",
    "what",
    "is",
    "four",
    "plus",
    "five",
    "minus",
    "six",
    "times",
    "seven",
    "and",
    "eight",
]


def texts(count: int) -> list[str]:
    """Prompts of 48 tokens: common words, one token each."""
    return [" ".join(WORDS[(i * 7 + 3 * k) % len(WORDS)] for k in range(PROMPT)) for i in range(count)]


def serve_sppo(changes: dict[str, Any]) -> None:
    """Our side: a run whose loop waits for a word before each step; `changes` to its recipe."""
    import torch

    from sppo.learning.batch import pack
    from sppo.memory import give_back, keep_memory
    from sppo.recipe.config import Config
    from sppo.rewards.loading import load_reward
    from sppo.rollout.collect import collect
    from sppo.run.build import Parts, make_learner
    from sppo.run.run import Run

    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data.jsonl"
        with open(data, "w") as file:
            file.writelines(json.dumps({"prompt": t, "answer": "3"}) + "\n" for t in texts(RESPONSES + 8))
        config = Config.load(None, {
            "policy.model": workload.model_folder(), "policy.chat_template": "off", "critic.model": "tiny:hidden=128,layers=3,heads=4",
            "task.train": data, "rollout.prompts": RESPONSES, "rollout.batch": RESPONSES, "rollout.max_tokens": TOKENS,
            "training.lr": 1e-6, "training.minibatches": 1, "training.micro_tokens": 16384 if torch.cuda.is_available() else 2048,
            "evaluation.n": 1, "run.out": f"{folder}/run",
        } | changes)  # fmt: skip
        run = Run.new(config, parts=Parts(reward=load_reward("workload:digits")))
        c = run.components
        c.policy.eos_ids = [c.policy.model.config.vocab_size - 1]  # an id that is never likely
        learner = make_learner(c, None)
        c.critic.start_at(0.5)
        print("{}", flush=True)
        for step, _ in enumerate(sys.stdin):
            began = time.perf_counter()
            rollouts = collect(
                c.engine,
                c.policy,
                c.reward,
                c.curriculum.sample(RESPONSES),
                c.sampling,
                seed=(1, "train", step),
                truncated="penalise",
            )
            if c.tight:  # as run/sample.py does
                give_back()
            half = time.perf_counter()
            batch = pack(rollouts, c.policy.pad_id)
            advantage_B = learner.advantage(batch)[0]
            advantage_B += torch.linspace(-1, 1, len(batch))  # so that no gradient is 0
            learner.update(batch, advantage_B, step)
            run.sync(step + 1)
            told = {
                "seconds": time.perf_counter() - began,
                "rollout": half - began,
                "tokens": int(batch.response_len_B.sum()),
                "peak": workload.peak_bytes(),
            }
            print(json.dumps(told), flush=True)
        run.close()


def serve_trl() -> None:
    """Their side: GRPOTrainer with a callback that waits before each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                print("{}", flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told = {
                "seconds": time.perf_counter() - self.began,
                "tokens": RESPONSES * TOKENS,
                "peak": workload.peak_bytes(),
            }
            print(json.dumps(told), flush=True)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]

    dtype = os.environ["BENCH_DTYPE"]
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            folder, per_device_train_batch_size=8, gradient_accumulation_steps=8, num_generations=8, max_completion_length=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS}, max_steps=100, learning_rate=1e-6, beta=0.0, report_to=[], save_strategy="no",
            logging_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(workload.MODEL, dtype=getattr(torch, dtype))
        GRPOTrainer(
            model, reward, options, Dataset.from_dict({"prompt": texts(64)}), processing_class=AutoTokenizer.from_pretrained(workload.MODEL),
            callbacks=[Turns()],
        ).train()  # fmt: skip


class Side:
    """A process of a script that makes one step when told to."""

    def __init__(self, python: str, name: str, environment: dict[str, str], script: str = __file__) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, script, "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self.told: list[dict[str, Any]] = []
        self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(self.log.read()[-3000:])

    def __call__(self, turn: int) -> float:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.told.append(self._line())
        return self.told[-1]["tokens"] / self.told[-1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=["sppo", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_sppo({}) if args.serve == "sppo" else serve_trl()
        return
    import torch

    from sppo.models.loading import LARGE, choose_dtype, pick_device

    dtype = str(choose_dtype("auto", LARGE, pick_device())[0]).removeprefix("torch.")
    environment = {
        "BENCH_DTYPE": dtype, "BENCH_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(["benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    sides = {"sppo": Side(sys.executable, "sppo", environment), "TRL": Side(TRL_PYTHON, "trl", environment)}
    for side in sides.values():
        side(0)
    print("warm")
    found = workload.interleaved(sides, args.rounds)
    workload.finish(
        {
            "ratio_vs_trl": workload.ratios(found["sppo"], found["TRL"]),
            "tokens_per_second": {name: [round(x, 1) for x in v] for name, v in found.items()},
            "step_seconds": {name: [round(t["seconds"], 1) for t in side.told[1:]] for name, side in sides.items()},
            "our_rollout_seconds": [round(t["rollout"], 1) for t in sides["sppo"].told[1:]],
            "peak_mib": {name: round(side.told[-1]["peak"] / 2**20) for name, side in sides.items()},
            "dtype": dtype,
        }
    )


if __name__ == "__main__":
    main()
