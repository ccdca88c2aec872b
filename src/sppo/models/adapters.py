"""Adapters: small trained matrices in a model whose own weights stay as they are (LoRA and its kind, by peft).

peft puts its layers into the transformers model in place, so that every pass goes through that model as ever. Which
adapter a pass uses is a matter of `using`: the policy's own at rest, the critic's or none until a block ends.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..files import first_line, read_json, readable
from ..recipe.sections import AdapterSection
from ..spec import nearest
from .head import backbone

POLICY, CRITIC, REFERENCE = "default", "critic", "reference"
"""Names of adapters in one model; the first is peft's own, so that other tools find it."""
STATES = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d"))
"""Layers that peft refuses, by type of model: kernels read their weight past any adapter."""
ADAPTER_FILE, BASE_FILE = "adapter_config.json", "base.json"
"""In a saved folder: what makes it peft's, and which weights the adapter was trained on."""


class Adapters:
    """The adapters of one transformers model (`model`), which are inside it."""

    def __init__(self, peft: Any) -> None:
        """`peft` is a PeftModel with the policy's adapter. Raises ModelError for a kind without a rank, such as
        prompts, and for one that trains biases of the base."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.peft, self.name, config = peft, peft.active_adapter, peft.active_peft_config
        self.layers = [m for m in peft.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        section_of(config)
        if getattr(config, "bias", "none") != "none":
            raise ModelError(f"the adapter's bias = {config.bias!r} trains biases of the base; set bias='none'")

    @property
    def model(self) -> Any:
        """The transformers model that holds them."""
        return self.peft.get_base_model()

    @classmethod
    def onto(cls, model: Any, config: Any, *, seed: int) -> Adapters:
        """Put a new adapter into a model and freeze the rest; `config` is a recipe's [adapter], or peft's own.

        Its matrices have the model's dtype, and depend on `seed` alone. Raises RecipeError for targets that match
        nothing, or without peft."""
        need_peft("[adapter]")
        from peft import get_peft_model

        if isinstance(config, AdapterSection):
            config = _lora(model, config)
        else:
            config = copy.deepcopy(config)  # peft writes into it
            config.task_type = config.task_type or "CAUSAL_LM"
            if getattr(config, "target_modules", None) == "all-linear":  # peft would adapt a vision tower as well
                config.target_modules = targets_in(model, "all-linear")
        dtype = model.get_input_embeddings().weight.dtype
        with _made_from(seed), readable("[adapter] does not fit this model", RecipeError):
            made = cls(get_peft_model(model, config, autocast_adapter_dtype=False))
        made._settle(made.name, dtype)
        return made

    @classmethod
    def read(cls, model: Any, folder: Path) -> Adapters:
        """The adapter of a peft folder, in its base model. Raises ModelError where it is of another model."""
        need_peft(str(folder))
        from peft import PeftModel

        dtype = model.get_input_embeddings().weight.dtype
        with _made_from(0), _fits(folder):
            made = cls(PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False))
        made._settle(made.name, dtype)
        return made

    @classmethod
    def given(cls, peft: Any) -> Adapters:
        """The adapter of a PeftModel that Python code brings, trained from now on, in the dtype of the model."""
        made = cls(peft)
        made._settle(made.name, made.model.get_input_embeddings().weight.dtype)
        for n, p in made.model.named_parameters():  # one that was loaded for inference is frozen
            p.requires_grad_(_is_of(n, made.name))
        return made

    @property
    def section(self) -> AdapterSection:
        """What a recipe says of the policy's adapter."""
        return section_of(self.peft.peft_config[self.name])

    @property
    def dropout(self) -> float:
        """peft's `lora_dropout`."""
        return float(getattr(self.peft.peft_config[self.name], "lora_dropout", 0.0))

    def add(self, name: str, *, seed: int = 0) -> dict[str, nn.Parameter]:
        """Another adapter of the policy's shape; returns its parameters, which are trained."""
        config = self.peft.peft_config[self.name]
        dtype = self.model.get_input_embeddings().weight.dtype
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        with _made_from(seed):
            self.peft.add_adapter(name, config, autocast_adapter_dtype=False)
        self._settle(name, dtype)
        for n, p in self.model.named_parameters():  # peft leaves a further adapter frozen, or freezes the first
            p.requires_grad_(n in trained or _is_of(n, name))
        return self.named(name)

    def copy(self, name: str) -> None:
        """Another adapter with the policy's weights as they are now, frozen."""
        mine = self.named(self.name)
        with torch.no_grad():
            for own, p in self.add(name).items():
                p.copy_(mine[_renamed(own, name, self.name)])
                p.requires_grad_(False)

    def load(self, folder: Path, name: str) -> dict[str, nn.Parameter]:
        """Another adapter from a peft folder; returns its parameters. Raises ModelError where it is not of this model."""
        with _fits(folder):
            from peft.utils import load_peft_weights

            found = self.add(name)
            given = load_peft_weights(str(folder), device="cpu")
            state = {_bare(n, name): p for n, p in found.items()}
            saved = {n.removeprefix("base_model.model."): x for n, x in given.items()}
            if state.keys() != saved.keys():
                raise ValueError(f"it has no {min(state.keys() ^ saved.keys())}, or more than there is room for")
            with torch.no_grad():
                for n, p in state.items():
                    p.copy_(saved[n])
        return found

    def named(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their names in the model."""
        return {n: p for n, p in self.model.named_parameters() if _is_of(n, name)}

    def fresh(self, name: str) -> bool:
        """Whether the model with this adapter computes what it does without: every product is with a matrix of
        zeros."""
        parameters = self.named(name)
        low_rank = all("lora_" in n for n in parameters)
        return low_rank and all(not bool(p.any()) for n, p in parameters.items() if "_B." in n)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Until the block ends the model computes with the adapter of this name, or with none."""
        before = [(m._active_adapter, m._disable_adapters) for m in self.layers]
        try:
            for m in self.layers:
                m._active_adapter, m._disable_adapters = ([name] if name else m._active_adapter), name is None
            yield
        finally:
            for m, (active, off) in zip(self.layers, before, strict=True):
                m._active_adapter, m._disable_adapters = active, off

    def save(self, folder: Path, name: str, base: dict[str, str]) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads, and `base`: what it was trained on."""
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        config = self.peft.peft_config[name]
        config.base_model_name_or_path, inference = base["name"], config.inference_mode
        config.inference_mode = True  # as peft saves it
        config.save_pretrained(str(folder))
        config.inference_mode = inference
        state: dict[str, Tensor] = get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False)
        whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(whole, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        (folder / BASE_FILE).write_text(json.dumps(base, indent=1) + "\n")

    def save_base(self, folder: Path) -> None:
        """Write the model as it is without adapters, as its class would."""
        places = [(*place, inner) for *place, inner in self._places()]
        try:
            for parent, name, _, inner in places:
                setattr(parent, name, inner)
            self.model.save_pretrained(str(folder))
        finally:
            for parent, name, layer, _ in places:
                setattr(parent, name, layer)

    def _places(self) -> list[tuple[nn.Module, str, Any, Any]]:
        """Where peft's layers are: the module that holds one, its name there, the layer, and the model's own in it."""
        ours, found = {id(m) for m in self.layers}, []

        def search(module: nn.Module) -> None:
            for name, child in module.named_children():
                layer: Any = child
                if id(layer) not in ours:
                    search(layer)
                    continue
                inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
                found.append((module, name, layer, inner))

        search(self.model)
        return found

    def _settle(self, name: str, dtype: torch.dtype) -> None:
        """Give an adapter the dtype that the model computes in (peft takes float32 beside quantised weights)."""
        for p in self.named(name).values():
            p.data = p.data.to(dtype)


def need_peft(where: str) -> None:
    """Raises RecipeError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(f"{where} needs peft: pip install 'sppo[adapters]'")


def is_adapter(name: str) -> bool:
    """Whether this is a folder that holds an adapter."""
    return (Path(name).expanduser() / ADAPTER_FILE).is_file()


def base_of(folder: Path) -> dict[str, str]:
    """What the adapter in a folder was trained on: `name`, and `fingerprint`, `dtype` and `quantize` where sppo wrote
    it. Raises ModelError where that is nowhere to be found."""
    with readable(f"{folder / ADAPTER_FILE} cannot be read", ModelError):
        known = read_json(folder / BASE_FILE) if (folder / BASE_FILE).exists() else {}
        name = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path") or known.get("name")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder} is an adapter that names no base model (base_model_name_or_path)")
    if name.startswith("/") and not Path(name).exists():  # moved: it is in an export, or beside a run's checkpoints
        here = folder.resolve()
        near = [p / "base" for p in (here, *here.parents)]
        name = next((str(base) for base in near if (base / "config.json").exists()), name)
    return {**known, "name": name}


def section_of(config: Any) -> AdapterSection:
    """What a recipe says of an adapter that peft's own config describes, as far as it can. Raises ModelError for a kind
    without a rank."""
    rank, kind = getattr(config, "r", None), str(getattr(config.peft_type, "value", config.peft_type))
    if not isinstance(rank, int) or kind == "ADALORA":  # AdaLoRA is told of every update by its trainer
        raise ModelError(f"{type(config).__name__}: only adapters of a fixed rank are trained; use peft's LoraConfig")
    targets = getattr(config, "target_modules", None) or "all-linear"
    return AdapterSection(
        rank=rank, alpha=max(1, round(getattr(config, "lora_alpha", getattr(config, "alpha", rank)))),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        rslora=bool(getattr(config, "use_rslora", False)), dora=bool(getattr(config, "use_dora", False)),
    )  # fmt: skip


def _lora(model: Any, section: AdapterSection) -> Any:
    """peft's config of a recipe's [adapter]."""
    from peft import LoraConfig

    return LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=targets_in(model, section.targets),
        use_rslora=section.rslora, use_dora=section.dora, task_type="CAUSAL_LM", lora_dropout=0.0, bias="none",
    )  # fmt: skip


def targets_in(model: Any, given: str | tuple[str, ...]) -> list[str]:
    """The names of the layers to adapt, as short as they can be: layers of the part that reads text alone.

    Raises RecipeError for a name that matches none of them."""
    head = model.get_output_embeddings()
    inside = {id(m) for m in backbone(model).modules()}
    linear = {n: m for n, m in model.named_modules() if _is_linear(m) and m is not head}
    text = [n for n, m in linear.items() if id(m) in inside]
    last = sorted({n.rpartition(".")[2] for n in text})
    if given == "all-linear":
        refused = STATES.get(getattr(model.config, "model_type", ""), ())
        wanted = [name for name in last if name not in refused]
    else:
        wanted = [given] if isinstance(given, str) else list(given)
        for name in wanted:
            if not any(n == name or n.endswith("." + name) for n in text):
                raise RecipeError(f"adapter.targets: no layer of this model is called {name!r}; {nearest(name, last)}")

    def matched(name: str) -> bool:
        return any(name == w or name.endswith("." + w) for w in wanted)

    beyond = any(matched(n) for n, _ in model.named_modules() if n not in text)  # peft goes by names alone
    return [n for n in text if matched(n)] if beyond else wanted


def _is_linear(module: Any) -> bool:
    """Whether peft can put a low-rank product beside it; quantised layers too, and GPT-2's. Llama 4's router, a linear
    layer that returns two tensors, is none."""
    kind = type(module)
    if not isinstance(module, nn.Linear):
        return kind.__name__ == "Conv1D"
    usual = kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes.")
    return usual or isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)


@contextlib.contextmanager
def _made_from(seed: int) -> Iterator[None]:
    """Random numbers from a seed of their own; and what transformers says to peft is not for the user."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)  # `_fits` says it
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _fits(folder: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError, TypeError, UserWarning) as error:
        why = first_line(error)
        if why.startswith("Error(s) in loading state_dict"):  # which they are is on the lines after it
            why = str(error).splitlines()[1].strip().rstrip(".")
        raise ModelError(f"{folder} is not an adapter of this base model: {why}") from error


def _is_of(parameter: str, name: str) -> bool:
    return name in parameter.split(".")


def _renamed(parameter: str, old: str, new: str) -> str:
    return ".".join(new if part == old else part for part in parameter.split("."))


def _bare(parameter: str, name: str) -> str:
    """A parameter's name as a saved adapter has it."""
    return parameter.replace(f".{name}.", ".").removesuffix(f".{name}")
