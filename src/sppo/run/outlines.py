"""A recipe's models without their weights, to plan with: on this machine, or on a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..errors import ModelError
from ..files import read_json, readable
from ..models.adapters import ADAPTER_FILE, base_of, is_adapter
from ..models.head import backbone
from ..models.loading import choose_dtype, outline, pick_device
from ..models.multimodal import reads_more_than_text
from ..models.shapes import SHAPES
from ..models.weights import counted, parameter_count
from ..recipe.config import Config
from ..recipe.recipe import POLICY
from .footprint import Adapter, Model
from .plan import Plan
from .planning import plan, plan_of_worker


class Outlines:
    """Reads each model's config once."""

    def __init__(self, gpu: int | None = None) -> None:
        """`gpu`: bytes of a GPU that need not be here; CUDA is not asked for anything then."""
        self.gpu = gpu
        self.device = torch.device("cuda") if gpu is not None else pick_device()
        self._read: dict[tuple[str, bool], Any] = {}

    def policy(self, config: Config) -> tuple[Model, str]:
        """The policy, and what it is. Raises ModelError, and RecipeError for targets that match nothing."""
        name, dtype, quantize = config.policy.model, str(config.policy.dtype), str(config.policy.quantize)
        section = config.adapter
        adapter = None if section is None else Adapter(section.rank, section.targets, section.dora)
        if is_adapter(name):
            base = base_of(folder := Path(name).expanduser())
            with readable(f"{folder / ADAPTER_FILE} cannot be read", ModelError):
                saved = read_json(folder / ADAPTER_FILE)
                adapter = Adapter(int(saved["r"]), tuple(saved["target_modules"]), bool(saved.get("use_dora")))
            name, quantize = base["name"], quantize or base.get("quantize", "")
            dtype = base.get("dtype", dtype) if dtype == "auto" else dtype
        found, said = self._model(name, dtype, "policy.model", head=True)
        model = replace(found, adapter=adapter, quantize=quantize)
        if adapter is not None:
            how = f", in {quantize}" if quantize else ""
            said += f"{how}; frozen, and an adapter of {counted(model.trained)} parameters"
        return model, said

    def critic(self, config: Config) -> tuple[Model | None, str]:
        """The critic, and what it is; None where the algorithm has none."""
        if config.critic_reads is None:
            return None, "none: the algorithm has no critic"
        if config.critic.model == POLICY:
            policy, _ = self.policy(config)
            return replace(
                policy, shared=True
            ), f"an adapter of {counted(policy.trained)} parameters on the policy's base"
        return self._model(config.critic.model, config.critic.dtype, "critic.model", head=False)

    def plan(self, config: Config, prompt_tokens: int) -> Plan:
        """The plan of a recipe for a typical prompt's length."""
        policy, critic = self.policy(config)[0], self.critic(config)[0]
        return plan(config, policy, critic, self.device, prompt_tokens, self.gpu)

    def plan_of_worker(self, config: Config, prompt_tokens: int) -> Plan:
        """That of a cluster's rollout worker."""
        return plan_of_worker(config, self.policy(config)[0], self.device, prompt_tokens, self.gpu)

    def _model(self, name: str, dtype: str, role: str, head: bool) -> tuple[Model, str]:
        if (name, head) not in self._read:
            self._read[name, head] = _outline(name, role, head)
        found = self._read[name, head]
        chosen, why = choose_dtype(dtype, parameter_count(found), self.device, elsewhere=self.gpu is not None)
        said = f"{name}: {counted(parameter_count(found))} parameters in {str(chosen).removeprefix('torch.')} ({why})"
        return Model(found, chosen), said


def _outline(name: str, role: str, head: bool) -> Any:
    """Raises ModelError; of a hub name that is not in the cache with the way to get it."""
    try:
        found = outline(name, role=role, head=head)
        return backbone(found) if not head and reads_more_than_text(found.config) else found
    except ModelError as error:
        if Path(name).expanduser().exists() or not isinstance(error.__cause__, OSError):
            raise
        if name in SHAPES:
            with torch.device("meta"):
                known = AutoConfig.for_model(**SHAPES[name])
                return (AutoModelForCausalLM if head else AutoModel).from_config(known)
        raise ModelError(
            f"{role}: the config of {name} is not on this machine, and no network is asked for it: fetch it with: "
            f"hf download {name} config.json (a gated model asks for hf auth login first), or name a folder that "
            "holds its config.json"
        ) from error
