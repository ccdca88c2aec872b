"""vLLM as the engine: `rollout.engine = "vllm"`. Token ids in and out, its log-probabilities, and the learner's
weights at every sync.

It runs in this process, with weights of its own in the policy's dtype: every sync pushes all of them, drops the
prefix cache, and is proven by a checksum of what the engine multiplies with (vLLM's CPU build packs matrices away
where nobody can read them; a product with the identity brings them out again, exactly).
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RecipeError
from ..models.policy import Policy
from ..models.weights import Weights, fingerprint
from .engine import Sample, Sampling
from .sequences import ending_ids


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
        # vLLM reads these when it is imported or starts
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(10 * memory))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as error:
            raise RecipeError(
                f"rollout.engine = 'vllm' needs vLLM ({error}): pip install 'sppo[vllm]', or on a CPU see "
                "docs/performance.md"
            ) from None
        self._folder = tempfile.TemporaryDirectory(prefix="sppo-vllm-")
        policy.save(Path(self._folder.name))
        on_cpu = policy.device.type == "cpu"
        dtype = str(policy.dtype).removeprefix("torch.")
        limit = context or min(policy.context or 8192, 8192)
        # Without chunks a prompt is read in one pass; vLLM 0.32's CPU sampler fails on a seeded request whose
        # prompt was cut.
        how = (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": max(limit, 8192)}
            if on_cpu
            else {"gpu_memory_utilization": memory}
        )
        try:
            self.llm: Any = LLM(
                self._folder.name, dtype=dtype, max_model_len=limit, enforce_eager=eager,
                logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True, **how,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise RecipeError(f"rollout.engine = 'vllm': it does not start with this model: {error}") from error
        self.policy, self.context, self.version = policy, limit, 0
        self._given = (policy.fingerprint(), checksum([tensor for _, tensor in policy.weights()]))
        self.stated = f"engine vllm: weights of its own in {dtype}, prompts and responses up to {limit} tokens"

    def load(self, weights: Weights, version: int) -> None:
        """Push every weight into the running engine; what it remembers of prompts is of the old ones, and goes."""
        given = list(weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(given)})
        if getattr(self.policy.model.config, "tie_word_embeddings", False):
            self.llm.apply_model(_tie_again)
        self.llm.reset_prefix_cache()
        self.version, self._given = version, (fingerprint(given), checksum([tensor for _, tensor in given]))

    def holds(self, fingerprint: str) -> bool:
        """Whether what was given last had this fingerprint, and is there: vLLM fuses and reorders matrices, so a
        checksum is compared that does not depend on that, of what was given and of what the engine multiplies
        with."""
        given, outside = self._given
        return given == fingerprint and self.llm.apply_model(_checksum_inside)[0] == outside

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
            for done in self.llm.generate(asked, params[part], use_tqdm=False):
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
        done = self.llm.generate(
            asked, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False
        )
        return [
            [entry[i].logprob for i, entry in zip(response, found.prompt_logprobs[-len(response) :], strict=True)]
            for found, response in zip(done, responses, strict=True)
        ]

    def close(self) -> None:
        """Release the engine's memory and its folder."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        self._folder.cleanup()


def _tie_again(model: Any) -> None:
    """vLLM 0.32 leaves an output matrix that is tied to the embedding as it was when weights are reloaded (on a CPU:
    a packed copy of it), and goes on sampling from it. The checksum found that."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embedding = next(m for m in model.modules() if type(m) is VocabParallelEmbedding)
    for head in (m for m in model.modules() if isinstance(m, ParallelLMHead)):
        head.weight = embedding.weight
        if hasattr(head, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


CHUNK = 1 << 20


def checksum(tensors: Sequence[Tensor]) -> int:
    """A 64-bit sum over the bits of all elements, zeros counting nothing: the same however they are fused, ordered or
    padded with zeros, and another (short of a contrived tie) when any value changes."""
    total = 0
    for tensor in tensors:
        flat = (tensor.detach() + 0.0).reshape(-1)  # −0 becomes 0, as it does in any sum
        bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
        for part in bits.split(CHUNK):
            b = part.long()
            total += int((b * b * 0x9E3779B97F4A7C1 + b * 0x2545F4914F6CDD1).sum())
    return total % 2**64


def _checksum_inside(model: Any) -> int | str:
    """The checksum of a vLLM model's weights; a word where an output matrix is not the embedding that it should be
    tied to."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                tensors.append(parameter)
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None:
            used = _multiplied_with(module, weight)
            if weight.numel() == 0:
                tensors.append(used)
            elif not torch.equal(used, weight):
                return "tied weights differ"
    return checksum(tensors)


@torch.inference_mode()
def _multiplied_with(module: Any, weight: Tensor) -> Tensor:
    """The matrix that a linear layer of vLLM's CPU build really uses, [outputs, inputs]: its product with the
    identity."""
    inputs = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    return module.cpu_linear(torch.eye(inputs, dtype=weight.dtype), weight, None).t()
