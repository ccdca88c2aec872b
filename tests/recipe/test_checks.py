"""Each rule that compares several keys refuses a recipe that breaks it, in one sentence, and lets the nearest good one pass."""

from __future__ import annotations

import pytest

from sppo.errors import RecipeError
from sppo.recipe import checks
from sppo.recipe.checks import RULES
from sppo.recipe.config import Config
from sppo.spec import GIVEN

CONTROL = {
    "rollout.engine": "control", "task.train": "control:pendulum", "policy.model": "mlp:pendulum",
    "critic.model": "mlp:pendulum",
}  # fmt: skip
STEPS = "answer + 0 * steps:check=chain,split=lines"
TOKEN = {"objective.ratio": "token"}
STAGED = {"curriculum.kind": "staged", "curriculum.stages": [1, 2]}
SEARCH = {"search.value": "outcomes"}
ADAPTER = {"adapter.rank": 8}
PREDICTED = {"curriculum.kind": "predicted"}

BROKEN = [  # rule, a recipe that keeps it, what breaks it, words of the sentence
    (checks.several_turns_are_no_single_answer, {"environment.use": "mine:Guess"}, SEARCH, "reads responses of one turn"),
    (checks.several_turns_are_no_single_answer, {"objective.algorithm": "sppo-hybrid", "reward.use": STEPS},
     {"environment.use": "mine:Guess"}, "'hybrid' reads responses of one turn"),
    (checks.several_turns_are_no_single_answer, CONTROL, {"environment.use": "mine:Guess"}, "'control' reads"),
    (checks.stages_belong_to_staged, STAGED, {"curriculum.stages": []}, "needs stages"),
    (checks.stages_belong_to_staged, {}, {"curriculum.stages": [1]}, "belong to kind = 'staged'"),
    (checks.stages_belong_to_staged, STAGED, {"curriculum.stages": [2, 2]}, "must rise"),
    (checks.credit_per_token_needs_ratios_per_token, {"objective.baseline": "token-critic", **TOKEN},
     {"objective.ratio": "sequence"}, "set ratio = 'token'"),
    (checks.squared_value_loss_needs_a_token_critic, {"objective.algorithm": "ppo", "objective.value_clip": 0.2},
     {"objective.baseline": "critic"}, "set value_loss = 'cross-entropy'"),
    (checks.squared_value_loss_needs_a_token_critic, {"objective.algorithm": "ppo", "objective.value_clip": 0.2},
     {"objective.value_loss": "cross-entropy"}, "or value_clip = 0"),
    (checks.gmpo_averages_each_response, {"objective.algorithm": "gmpo"}, {"objective.average": "tokens"}, "'responses'"),
    (checks.average_is_of_token_ratios, {"objective.average": "constant", **TOKEN}, {"objective.ratio": "sequence"},
     "set ratio = 'token' or average = 'auto'"),
    (checks.optimal_baseline_shifts_a_chance, {"objective.algorithm": "sppo-optimal"}, {"objective.baseline": "batch"},
     "use 'critic' or 'centred'"),
    (checks.optimal_baseline_shifts_a_chance, {"objective.algorithm": "sppo-optimal"}, {"objective.scale": "batch"},
     "undoes the shift"),
    (checks.baseline_weight_is_of_the_critic, {"objective.baseline_weight": 0.5}, {"objective.baseline": "centred"},
     "needs baseline = 'critic'"),
    (checks.search_learns_what_it_searches, {"search.enough": 0.6}, {"search.below": 0.7}, "would weigh nothing"),
    (checks.minibatches_have_rollouts, {"rollout.prompts": 2}, {"training.minibatches": 3}, "only 2 rollouts"),
    (checks.vllm_samples_from_all_tokens, {"rollout.engine": "vllm"}, {"rollout.top_k": 5}, "'local'"),
    (checks.control_tasks_agree, CONTROL, {"rollout.engine": "local"}, "set rollout.engine = 'control'"),
    (checks.control_tasks_agree, CONTROL, {"task.train": "chain"}, "set task.train = 'control:pendulum'"),
    (checks.control_tasks_agree, CONTROL, {"task.train": "control:hopper"}, "'pendulum', but task.train of 'hopper'"),
    (checks.control_has_no_text, CONTROL, {"rollout.stop": ["x"]}, "are about text"),
    (checks.control_has_no_text, CONTROL, {"rollout.overlong": 0.1}, "set it to 0"),
    (checks.control_has_no_text, {**CONTROL, "rollout.samples": 2}, {"rollout.resample": 3}, "2 at most"),
    (checks.control_has_no_text, CONTROL, SEARCH, "does not have: leave it out"),
    (checks.search_fits_a_response, {**SEARCH, "rollout.max_tokens": 9}, {"search.budget": 8}, "rollout.max_tokens = 9"),
    (checks.search_by_critic_needs_one_that_reads_prefixes, {"objective.algorithm": "ppo", "search.value": "critic"},
     {"objective.algorithm": "sppo"}, "use algorithm = 'ppo'"),
    (checks.stages_go_on_by_evaluations, STAGED, {"evaluation.every": 0}, "set evaluation.every above 0"),
    (checks.groups_have_several_samples, {"objective.algorithm": "remax"}, {"rollout.resample": 1}, "leave it out"),
    (checks.groups_have_several_samples, {"objective.algorithm": "grpo"}, {"rollout.samples": 1}, "'group' compares"),
    (checks.groups_have_several_samples, {"objective.scale": "group", "rollout.samples": 2}, {"rollout.samples": 1},
     "objective.scale = 'group'"),
    (checks.groups_have_several_samples, {"rollout.resample": 1, "rollout.samples": 2}, {"rollout.samples": 1},
     "rollout.samples to 2 or more"),
    (checks.predicted_needs_a_critic_of_prompts, PREDICTED, {"objective.algorithm": "ppo"}, "has none that reads the"),
    (checks.corrected_weights_stay, {**PREDICTED, "objective.scale": "none"}, {"objective.scale": "batch"}, "undo"),
    (checks.readers_of_step_scores_have_some, {"objective.algorithm": "sppo-hybrid", "reward.use": STEPS},
     {"reward.use": "answer"}, "names none"),
    (checks.readers_of_step_scores_have_some, {"search.value": "steps", "reward.use": STEPS},
     {"reward.use": "answer + 0 * steps:check=chain"}, "name a split"),
    (checks.adapters_stand_on_frozen_weights, CONTROL, ADAPTER, r"\[adapter\] is for language models"),
    (checks.adapters_stand_on_frozen_weights, {"policy.model": "a", **ADAPTER, "policy.quantize": "nf4"},
     {"adapter": None}, r"freezes the weights: add \[adapter\]"),
    (checks.adapters_stand_on_frozen_weights, {"policy.quantize": "int8", **ADAPTER}, {"policy.model": GIVEN},
     "load the given model quantised"),
    (checks.what_is_offloaded_is_not_paged, {"training.offload": True, "training.optimizer": "adamw-8bit"},
     {"training.optimizer": "paged-adamw-8bit"}, "so none are paged"),
    (checks.shards_divide_learners, {"cluster.learners": 4, "cluster.shards": 2}, {"cluster.learners": 3}, "does not divide"),
    (checks.what_is_sampled_ahead_needs_no_learner, {"cluster.lag": 1}, SEARCH, "cluster.lag samples ahead of it: leave one"),
    (checks.what_is_sampled_ahead_needs_no_learner, {"cluster.lag": 1}, PREDICTED, "or another kind"),
    (checks.verifiers_belong_to_a_cluster, {"reward.workers": 2, "cluster.rollouts": 1}, {"cluster": None}, r"give \[cluster\] too"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "good", "change", "words"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_recipe_that_breaks_a_rule_is_refused_and_one_that_keeps_it_is_not(rule, good, change, words):
    assert rule in RULES
    kept = Config.load(None, good)
    assert list(rule(kept)) == []
    with pytest.raises(RecipeError, match=words) as error:
        Config.load(None, good | change)
    sentence = str(error.value).removeprefix("the command line: ")
    assert sentence.partition(" ")[0].strip("[]").partition(".")[0] in Config.model_fields  # it begins with a key
    assert not sentence.endswith(".")


def test_every_rule_is_tried():
    assert {rule for rule, *_ in BROKEN} == set(RULES)
    rules = {f for f in vars(checks).values() if getattr(f, "__module__", "") == checks.__name__}
    assert rules == set(RULES)


@pytest.mark.parametrize("use", [GIVEN, "mine:score", "answer + 0.5 * mine:score"])
def test_a_reward_of_the_users_own_may_measure_steps(use):
    Config.load(None, {"objective.algorithm": "sppo-hybrid", "reward.use": use})


@pytest.mark.parametrize(
    ("size", "critic", "rates"),
    [(10**6, "policy", (2e-3, 1e-3)), (10**8, "policy", (1e-4, 5e-4)), (10**8, "tiny", (1e-4, 5e-5)),
     (10**10, "policy", (1e-5, 5e-5))],
)  # fmt: skip
def test_adapters_learn_ten_times_as_fast_and_a_critic_among_them_no_faster_than_it_can(size, critic, rates):
    config = Config.load(None, {"adapter.rank": 8, "critic.model": critic})
    assert config.critic_reads is not None
    training = config.with_rates(size, size, adapted=True).training
    assert (training.lr, training.critic_lr) == pytest.approx(rates)
