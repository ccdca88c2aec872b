"""A plan of memory: bytes by purpose, whether they fit, and what to turn where most of them go (added up in planning.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 2**30
TURN = {
    "weights": 'quantise the base (policy.quantize = "nf4" under [adapter]), or take a smaller model',
    "masters and moments": 'set training.optimizer = "adamw-8bit", or more cluster.learners with cluster.shards = 0',
    "gradients before they are added up": 'set cluster.gather = "layer"',
    "gradients of the shard": "more cluster.learners with cluster.shards = 0",
    "weights put together": 'set cluster.gather = "layer"',
    "optimiser": 'set training.optimizer = "adamw-8bit", or train an [adapter]',
    "reference": "train an [adapter], whose reference is its own base",
    "critic and its optimiser": 'take a smaller critic, or critic.model = "policy" under [adapter]',
    "keys and values": "lower rollout.batch",
    "logits": "lower rollout.batch",
    "gradients": "train an [adapter] instead of all weights",
    "gradients in float32": "train an [adapter] instead of all weights",
    "one micro-batch": "lower training.micro_tokens, or set training.checkpoint_activations = true",
    "vLLM": "give vLLM less (rollout.engine = 'vllm:memory=0.3')",
    "the reward model": "take a smaller reward model",
}
"""What to turn where most of the memory goes into a part, by the beginning of its name."""


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose: what stays, and the phases, one after the other."""

    stays: dict[str, int]
    phases: dict[str, dict[str, int]]
    micro_tokens: int
    capacity: int
    """What the run may take: what is free here with what this process has already, or `run.memory`."""
    kept: int = 0
    """What malloc keeps of a CPU's freed memory where there is plenty."""
    host: dict[str, int] = field(default_factory=dict)
    """What lies in the host's memory instead of the GPU's."""
    on_gpu: bool = False
    whose: str = ""
    """Of a cluster: the process that this is the plan of."""
    roomy = 2.5
    """Memory is plenty from this multiple of the need on."""

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.stays.values()) + sum(self.phases[self.largest].values())

    @property
    def fits(self) -> bool:
        """Whether the peak is below what there is."""
        return self.total < self.capacity

    @property
    def tight(self) -> bool:
        """Whether freed memory should go back at once: it is kept, and found again without page faults, where there is plenty."""
        return self.roomy * self.total > self.capacity

    def parts(self) -> dict[str, int]:
        """All that is held at the peak, and the total; with the freed memory that malloc keeps, where there is plenty."""
        kept = {} if self.tight else {"freed memory that is kept": self.kept}
        return {**self.stays, **self.phases[self.largest], **kept, "total": self.total + sum(kept.values())}

    @property
    def most(self) -> tuple[str, int]:
        """The largest part of the peak, and its bytes; the process aside."""
        parts = {name: size for name, size in self.parts().items() if name not in ("total", "the process")}
        return max(parts.items(), key=lambda part: part[1])

    def advice(self) -> str:
        """Where most of the memory goes, and what to turn."""
        name, size = self.most
        turn = TURN[max((part for part in TURN if name.startswith(part)), key=len, default="one micro-batch")]
        return f"the most goes into {name} ({said(size)}): {turn}"

    def stated(self) -> str:
        """A sentence for the start of a run; a warning where it does not fit."""
        need, has = said(self.total), said(self.capacity)
        who = self.whose or "this run"
        beside = f", and {said(sum(self.host.values()))} of the host's" if self.host else ""
        if self.fits:
            each = f" by {who}" if self.whose else ""
            return f"micro-batches of {self.micro_tokens:,} tokens; about {need} of memory needed{beside}{each}, {has} can be had"
        return (
            f"warning: {who} needs about {need} of memory{beside} and {has} can be had: it may be killed; {self.advice()} "
            "(sppo doctor lists the cheapest changes)"
        )


def said(size: int) -> str:
    """Bytes as people say them: 3.4 GiB, 120 MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
