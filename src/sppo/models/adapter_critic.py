"""The critic as a second adapter: V(x) read off the policy's own frozen weights, for the price of an adapter and one
linear map. The policy's adapter is off while the critic reads, so neither moves the other.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..files import readable
from ..types import Task
from .adapters import CRITIC, base_of, is_adapter
from .critic import Critic
from .policy import Policy
from .scorer import Reader
from .weights import counted


class AdapterCritic(Critic):
    """A critic on the weights of a policy. Its parameters are an adapter's and its head's; `save` writes a peft folder
    with the head beside it."""

    def __init__(self, policy: Policy, adapter: str) -> None:
        """`adapter` is the name of one in the policy's model."""
        nn.Module.__init__(self)
        assert policy.adapters is not None
        self.name, self.tokenizer, self.policy, self.adapter = "policy", policy.tokenizer, policy, adapter
        self.own = nn.ParameterList(policy.adapters.named(adapter).values())
        self.head = nn.Linear(policy.model.get_output_embeddings().weight.size(-1), 1).to(policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trained = False
        self.stated = (
            f"critic: an adapter of {counted(sum(p.numel() for p in self.own))} parameters on the policy's frozen "
            "weights, and a read-out; reads "
        )

    @classmethod
    def beside(cls, policy: Policy, saved: Path | None = None, *, seed: int = 0) -> AdapterCritic:
        """On the weights of a policy that is trained here; `saved` is a folder to take adapter and head from.

        Raises RecipeError where the policy has no adapter, ModelError where the folder's is of another model."""
        if policy.adapters is None:
            raise RecipeError("critic.model = 'policy' stands on frozen weights, and all of the policy's are trained")
        if saved is None:
            policy.adapters.add(CRITIC, seed=seed)
        else:
            policy.adapters.load(saved, CRITIC)
        critic = cls(policy, CRITIC)
        if saved is not None:
            with readable(f"{saved} holds no critic that can be read", ModelError):
                critic.load_head(saved)
        return critic

    @cached_property
    def reader(self) -> Reader:
        """The policy's own, with this adapter."""
        return self.policy.scorer.under(self.adapter)

    @property
    def backbone(self) -> Any:
        """The policy's own model."""
        return self.policy.model

    def prompt_ids(self, task: Task) -> list[int]:
        """The prompt as the policy reads it."""
        return self.policy.prompt_ids(task)

    def refuses(self, task: Task) -> str | None:
        """Nothing that the policy does not refuse."""
        return None

    def hidden(self, ids_BL: Tensor, action_BL: Tensor) -> Tensor:
        """See `Critic`."""
        found: Tensor = self.reader(ids_BL, action_BL, None)  # called, since its weights may be divided among ranks
        return found

    def save(self, folder: Path) -> None:
        """A peft folder, its tokenizer, and the head beside it."""
        base = self.policy.base | {"fingerprint": self.policy.frozen_fingerprint()}
        assert self.policy.adapters is not None
        if self.mesh.rank:
            return
        self.policy.adapters.save(folder, self.adapter, base)
        self.tokenizer.save_pretrained(folder)
        self.save_head(folder)


def open_critic(
    name: str, *, dtype: str, device: torch.device, seed: int, policy: Policy | None = None, reads: str = "prompt"
) -> tuple[Critic, str]:
    """The critic of a name, of whichever kind, and the sentence to state. An adapter goes into the model of `policy` where
    that has its base, else into a base of its own."""
    if not is_adapter(name):
        return Critic.load(name, dtype=dtype, device=device, seed=seed, reads=reads)
    folder = Path(name).expanduser()
    if policy is not None and policy.base.get("name") == base_of(folder)["name"]:
        critic = AdapterCritic.beside(policy, folder)
    else:
        own, _ = Policy.load(name, dtype=dtype, device=device, seed=seed)
        assert own.adapters is not None
        critic = AdapterCritic(own, own.adapters.name)
        with readable(f"{name} holds no critic that can be read", ModelError):
            critic.load_head(folder)
    return critic, critic.stated + ("the prompt only" if reads == "prompt" else "prompt and response")
