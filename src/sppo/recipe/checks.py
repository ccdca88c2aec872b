"""Rules that compare several keys of a recipe: each is a function that yields a sentence for what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..spec import GIVEN, is_import
from .objective import PER_TOKEN
from .presets import CHANCES
from .recipe import Recipe

Sentences = Iterator[str]


# -- one section -------------------------------------------------------------------------------------------------------


def stages_belong_to_staged(c: Recipe) -> Sentences:
    kind, stages = c.curriculum.kind, list(c.curriculum.stages)
    if kind == "staged" and not stages:
        yield "curriculum.kind = 'staged' needs stages, the highest difficulty of each, e.g. stages = [3, 5, 8]"
    if kind != "staged" and stages:
        yield f"curriculum.stages belong to kind = 'staged', and kind is {kind!r}"
    if stages != sorted(set(stages)):
        yield f"curriculum.stages must rise, and {stages} does not"


def credit_per_token_needs_ratios_per_token(c: Recipe) -> Sentences:
    o = c.objective
    if o.baseline in ("token-critic", "hybrid") and o.ratio not in PER_TOKEN:
        yield f"objective.baseline = {o.baseline!r} gives every token its own advantage: set ratio = 'token'"


def squared_value_loss_needs_a_token_critic(c: Recipe) -> Sentences:
    o = c.objective
    if o.value_loss == "squared" and o.baseline != "token-critic":
        yield (
            f"objective.value_loss = 'squared' is of baseline = 'token-critic', and baseline is {o.baseline!r}: set "
            "value_loss = 'cross-entropy'"
        )
    if o.value_clip and o.value_loss != "squared":
        yield "objective.value_clip is of value_loss = 'squared': set that, or value_clip = 0"


def gmpo_averages_each_response(c: Recipe) -> Sentences:
    o = c.objective
    if o.surrogate == "gmpo" and (o.ratio != "token" or o.average != "responses"):
        yield (
            "objective.surrogate = 'gmpo' takes the mean over each response's token ratios: set ratio = 'token' and "
            "average = 'responses'"
        )


def average_is_of_token_ratios(c: Recipe) -> Sentences:
    o = c.objective
    if o.average != "auto" and o.ratio not in PER_TOKEN:
        yield (
            f"objective.average = {o.average!r} averages over token ratios, and ratio is {o.ratio!r}: set "
            "ratio = 'token' or average = 'auto'"
        )


def optimal_baseline_shifts_a_chance(c: Recipe) -> Sentences:
    o = c.objective
    if o.optimal_baseline and o.baseline not in CHANCES:
        yield (
            f"objective.optimal_baseline shifts the odds of a chance, and baseline = {o.baseline!r} is none: use "
            "'critic' or 'centred', or set optimal_baseline = false"
        )
    if o.optimal_baseline and o.scale == "batch":
        yield (
            "objective.scale = 'batch' undoes the shift of optimal_baseline: leave it out, or set "
            "optimal_baseline = false"
        )


def baseline_weight_is_of_the_critic(c: Recipe) -> Sentences:
    o = c.objective
    if o.baseline_weight != 1 and (o.baseline != "critic" or o.optimal_baseline):
        yield "objective.baseline_weight needs baseline = 'critic' and optimal_baseline = false"


def search_learns_what_it_searches(c: Recipe) -> Sentences:
    s = c.search
    if s is not None and s.below > s.enough:
        yield (
            f"search.below = {s.below:g} is above enough = {s.enough:g}: solutions of problems in between would weigh "
            "nothing"
        )


# -- several sections --------------------------------------------------------------------------------------------------


def minibatches_have_rollouts(c: Recipe) -> Sentences:
    rollouts = c.rollout.prompts * c.rollout.samples
    if c.training.minibatches > rollouts:
        yield f"training.minibatches is {c.training.minibatches}, but a step has only {rollouts} rollouts"


def vllm_samples_from_all_tokens(c: Recipe) -> Sentences:
    r = c.rollout
    if r.engine.startswith("vllm") and (r.top_k or r.top_p < 1 or r.min_p):
        yield "rollout.top_k, top_p and min_p need rollout.engine = 'local'"


def control_tasks_agree(c: Recipe) -> Sentences:
    """Policy, critic and problems of a control recipe (models/mlp.py) are of the same task."""
    kinds = {"policy.model": "mlp", "critic.model": "mlp", "task.train": "control", "task.eval": "control"}
    given = {
        "policy.model": c.policy.model, "task.train": c.task.train, "task.eval": c.task.eval,
        "critic.model": c.critic.model if c.critic_reads else None,
    }  # fmt: skip
    names = {
        key: text.partition(":")[2].partition(",")[0]
        for key, text in given.items()
        if text and text.startswith(f"{kinds[key]}:")
    }
    if c.rollout.engine != "control":
        if names:
            yield f"rollout.engine = {c.rollout.engine!r} runs no control tasks: set rollout.engine = 'control'"
        return
    first, name = next(iter(names.items()), ("task.train", "NAME"))
    for key, text in given.items():
        if text and key not in names and not ("model" in key and Path(text).exists()):
            yield f"{key} = {text!r} is not of a control task: set {key} = '{kinds[key]}:{name}'"
        if key in names and names[key] != name:
            yield f"{first} is of the control task {name!r}, but {key} of {names[key]!r}"


def control_has_no_text(c: Recipe) -> Sentences:
    r = c.rollout
    if r.engine != "control":
        return
    if r.top_k or r.top_p < 1 or r.min_p or r.stop:
        yield "rollout.top_k, top_p, min_p and stop are about text: leave them out with rollout.engine = 'control'"
    if r.overlong:
        yield (
            "rollout.overlong penalises long responses, and a long episode may be a good one: set it to 0 with "
            "rollout.engine = 'control'"
        )
    if r.resample > 2:
        yield (
            "rollout.engine = 'control' holds only the last few blocks of a step's episodes: set rollout.resample to 2 "
            "at most"
        )
    if c.search is not None:
        yield "[search] continues prefixes of text, which rollout.engine = 'control' does not have: leave it out"


def search_fits_a_response(c: Recipe) -> Sentences:
    s = c.search
    if s is not None and s.budget < c.rollout.max_tokens:
        yield (
            f"search.budget = {s.budget} tokens per problem is less than one response may take (rollout.max_tokens = "
            f"{c.rollout.max_tokens})"
        )


def search_by_critic_needs_one_that_reads_prefixes(c: Recipe) -> Sentences:
    if c.search is not None and c.search.value == "critic" and c.critic_reads != "tokens":
        yield (
            f"search.value = 'critic' asks a critic that reads prefixes, and objective.baseline = "
            f"{c.objective.baseline!r} has none: use algorithm = 'ppo', or value = 'steps' or 'outcomes'"
        )


def stages_go_on_by_evaluations(c: Recipe) -> Sentences:
    if c.curriculum.kind == "staged" and not c.evaluation.every:
        yield "curriculum.kind = 'staged' goes on by evaluations: set evaluation.every above 0"


def groups_have_several_samples(c: Recipe) -> Sentences:
    o, r = c.objective, c.rollout
    if o.baseline == "greedy" and r.resample:
        yield "rollout.resample looks at groups of samples: leave it out with objective.baseline = 'greedy'"
    if r.samples > 1:
        return
    if o.baseline in ("others", "group"):
        yield f"objective.baseline = {o.baseline!r} compares samples of one prompt: set rollout.samples to 2 or more"
    if o.scale == "group":
        yield "objective.scale = 'group' compares samples of one prompt: set rollout.samples to 2 or more"
    if r.resample:
        yield "rollout.resample looks at the samples of one prompt: set rollout.samples to 2 or more"


def predicted_needs_a_critic_of_prompts(c: Recipe) -> Sentences:
    if c.curriculum.kind == "predicted" and c.critic_reads != "prompt":
        yield (
            f"curriculum.kind = 'predicted' asks the critic, and objective.baseline = {c.objective.baseline!r} has "
            "none that reads the prompt: use 'critic' or 'centred', or another kind"
        )


def corrected_weights_stay(c: Recipe) -> Sentences:
    if (
        c.curriculum.kind == "predicted"
        and c.curriculum.corrected
        and (c.objective.scale == "batch" or c.rollout.resample)
    ):
        yield (
            "curriculum.kind = 'predicted' corrects each advantage for how its problem was chosen, which "
            "objective.scale = 'batch' and rollout.resample undo: leave them out, or set curriculum.corrected = false"
        )


def readers_of_step_scores_have_some(c: Recipe) -> Sentences:
    hybrid = c.objective.baseline == "hybrid"
    if not hybrid and (c.search is None or c.search.value != "steps"):
        return
    who, use = "objective.baseline = 'hybrid'" if hybrid else "search.value = 'steps'", c.reward.use
    if use == GIVEN or any(is_import(part, "sppo.rewards") for part in use.split()):
        return  # the user's own reward: known once it has judged
    if "steps:" not in use:
        yield (
            f"{who} reads the scores of a steps reward, and reward.use names none: add `+ 0 * steps:check=…,split=…` "
            "(0: measured, not paid)"
        )
    elif "split=" not in use.partition("steps:")[2]:
        yield (
            f"{who} must know where a step ends before the response goes on: name a split in reward.use, e.g. "
            "steps:check=…,split=lines"
        )


def several_turns_are_no_single_answer(c: Recipe) -> Sentences:
    if not c.environment.answers:
        return
    needs = {
        "[search]": c.search is not None,
        "objective.baseline = 'hybrid'": c.objective.baseline == "hybrid",
        "rollout.engine = 'control'": c.rollout.engine == "control",
    }
    for who, there in needs.items():
        if there:
            yield f"{who} reads responses of one turn: leave it out, or [environment]"


def adapters_stand_on_frozen_weights(c: Recipe) -> Sentences:
    if c.adapter is not None and c.rollout.engine == "control":
        yield "[adapter] is for language models: leave it out of a recipe of rollout.engine = 'control'"
    if c.adapter is None and c.policy.quantize and c.policy.model != GIVEN:
        yield f"policy.quantize = {c.policy.quantize!r} freezes the weights: add [adapter], which is trained beside them"
    if c.policy.quantize and c.policy.model == GIVEN:
        yield "policy.quantize is for models that are named: load the given model quantised instead"


def what_is_offloaded_is_not_paged(c: Recipe) -> Sentences:
    if c.training.offload and c.training.optimizer == "paged-adamw-8bit":
        yield (
            "training.offload keeps all moments in main memory, so none are paged: set optimizer = 'adamw-8bit', or "
            "leave offload out"
        )


def shards_divide_learners(c: Recipe) -> Sentences:
    if c.cluster is not None and c.cluster.shards and c.cluster.learners % c.cluster.shards:
        yield (
            f"cluster.shards = {c.cluster.shards} does not divide cluster.learners = {c.cluster.learners}: every copy of the weights is "
            "held by the same number of ranks"
        )


def what_is_sampled_ahead_needs_no_learner(c: Recipe) -> Sentences:
    if c.cluster is None:
        return
    if c.cluster.lag and c.search is not None:
        yield "[search] reads the critic as it is when a step begins, and cluster.lag samples ahead of it: leave one of them out"
    if c.cluster.lag and c.curriculum.kind == "predicted":
        yield (
            "curriculum.kind = 'predicted' asks the critic as it is when a step begins, and cluster.lag samples ahead of it: "
            "set cluster.lag = 0, or another kind"
        )


def verifiers_belong_to_a_cluster(c: Recipe) -> Sentences:
    if c.reward.workers and c.cluster is None:
        yield (
            f"reward.workers = {c.reward.workers} are processes of a cluster: give [cluster] too (--cluster.rollouts 1), or "
            "leave reward.workers out"
        )


RULES: tuple[Callable[[Recipe], Sentences], ...] = (
    stages_belong_to_staged,
    credit_per_token_needs_ratios_per_token,
    squared_value_loss_needs_a_token_critic,
    gmpo_averages_each_response,
    average_is_of_token_ratios,
    optimal_baseline_shifts_a_chance,
    baseline_weight_is_of_the_critic,
    search_learns_what_it_searches,
    minibatches_have_rollouts,
    vllm_samples_from_all_tokens,
    control_tasks_agree,
    control_has_no_text,
    search_fits_a_response,
    search_by_critic_needs_one_that_reads_prefixes,
    stages_go_on_by_evaluations,
    groups_have_several_samples,
    predicted_needs_a_critic_of_prompts,
    corrected_weights_stay,
    readers_of_step_scores_have_some,
    several_turns_are_no_single_answer,
    adapters_stand_on_frozen_weights,
    what_is_offloaded_is_not_paged,
    shards_divide_learners,
    what_is_sampled_ahead_needs_no_learner,
    verifiers_belong_to_a_cluster,
)
"""Every rule; the first sentence of the first one that a recipe breaks is its error."""
