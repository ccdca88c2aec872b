"""One GPU of 80 GB or more: LoRA and full training of Llama-3.1-8B's and Qwen3-4B's shapes. `make bench-gpu`

Random weights, so nothing is fetched: what is measured does not depend on their values. Each measurement builds a
model, samples from it with the local engine (prompts and responses of 512 tokens; EOS out of reach), and updates it
with what was sampled: no critic, one optimiser step. Settings (8-bit moments, offload, checkpointed activations) are
the first ones of a list that the memory plan finds to fit. TRL's GRPOTrainer makes one step of the same size, its
activations checkpointed as by default.

MFU is of the whole update, optimiser step included: the model's FLOPs in it, and nothing that is computed again.

    FLOPs = c · (N_body · tokens + N_head · response tokens) + 6 · N_adapter · tokens + 6 · layers · heads · Σ length²
    c     = 6, or 4 under an adapter: the frozen matrices get no gradient

N are weights of matrices that are multiplied with (of an input embedding, none are; the head meets response tokens
alone). Attention is causal: two products of half of length² in the forward pass, twice that in the backward pass,
`heads` being their number times their size.

It ends within `--seconds` (480): what would not fit is left out, and said. `--small` does all of it in small, on a CPU
too. Results are printed as they come and kept in `--out`. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import workload

GIB = 2**30
PEAK = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H800": 989, "A100": 312, "A800": 312,
    "B200": 2250, "L40S": 362,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s by a part of the device's name, the first that matches; of another device MFU is left out."""
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "bos_token_id": None, "eos_token_id": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": COMMON | {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": False,
    },
    "Qwen3-4B": COMMON | {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    },
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
KINDS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"checkpoint_activations": True}],
    "full": [
        {},
        {"optimizer": "adamw-8bit"},
        {"optimizer": "adamw-8bit", "checkpoint_activations": True},
        {"offload": True, "checkpoint_activations": True},
        {"offload": True, "optimizer": "adamw-8bit", "checkpoint_activations": True},
    ],
}
"""How to train, the fastest first."""
ORDER = [("Llama-3.1-8B", "lora"), ("Qwen3-4B", "lora"), ("Qwen3-4B", "full"), ("Llama-3.1-8B", "full")]
NEEDED = {"lora": 60, "full": 90, "trl": 90}
"""Seconds below which a measurement is not begun; on an H100 it should take less. (In small only TRL's matter.)"""


class Size(NamedTuple):
    """How much is measured: tokens of a prompt and of its response, rows of an update, sequences sampled at once."""

    prompt: int
    response: int
    rows: int
    batches: tuple[int, ...]


FULL_SIZE, SMALL_SIZE = Size(512, 512, 64, (128, 256)), Size(16, 8, 8, (8, 16))


class Bench:
    """What was found so far, and how long there is for more."""

    def __init__(self, small: bool, seconds: float, out: str) -> None:
        import torch

        from sppo.models.loading import pick_device, processor

        self.began, self.seconds, self.out, self.small = time.perf_counter(), seconds, out, small
        self.size, self.device = SMALL_SIZE if small else FULL_SIZE, pick_device()
        name = processor(self.device)
        self.peak = next((1e12 * tflops for part, tflops in PEAK.items() if part in name), None)
        self.result: dict[str, Any] = {
            "device": name, "torch": torch.__version__, "peak_tflops": self.peak and self.peak / 1e12, "small": small,
            "prompt": self.size.prompt, "response": self.size.response, "rows": self.size.rows,
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.began)

    def measure(self, name: str, needed: float, what: Callable[[dict[str, Any]], None]) -> None:
        """Do one measurement, which notes what it finds as it goes; whatever goes wrong is noted too."""
        import torch

        found: dict[str, Any] = {}
        self.result[name] = found
        began = time.perf_counter()
        if self.left < needed:
            found["skipped"] = f"{self.left:.0f} s are left, and it may take {needed:.0f}"
        else:
            try:
                what(found)
            except Exception as error:
                found["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        found["seconds"] = round(time.perf_counter() - began, 1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(found)}", flush=True)
        self.result["seconds"] = round(time.perf_counter() - self.began, 1)
        if self.out:
            Path(self.out).write_text(json.dumps(self.result, indent=1) + "\n")


def shape(name: str, small: bool) -> Any:
    """transformers' config of a model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[name] | (SMALL if small else {}))


def tokenizer(vocabulary: int) -> Any:
    """One that reads characters, with a word for every other id."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from sppo.models.tiny import character_tokenizer

    characters = character_tokenizer()
    words = characters.get_vocab()
    words |= {f"<{i}>": i for i in range(len(words), vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = characters.backend_tokenizer.pre_tokenizer, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def random_model(config: Any, bench: Bench) -> Any:
    """A model of random weights, made where it is to be."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(bench.device):
        dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def recipe(bench: Bench, options: dict[str, Any]) -> Any:
    """The recipe of a measurement: no critic, one update of all rows."""
    from sppo.recipe.config import Config

    size = bench.size
    keys = {
        "objective.baseline": "batch", "rollout.prompts": size.rows, "rollout.samples": 1, "rollout.max_tokens": size.response,
        "rollout.batch": max(size.batches), "training.minibatches": 1, "training.lr": 1e-6, "training.critic_lr": 1e-6,
        "task.max_prompt_tokens": size.prompt, "evaluation.n": max(size.batches),
        "objective.engine_gap_limit": 10.0,  # how far engine and learner are apart is reported
    }  # fmt: skip
    return Config.load(None, keys | {f"training.{key}": value for key, value in options.items()})


def settled(bench: Bench, config: Any, kind: str) -> tuple[Any, Any, str]:
    """The first recipe of a kind that the plan finds to fit, its plan, and what was chosen. Raises RuntimeError where
    none does."""
    import torch
    from transformers import AutoModelForCausalLM

    from sppo.memory import free_ram
    from sppo.run.footprint import Adapter, Model
    from sppo.run.planning import plan

    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    cuda = bench.device.type == "cuda"
    model = Model(
        outline, torch.bfloat16 if cuda else torch.float32, Adapter(16, "all-linear") if kind == "lora" else None
    )
    why = []
    for options in KINDS[kind]:
        said = ", ".join(f"{k} = {v}" for k, v in options.items()) or "as it is"
        if "optimizer" in options and importlib.util.find_spec("bitsandbytes") is None:
            why.append(f"{said}: bitsandbytes is not installed")
            continue
        if "offload" in options and not cuda:
            continue
        chosen = recipe(bench, options)
        found = plan(chosen, model, None, bench.device, bench.size.prompt)
        host = sum(found.host.values()) + (4 * model.trained if found.host else 0)  # with the sums of gradients
        if found.fits and host < free_ram():
            training = chosen.training.model_copy(update={"micro_tokens": found.micro_tokens})
            return chosen.model_copy(update={"training": training}), found, said
        why.append(f"{said}: {found.total / GIB:.0f} GiB of {found.capacity / GIB:.0f}, {host / GIB:.0f} of the host's")
    raise RuntimeError("nothing fits: " + "; ".join(why))


def trains(bench: Bench, name: str, kind: str, found: dict[str, Any]) -> None:
    """Sample, then update, one shape in one way."""
    from sppo.learning.learner import Learner
    from sppo.memory import measure_peak
    from sppo.models.adapters import Adapters
    from sppo.models.policy import Policy
    from sppo.recipe.sections import AdapterSection
    from sppo.rollout.local import LocalEngine

    config = shape(name, bench.small)
    chosen, plan, found["settings"] = settled(bench, config, kind)
    found["micro_tokens"] = plan.micro_tokens
    print(f"{name}, {kind}: {found['settings']}; {plan.stated()}", flush=True)
    model = random_model(config, bench)
    adapters = Adapters.onto(model, AdapterSection(rank=16), seed=0) if kind == "lora" else None
    policy = Policy(model, tokenizer(config.vocab_size), name=name, adapters=adapters)
    policy.eos_ids = [config.vocab_size]  # no response ends before its time
    if chosen.training.checkpoint_activations:
        policy.checkpoint_activations()
    found["trained"] = sum(p.numel() for p in policy.trained.values())
    found["parameters"] = sum(p.numel() for p in model.parameters()) - (found["trained"] if adapters else 0)

    learner = Learner(policy, None, None, chosen)  # so that what stays is there while sampling, as in a run
    engine = LocalEngine(policy)
    found["engine"] = engine.stated or ("captured" if engine.captured else "as it is")
    measure_peak(bench.device)
    found["sampling"], samples = {}, []
    for batch in bench.size.batches if kind == "lora" else (bench.size.rows,):
        found["sampling"][str(batch)], samples = sampled(bench, engine, batch)
    found["sampling"] |= peaks(bench, plan, "sampling")
    engine.close()
    updates(bench, policy, learner, samples, found)
    found |= peaks(bench, plan, "update", "optimiser step")


def peaks(bench: Bench, plan: Any, *phases: str) -> dict[str, float]:
    """What was held in phases against what was planned, GiB; on a GPU without CUDA's own part."""
    from sppo.memory import peak_memory

    stays = {part: size for part, size in plan.stays.items() if bench.device.type != "cuda" or part != "the process"}
    planned = sum(stays.values()) + max(sum(plan.phases[phase].values()) for phase in phases)
    return {"peak_gib": round(peak_memory(bench.device) / GIB, 2), "planned_gib": round(planned / GIB, 2)}


def prompts(bench: Bench, count: int) -> list[list[int]]:
    """Different ones, of one length."""
    return [[3 + (31 * i + 7 * t) % 509 for t in range(bench.size.prompt)] for i in range(count)]


def sampled(bench: Bench, engine: Any, batch: int) -> tuple[dict[str, float], list[Any]]:
    """Tokens per second of a batch of responses, the first time (graphs are captured) and again; and the responses."""
    from sppo.rollout.engine import Sampling

    speeds, samples = {}, []
    for turn in ("first", "again"):
        began = time.perf_counter()
        samples = engine.generate(prompts(bench, batch), list(range(batch)), Sampling(bench.size.response, 1.0, batch))
        speeds[turn] = round(sum(len(s.ids) for s in samples) / workload.since(began), 1)
    return speeds, samples


def updates(bench: Bench, policy: Any, learner: Any, samples: list[Any], found: dict[str, Any]) -> None:
    """An update of a few rows, in which whatever is compiled the first time is compiled, then the one that counts."""
    import torch

    from sppo.learning.batch import pack
    from sppo.memory import measure_peak
    from sppo.types import Rollout, Task, Verdict

    size = bench.size
    rollouts = [
        Rollout.answer(Task(str(i), ""), p, s.ids, s.logps, s.finish, "", verdict=Verdict(i % 2, "correct"))
        for i, (p, s) in enumerate(zip(prompts(bench, size.rows), samples, strict=False))
    ]
    steps: list[float] = []
    step = learner.policy_optimiser.step

    def timed(lr: float, max_norm: float) -> float:
        workload.since(0.0)
        began = time.perf_counter()
        norm = step(lr, max_norm)
        steps.append(workload.since(began))
        return norm

    learner.policy_optimiser.step = timed
    for turn, rows in enumerate((max(2, size.rows // 16), size.rows)):
        batch = pack(rollouts[:rows], policy.pad_id)
        measure_peak(bench.device)
        began = time.perf_counter()
        metrics = learner.update(batch, torch.linspace(-1, 1, rows), turn)
        seconds = workload.since(began)
    tokens, flops = int(batch.length_B.sum()), needed_flops(policy, batch.length_B, batch.response_len_B)
    found |= {
        "tokens": tokens, "update_seconds": round(seconds, 3), "step_seconds": round(steps[-1], 3), "tokens_per_second": round(tokens / seconds, 1),
        "tflops": round(flops / seconds / 1e12, 2), "mfu": bench.peak and round(flops / seconds / bench.peak, 4),
        "mfu_of_passes": bench.peak and round(flops / (seconds - steps[-1]) / bench.peak, 4), "engine_gap": metrics.get("engine/gap_mean"),
    }  # fmt: skip


def needed_flops(policy: Any, length_B: Any, written_B: Any) -> float:
    """See the module's docstring; lengths of whole rows, and of what was written of them."""
    config = policy.model.config
    head = policy.model.get_output_embeddings().weight.numel()
    adapter = sum(p.numel() for p in policy.trained.values()) if policy.adapters else 0
    weights = sum(p.numel() for p in policy.model.parameters() if p.dim() == 2) - adapter
    body = weights - policy.model.get_input_embeddings().weight.numel()
    body -= 0 if config.tie_word_embeddings else head
    tokens, written, squared = (int(x.sum()) for x in (length_B, written_B, length_B.square()))
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * squared
    return (4 if adapter else 6) * (body * tokens + head * written) + 6 * adapter * tokens + attention


def beside(bench: Bench, name: str, found: dict[str, Any]) -> None:
    """TRL's step in a process of its own, which is ended when the time is over."""
    if importlib.util.find_spec("trl") is None:
        found["skipped"] = "TRL is not installed"
        return
    command = [sys.executable, __file__, "--trl", name, *(["--small"] if bench.small else [])]
    limit = max(10.0, bench.left - 5)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        found["skipped"] = f"it was not through after {limit:.0f} s"
        return
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found |= json.loads(done.stdout.splitlines()[-1])
    ours = bench.result.get(f"{name} lora", {})
    if "update_seconds" in ours:
        speed = ours["sampling"][str(bench.size.batches[0])]["again"]
        seconds = ours["update_seconds"] + bench.size.rows * bench.size.response / speed
        found |= {"our_step_seconds": round(seconds, 2), "ratio_vs_trl": round(found["step_seconds"] / seconds, 2)}


def serve_trl(bench: Bench, name: str) -> None:
    """Two steps of GRPOTrainer with the same adapter, of as many prompts and responses as one of our updates; the second
    counts."""
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds[-1] = workload.since(seconds[-1])

    size, config = bench.size, shape(name, bench.small)
    cuda = bench.device.type == "cuda"
    texts = [bytes(48 + (i + 7 * t) % 64 for t in range(size.prompt)).decode() for i in range(size.rows)]
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            folder, per_device_train_batch_size=8, gradient_accumulation_steps=size.rows // 8, num_generations=8,
            max_completion_length=size.response, generation_kwargs={"min_new_tokens": size.response}, max_steps=2, learning_rate=1e-6,
            beta=0.0, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=not cuda, bf16=cuda, gradient_checkpointing=cuda,
            disable_tqdm=True,
        )  # fmt: skip
        GRPOTrainer(
            random_model(config, bench), workload.digits, options, Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer(config.vocab_size), callbacks=[Clock()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        ).train()  # fmt: skip
    peak = round(workload.peak_bytes() / GIB, 2)
    workload.finish({"step_seconds": round(seconds[-1], 2), "first_seconds": round(seconds[0], 2), "peak_gib": peak})


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models of the same families, on a CPU too")
    parser.add_argument("--seconds", type=float, default=480.0, help="end within this time")
    parser.add_argument("--out", default="", metavar="FILE", help="the JSON, written after every measurement")
    parser.add_argument("--trl", metavar="SHAPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bench = Bench(args.small, args.seconds, args.out)
    if args.trl:
        serve_trl(bench, args.trl)
        return
    if bench.device.type != "cuda" and not args.small:
        sys.exit("this benchmark needs a GPU of 80 GB or more; --small runs all of it in small")
    for name, kind in ORDER:
        bench.measure(
            f"{name} {kind}",
            0 if args.small else NEEDED[kind],
            lambda found, n=name, k=kind: trains(bench, n, k, found),
        )
    bench.measure("TRL Qwen3-4B lora", NEEDED["trl"], lambda found: beside(bench, "Qwen3-4B", found))
    workload.finish(bench.result)


if __name__ == "__main__":
    main()
