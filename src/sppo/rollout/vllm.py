"""vLLM as the engine: `rollout.engine = "vllm"`. Token ids in and out, its log-probabilities, and the learner's
weights at every sync.

It runs in this process, with weights of its own in the policy's dtype. Every sync sends all of them, or the adapter
alone where vLLM can add it (vllm_weights.py), drops the prefix cache, and is proven by a checksum of what the engine
multiplies with.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ModelError, RecipeError
from ..files import first_line
from ..models.multimodal import reads_more_than_text
from ..models.policy import Policy
from ..models.weights import Weights, fingerprint
from .engine import Sample, Sampling
from .sequences import ending_ids
from .vllm_weights import AdapterOnly, CannotSend, Whole


def build(policy: Policy, *, memory: float = 0.4, context: int = 0, eager: bool = False) -> VLLMEngine:
    """The engine over a copy of the policy.

    Args:
        memory: the share of a GPU's memory that vLLM may take; on a CPU, GiB for keys and values are ten times this.
        context: the most tokens of a prompt and its response; 0: the model's own limit, 8,192 at most.
        eager: start in seconds and run slower, instead of compiling for a minute or more.

    Raises:
        RecipeError: vLLM is not installed, or does not accept the model.
    """
    return VLLMEngine(policy, memory=memory, context=context, eager=eager)


class VLLMEngine:
    """See `rollout.engine.Engine`."""

    def __init__(self, policy: Policy, *, memory: float, context: int, eager: bool) -> None:
        if not 0 < memory < 1:
            raise RecipeError(f"rollout.engine: vllm's memory is a share between 0 and 1, not {memory}")
        if reads_more_than_text(policy.model.config):
            raise RecipeError(
                f"rollout.engine = 'vllm' samples models of text alone, and {type(policy.model).__name__} reads more: "
                "take rollout.engine = 'local'"
            )
        # vLLM reads these when it is imported or starts
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(10 * memory))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if importlib.util.find_spec("vllm") is None:
            raise RecipeError(
                "rollout.engine = 'vllm' needs vLLM: pip install 'sppo[vllm]', or on a CPU see docs/performance.md"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="sppo-vllm-")
        self.policy, self.context, self.version = policy, context or min(policy.context or 8192, 8192), 0
        self.llm: Any = None
        self._given, self._frozen = "", policy.frozen_fingerprint()
        try:
            self._begin(memory, eager)
        except (ValueError, RuntimeError, ModelError, ImportError) as error:
            self.close()
            raise RecipeError(f"rollout.engine = 'vllm': it does not start with this model: {error}") from error
        dtype = str(policy.dtype).removeprefix("torch.")
        self.stated = f"engine vllm: {self._way.stated}, in {dtype}; prompts and responses up to {self.context} tokens"

    def _begin(self, memory: float, eager: bool) -> None:
        """Start the engine with the policy's weights, by sending an adapter alone where that can be."""
        folder, why = Path(self._folder.name), ""
        self._way: Whole | AdapterOnly
        if self.policy.adapters is not None:
            try:
                self._way = AdapterOnly(self.policy, folder)
                self._start(memory, eager)
                self.load(self.policy.weights(), 0)
                return
            except (CannotSend, ValueError, RuntimeError, AssertionError, AttributeError) as error:
                why = first_line(error)
            self._stop()  # now that no error holds on to what was begun
        self._way = Whole(self.policy, folder / "model", why)
        self._start(memory, eager)
        self._given = self.policy.fingerprint()
        if self.policy.adapters is not None:
            self.load(self.policy.weights(), 0)

    def _start(self, memory: float, eager: bool) -> None:
        from vllm import LLM

        # Without chunks a prompt is read in one pass; vLLM 0.32's CPU sampler fails on a seeded request whose
        # prompt was cut.
        how = (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self.context, 8192)}
            if self.policy.device.type == "cpu"
            else {"gpu_memory_utilization": memory}
        )
        self.llm = LLM(
            self._way.folder, dtype=str(self.policy.dtype).removeprefix("torch."), max_model_len=self.context,
            enforce_eager=eager, logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True,
            **how, **self._way.options,
        )  # fmt: skip

    def load(self, weights: Weights, version: int) -> None:
        """Send weights into the running engine; what it remembers of prompts is of the old ones, and goes."""
        given = list(weights)
        self._way.send(self.llm, given)
        self.llm.reset_prefix_cache()
        self.version, self._given = version, fingerprint(given, self._frozen)

    def holds(self, fingerprint: str) -> bool:
        """Whether what was given last had this fingerprint, and is what the engine multiplies with."""
        return self._given == fingerprint and self._way.held(self.llm)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """See the protocol; a sample's bits may depend on its neighbours here. Raises RecipeError for a cut (top-k
        and its kind): vLLM would report the cut distribution only."""
        from vllm import SamplingParams

        if sampling.cut and sampling.temperature > 0:
            raise RecipeError("rollout.top_k, top_p and min_p need rollout.engine = 'local'")
        ends = ending_ids(self.policy, sampling.stop)
        params = [
            SamplingParams(
                temperature=sampling.temperature, max_tokens=limit, seed=seed % 2**31, logprobs=0,
                stop_token_ids=ends, stop=list(sampling.stop) or None, detokenize=bool(sampling.stop),
            )
            for seed, limit in zip(seeds, limits or [sampling.max_tokens] * len(seeds), strict=True)
        ]  # fmt: skip
        samples: list[Sample] = []
        for start in range(0, len(prompts), sampling.batch):
            part = slice(start, start + sampling.batch)
            asked = [{"prompt_token_ids": list(p)} for p in prompts[part]]
            for done in self._asked(asked, params[part]):
                found = done.outputs[0]
                logps = [entry[i].logprob for i, entry in zip(found.token_ids, found.logprobs, strict=True)]
                finish: Literal["stop", "length"] = "stop" if found.finish_reason == "stop" else "length"
                samples.append(Sample(list(found.token_ids), logps, finish, version=self.version))
            if progress:
                progress(len(samples))
        return samples

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": [*p, *r]} for p, r in zip(prompts, responses, strict=True)]
        done = self._asked(asked, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False))
        return [
            [entry[i].logprob for i, entry in zip(response, found.prompt_logprobs[-len(response) :], strict=True)]
            for found, response in zip(done, responses, strict=True)
        ]

    def _asked(self, prompts: list[dict[str, list[int]]], params: Any) -> Any:
        return self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._way.request)

    def close(self) -> None:
        """Release the engine's memory and its folder."""
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
