"""Translates the argument names of TRL's GRPOConfig; a name without an exact equivalent is refused with our own.

Not every name has an equivalent: there are no groups here, no micro-batches counted in sequences and no optimiser steps
between steps. A value that asks for what happens here anyway is taken. None means "not given", as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import RecipeError
from .recipe.config import keys
from .spec import nearest

Settings = dict[str, Any]

KEYS = {
    "weight_decay": "training.weight_decay",
    "delta": "objective.dual_clip",
    "entropy_coef": "objective.entropy_bonus",
    "save_total_limit": "run.keep",
    "num_generations_eval": "evaluation.samples",
    "vllm_importance_sampling_clip_max": "objective.engine_correction",
}
"""Other names for the same number."""

_DONE: Settings = {}
_CHOICES: dict[str, dict[Any, Settings]] = {
    "bf16": {True: {"policy.dtype": "bfloat16"}, False: {"policy.dtype": "float32"}},
    "mask_truncated_completions": {True: {"rollout.truncated": "mask"}, False: {"rollout.truncated": "keep"}},
    "use_bias_correction_kl": {True: {"objective.kl_form": "k3-weighted"}, False: {"objective.kl_form": "k3"}},
    "importance_sampling_level": {"token": {"objective.ratio": "token"}, "sequence": {"objective.ratio": "geometric"}},
    "scale_rewards": {
        "group": {"objective.scale": "group"}, True: {"objective.scale": "group"},
        "none": {"objective.scale": "none"}, False: {"objective.scale": "none"},
    },
    "optim": {
        "adamw_torch": {"training.optimizer": "adamw"}, "adamw_torch_fused": {"training.optimizer": "adamw"},
        "adamw_8bit": {"training.optimizer": "adamw-8bit"}, "adamw_bnb_8bit": {"training.optimizer": "adamw-8bit"},
        "paged_adamw_8bit": {"training.optimizer": "paged-adamw-8bit"},
    },
    "vllm_importance_sampling_correction": {True: _DONE, False: {"objective.engine_correction": 0.0}},
    "vllm_importance_sampling_mode": {
        f"{level}_{beyond}": {"objective.engine_correction_level": level, "objective.engine_correction_beyond": beyond}
        for level in ("token", "sequence") for beyond in ("truncate", "mask")
    },
    "vllm_mode": {"colocate": _DONE},
    "fp16": {False: _DONE}, "tf32": {False: _DONE}, "use_cpu": {False: _DONE}, "trust_remote_code": {False: _DONE},
    "logging_steps": {1: _DONE}, "logging_first_step": {True: _DONE}, "logging_strategy": {"steps": _DONE},
    "save_strategy": {"steps": _DONE}, "eval_strategy": {"steps": _DONE}, "eval_on_start": {True: _DONE},
    "log_completions": {True: _DONE, False: _DONE}, "remove_unused_columns": {False: _DONE},
    "shuffle_dataset": {True: _DONE},
    "disable_dropout": {True: _DONE}, "cast_lm_head_to_fp32": {True: _DONE}, "repetition_penalty": {1.0: _DONE},
    "adam_epsilon": {1e-8: _DONE}, "top_entropy_quantile": {1.0: _DONE}, "sync_ref_model": {False: _DONE},
    "push_to_hub": {False: _DONE}, "torch_compile": {False: _DONE}, "use_liger_kernel": {False: _DONE},
    "do_train": {True: _DONE, False: _DONE},
    "full_determinism": {True: _DONE}, "load_best_model_at_end": {False: _DONE},
    "multi_objective_aggregation": {"sum_then_normalize": _DONE}, "use_adaptive_entropy": {False: _DONE},
    "average_tokens_across_devices": {True: _DONE}, "label_smoothing_factor": {0.0: _DONE},
    "use_transformers_paged": {False: _DONE}, "use_transformers_continuous_batching": {False: _DONE},
    "log_multimodal": {True: _DONE, False: _DONE},
}  # fmt: skip
"""Values that have an equivalent; any other value of these names is refused."""

_BATCH = (
    "a step is prompts_per_step prompts times num_generations responses, with num_minibatches optimiser updates on "
    "them; recipe={'training.micro_tokens': …} bounds the memory, in tokens"
)
_INSTEAD = {
    name: sentence
    for names, sentence in (
        ("per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation", _BATCH),
        ("auto_find_batch_size pad_to_multiple_of torch_empty_cache_steps", _BATCH),
        ("per_device_eval_batch_size", "recipe={'rollout.batch': …} sets how many sequences are decoded together"),
        ("num_train_epochs", "max_steps counts steps: rows × epochs ÷ prompts_per_step"),
        (
            "loss_type sapo_ vespo_ off_policy_mask_threshold router_aux_loss_coef label_ prediction_loss_only "
            "neftune_noise_alpha",
            "the loss belongs to the algorithm, by default SPPO's: choose another with recipe={'objective.algorithm': "
            "'grpo'} (or 'dr-grpo', 'dapo', 'gspo', 'gspo-token', 'gmpo', 'cispo', 'sapo'), and what the loss averages "
            "over with 'objective.average'",
        ),
        ("scale_rewards", "set recipe={'objective.scale': 'none' (or 'group', or 'batch', which whitens)}"),
        (
            "importance_sampling_level",
            "set recipe={'objective.ratio': 'token' (or 'sequence', SPPO's own, or 'geometric', GSPO's)}",
        ),
        ("mask_truncated_completions", "set recipe={'rollout.truncated': 'penalise' (or 'mask', 'keep')}"),
        ("multi_objective_aggregation", "several rewards are averaged by reward_weights"),
        (
            "entropy_ use_adaptive_entropy",
            "the entropy bonus has a fixed weight (entropy_coef, recipe={'objective.entropy_bonus': …}); metrics.jsonl "
            "has the entropy ('policy/entropy')",
        ),
        ("top_entropy_quantile", "every token counts"),
        (
            "use_bias_correction_kl",
            "recipe={'objective.kl_form': 'reward' (or 'k2', 'k3', 'k3-weighted'), 'objective.kl_level': 'sequence' "
            "(or 'token')} sets the form of the KL, and beta its weight",
        ),
        ("sync_ref_model ref_model_", "the reference is the frozen start of the run"),
        (
            "logging_ log_ num_completions_to_print include_num_input_tokens_seen",
            "metrics.jsonl holds every step, and rollouts/ every response",
        ),
        (
            "include_for_metrics batch_eval_metrics skip_memory_metrics debug",
            "metrics.jsonl holds what was measured, memory included",
        ),
        ("disable_tqdm", "disable_progress=True shows no progress"),
        ("run_name", "the last folder of output_dir is the run's name"),
        ("project trackio_", "report_to='wandb:project=mine' passes options to a tracker"),
        (
            "eval_",
            "eval_steps sets the steps between evaluations (0: only before and after), and recipe={'evaluation.n': …} "
            "the number of problems",
        ),
        (
            "save_",
            "save_steps sets the steps between checkpoints, which hold all that resuming needs; recipe={'run.keep': …} "
            "sets how many are kept",
        ),
        (
            "load_best_model_at_end metric_for_best_model greater_is_better",
            "the last weights are the result; recipe={'run.keep': …} keeps older ones",
        ),
        (
            "ignore_data_skip restore_callback_states_from_checkpoint",
            "resume_from_checkpoint=True goes on to the identical result",
        ),
        ("enable_jit_checkpoint", "an interruption finishes the step and saves"),
        ("hub_ push_to_hub", "save_model(folder) writes a folder that can be uploaded"),
        (
            "use_vllm vllm_",
            "recipe={'rollout.engine': 'vllm:memory=0.4,context=8192'} has the options of the vLLM engine",
        ),
        (
            "vllm_importance_sampling_",
            "recipe={'objective.engine_correction': 2.0} caps the weight that corrects for the engine (0: off); its mode "
            "is 'objective.engine_correction_level' and 'engine_correction_beyond', and a whole response's weight is of "
            "the kind of its ratio",
        ),
        (
            "bf16 fp16 bf16_full_eval fp16_full_eval",
            "set recipe={'policy.dtype': 'bfloat16' (or 'float32', 'auto')}, or bf16=True",
        ),
        ("tf32", "set torch.backends.cuda.matmul.allow_tf32 yourself"),
        (
            "optim optim_ adam_epsilon",
            "recipe={'training.optimizer': 'adamw' (or 'adamw-8bit', 'paged-adamw-8bit')} sets the optimiser, with "
            "'training.betas' and weight_decay",
        ),
        (
            "lr_scheduler_kwargs warmup_ratio",
            "lr_scheduler_type is constant, linear or cosine, after a number of warmup_steps",
        ),
        (
            "gradient_checkpointing_kwargs activation_",
            "gradient_checkpointing=True computes each layer again in the backward pass",
        ),
        (
            "ddp_ fsdp fsdp_ deepspeed ds3_ local_rank accelerator_config parallelism_config "
            "average_tokens_across_devices",
            "a run is one process on one device",
        ),
        ("use_cpu", "a GPU is used where PyTorch sees one; set CUDA_VISIBLE_DEVICES='' to hide it"),
        ("dataloader_", "rows are read once, in this process"),
        (
            "shuffle_dataset train_sampling_strategy",
            "recipe={'curriculum.kind': 'uniform' (or 'staged', 'predicted')} sets the order of problems",
        ),
        ("data_seed", "every random choice derives from seed"),
        ("length_column_name", "prompts longer than max_prompt_length are left out and counted"),
        ("remove_unused_columns", "every column of a row reaches the rewards by its name"),
        (
            "model_init_kwargs trust_remote_code chat_template_kwargs use_cache",
            "load the model yourself and pass it as model=…, with processing_class=its tokenizer (code that comes with "
            "a model is never run)",
        ),
        ("disable_dropout", "models are trained without dropout"),
        ("cast_lm_head_to_fp32", "head and log-softmax are always float32"),
        (
            "repetition_penalty generation_kwargs cache_implementation use_transformers_ "
            "transformers_continuous_batching_config",
            "sampling is set by temperature, top_k, top_p, min_p, max_completion_length and "
            "recipe={'rollout.stop': […]}",
        ),
        (
            "max_tool_calling_iterations",
            "the last turn only answers, so for N rounds of calls write recipe={'environment.turns': N + 1}",
        ),
        ("torch_compile torch_compile_", "the local engine compiles its own decoding on a CPU"),
        ("use_liger_kernel liger_kernel_config", "log-probabilities are computed in chunks here already"),
        ("full_determinism", "a run is deterministic for one machine and number of threads"),
        ("do_", "train() trains and evaluates"),
    )
    for name in names.split()
}
"""What to write instead, by name or by prefix (one that ends in "_"); the longest match wins."""


def translated(settings: Mapping[str, Any], ours: list[str]) -> Settings:
    """Settings by TRL's names as keys of a recipe; `ours` are the names of SPPOConfig's own fields.

    Raises RecipeError for a setting without an equivalent, and for an unknown name.
    """
    given = {name: _plain(value) for name, value in settings.items() if value is not None or not _known(name)}
    out: Settings = {}
    for name, value in given.items():
        if name in ("adam_beta1", "adam_beta2"):
            out["training.betas"] = [given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.95)]
        elif name in _GATE:
            out["objective.gate_temperature"] = [given.get(key, usual) for key, usual in _GATE.items()]
        elif name == "use_vllm":
            out["rollout.engine"] = "vllm" if value else "local"
        elif name in _ENGINE_OPTIONS and given.get("use_vllm"):
            continue  # below
        elif name in KEYS:
            out[KEYS[name]] = value
        elif _is_choice(name, value) and not _of_any_ratio(name, value, given):
            out |= _CHOICES[name][value]
        else:
            raise RecipeError(f"SPPOConfig: {_refusal(name, value, given, ours)}")
    options = ",".join(f"{option}={given[name]}" for name, option in _ENGINE_OPTIONS.items() if name in given)
    if options and given.get("use_vllm"):
        out["rollout.engine"] = f"vllm:{options}"
    return out


_GATE = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
_ENGINE_OPTIONS = {"vllm_gpu_memory_utilization": "memory", "vllm_max_model_length": "context"}
_TAKEN = {*KEYS, *_CHOICES, *_ENGINE_OPTIONS, *_GATE, "use_vllm", "adam_beta1", "adam_beta2"}


def _known(name: str) -> bool:
    return name in _TAKEN or _instead(name) is not None


def _instead(name: str) -> str | None:
    found = [known for known in _INSTEAD if name == known or (known.endswith("_") and name.startswith(known))]
    return _INSTEAD[max(found, key=len)] if found else None


def _of_any_ratio(name: str, value: Any, given: Settings) -> bool:
    """Whether TRL's joint weight of a whole response differs from ours: it does unless ratios are per token."""
    whole = name == "vllm_importance_sampling_mode" and str(value).startswith("sequence")
    return whole and given.get("importance_sampling_level") != "token"


def _is_choice(name: str, value: Any) -> bool:
    try:
        return value in _CHOICES.get(name, {})
    except TypeError:  # a list is no choice
        return False


def _plain(value: Any) -> Any:
    """The text of an enumeration's member, e.g. of transformers' OptimizerNames."""
    return getattr(value, "value", value)


def _refusal(name: str, value: Any, given: Settings, ours: list[str]) -> str:
    instead = _instead(name)
    if instead is None:
        recipe = [dotted for dotted, _, _ in keys() if dotted.rpartition(".")[2] == name]
        if recipe:
            return f"unknown setting {name!r}: write it as recipe={{{recipe[0]!r}: {value!r}}}"
        near = nearest(name, [*ours, *_TAKEN, *(known for known in _INSTEAD if not known.endswith("_"))])
        return f"unknown setting {name!r}: {near if near.startswith('did') else 'known: ' + ', '.join(ours)}"
    if instead is _BATCH and isinstance(given.get("per_device_train_batch_size"), int):
        size, steps = given["per_device_train_batch_size"], given.get("gradient_accumulation_steps", 1)
        if isinstance(steps, int):
            instead += f" (yours are {size} × {steps} = {size * steps} responses for each update)"
    return f"{name}={value!r} has no exact equivalent here: {instead}"
