"""Shared pieces: tiny real models, real rollouts. Nothing here is mocked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small to share, and spinning threads starve each other

import pytest
import torch

from sppo.kernels.cpu import build as compiled
from sppo.models import tiny
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.recipe.config import Config
from sppo.rewards.loading import load_reward
from sppo.rollout.collect import collect
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Verdict

given = [str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
root = str(
    Path(__file__).parents[1]
)  # judging workers run functions of these tests, and would not find them on their own
os.environ["PYTHONPATH"] = os.pathsep.join([*given, root])

APART = {
    "browser": ["tests/browser/"],
    "jail": [
        "tests/sandbox/", "tests/rewards/test_code.py", "tests/rewards/test_runtime.py", "tests/tasks/test_rows.py",
        "tests/tasks/test_functions.py", "tests/tools/test_python.py", "tests/run/test_turns.py",
    ],
    "slow": [
        "tests/cli/", "tests/cluster/", "tests/environments/", "tests/experimental/", "tests/fuzz/", "tests/gpu/", "tests/kernels/", "tests/mutants/",
        "tests/run/", "tests/trackers/", "tests/test_benchmarks.py", "tests/test_trainer.py", "tests/test_trainer_tools.py",
        "tests/test_cluster_sim.py::test_a_run_is_calibrated", "tests/test_cluster_sim.py::test_a_rank", "tests/test_cluster_sim.py::test_every_layout",
        "tests/evaluation/test_compare.py::test_the_command", "tests/learning/test_earned.py::test_a_run", "tests/learning/test_hybrid.py::test_a_run",
        "tests/learning/test_peers.py::test_loss_and_gradient_equal_trls", "tests/learning/test_peers.py::test_the_kl_to_the_start_equals_trls",
        "tests/models/test_unsafe.py", "tests/recipe/test_recipes.py::test_what_explores", "tests/recipe/test_recipes_of_large_models.py",
        "tests/rewards/test_growth.py",
        "tests/rewards/test_gym.py", "tests/rewards/test_quality.py", "tests/rewards/test_rewards.py::test_an_answer_is_never",
        "tests/rewards/test_rewards.py::test_one_sample", "tests/rewards/test_rewards.py::test_workers", "tests/rollout/test_served.py",
        "tests/test_own.py",
    ],
    "long": [
        "tests/cluster/test_chaos.py::test_whatever", "tests/cluster/test_runs.py::test_two_ranks",
        "tests/cluster/test_verifiers.py::test_a_verifier_that_is_stopped_while", "tests/cluster/test_verifiers.py::test_a_reward_that_cannot",
        "tests/distributed/test_gradients.py::test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process[3",
        "tests/distributed/test_gradients.py::test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process[4",
        *(
            f"tests/distributed/test_gradients.py::test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process[{case}]"
            for case in ("2-1-sppo-optimal", "2-1-gspo", "2-2-grpo-kl-loss", "2-2-lessons-and-noise", "2-2-checkpointed", "2-2-untied-by-layer",
                         "2-2-adapters-of-tokens", "2-2-offloaded", "2-2-ppo-epochs")
        ),
        "tests/cluster/test_runs.py::test_sampling_ahead", "tests/cluster/test_runs.py::test_a_trainer", "tests/cluster/test_served_workers.py::test_a_run",
        "tests/cluster/test_verifiers.py::test_a_verifier_that_is_killed_or_stopped_is_replaced[19]",
        "tests/rollout/test_served.py::test_a_server_that_dies_or_hangs", "tests/rollout/test_served.py::test_a_token_file_is_made",
        "tests/rollout/test_served.py::test_a_signal_ends", "tests/sandbox/test_sandbox.py::test_a_thousand_runs",
        "tests/rewards/test_code.py::test_no_mutant_passes", "tests/run/test_train.py::test_a_resumed_run_ends_with_the_same_bits[hybrid]",
        "tests/run/test_train.py::test_a_resumed_run_ends_with_the_same_bits[token critic of chances]",
        "tests/evaluation/test_compare.py::test_the_command", "tests/experimental/test_mcts.py::test_a_run_searches",
        "tests/rewards/test_code.py::test_every_canonical_solution_of_human_eval_passes[1]",
        *(f"tests/rewards/test_gym.py::test_a_right_answer_scores_as_in_reasoning_gym_itself[{letter}]" for letter in "bdgiklprsw"),
        "tests/rollout/test_served.py::test_a_run_through_a_server",
        "tests/run/test_train.py::test_sigkill_at_random_moments_and_resume_give_the_identical_policy[5]",
        "tests/test_benchmarks.py::test_the_gpu_benchmark",
        "tests/kernels/test_low_rank.py::test_what_is_sampled_is_the_product_written_out[x86",
        "tests/kernels/test_low_rank.py::test_in_bfloat16_it_is_as_exact_as_the_model[x86",
        *(f"tests/run/test_damage.py::test_a_damaged_{what}_is_one_sentence[{how}]" for what in ("run", "model")
          for how in ("another kind", "nested", "long number", "loop")),
        *(f"tests/run/test_damage.py::test_numbers_of_any_kind_are_one_sentence[{file}]" for file in ("start.json", "alerts.jsonl")),
        *(f"tests/environments/test_control.py::test_peers_run_on_control_tasks_and_resume_to_the_same_bits[{peer}]" for peer in ("ppo", "remax")),
        "tests/cli/test_audit.py::test_a_terminal_that_goes_away_saves_the_run[False]",
        *(f"tests/models/test_families.py::test_a_family_trains_saves_loads_and_resumes[{name}]" for name in ("Gemma 3", "Falcon-H1")),
        "tests/run/test_adapted.py::test_a_run_on_a_quantised_base_resumes_to_the_same_bits[nf4]",
        "tests/cli/test_commands.py::test_view_eval_and_solve_import_nothing_from_the_current_folder", "tests/cli/test_export.py::test_the_hub_is_where",
        "tests/cli/test_bad_input.py::test_a_package_that_is_not_installed_is_named[bitsandbytes",
        "tests/run/test_train.py::test_a_resumed_run_ends_with_the_same_bits[token critic]",
        "tests/run/test_damage.py::test_a_damaged_run_is_one_sentence[half]", "tests/run/test_damage.py::test_a_damaged_run_is_one_sentence[empty]",
        "tests/run/test_turns.py::test_a_killed_run", "tests/rewards/test_runtime.py::test_work_that_hides",
        "tests/cli/test_audit.py::test_a_verifier_of_other_code", "tests/cli/test_audit.py::test_a_run_that_cannot_be_written",
        "tests/environments/test_control.py::test_peers_run_on_control_tasks_and_resume_to_the_same_bits[sppo]",
        "tests/environments/test_control.py::test_cloning_at_a_rate",
        "tests/environments/test_control.py::test_engine_and_learner_find_the_same_log_probabilities[0.7",
        "tests/rewards/test_code.py::test_every_canonical_solution_of_human_eval_passes[4]",
        "tests/distributed/test_gradients.py::test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process[2-1-hybrid]",
        "tests/kernels/test_low_rank.py::test_in_bfloat16_it_is_as_exact_as_the_model[native-all-whole registers]",
        "tests/kernels/test_cpu_decode.py::test_in_bfloat16_it_is_as_exact_as_the_model[x86-64-v3-whole registers-llama]",
        "tests/cli/test_bad_input.py::test_a_package_that_is_not_installed_is_named", "tests/trackers/test_trackers.py::test_mlflow",
        *(f"tests/run/test_damage.py::test_rollouts_of_another_schema_are_one_sentence[{how}" for how in ("no such", "None", "value2", "\\xff")),
        "tests/run/test_damage.py::test_a_damaged_run_is_one_sentence[pipe]", "tests/run/test_damage.py::test_a_damaged_run_is_one_sentence[folder]",
        "tests/run/test_base_rate.py::test_episodes_of_a_control_task_serve_too_and_are_not_in_the_way[ppo]",
        *(f"tests/run/test_adapted.py::test_every_baseline_with_a_critic_has_it_as_an_adapter_and_resumes_to_the_same_bits[{name}]"
          for name in ("sppo-hybrid", "sppo-optimal")),
        "tests/browser/test_pages.py::test_several_runs_are_overlaid", "tests/recipe/test_recipes.py::test_what_explores_trains[search",
    ],
}  # fmt: skip
"""What `make test-fast` leaves out, by the beginning of its name: all that needs a browser or the jail, all that trains whole runs,
compares with TRL or reasoning-gym, waits for processes of its own, or compiles C for every kind of processor. `make test` leaves out what is
long."""
SAMPLED, FEW = ("tests/exact/", "tests/learning/", "tests/rollout/"), 2
"""Of a test with many cases there, it runs so many."""


FIRST = (
    "tests/run/test_plan.py", "tests/run/test_train.py", "tests/cluster/", "tests/fuzz/", "tests/run/", "tests/rewards/test_growth.py",
    "tests/environments/", "tests/cli/", "tests/browser/", "tests/models/test_families.py", "tests/rewards/", "tests/kernels/", "tests/distributed/",
)  # fmt: skip
"""What takes longest begins first, so that no process is left with it at the end; before it a plan, which measures a process that holds little yet."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The only place that says which tests are not fast, and in which order they are."""
    items.sort(key=lambda item: next((i for i, file in enumerate(FIRST) if item.nodeid.startswith(file)), len(FIRST)))
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        for marker, beginnings in APART.items():
            if item.nodeid.startswith(tuple(beginnings)):
                item.add_marker(marker)
        if "jailed" in getattr(item, "fixturenames", ()):
            item.add_marker("jail")
        if item.nodeid.startswith(SAMPLED):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        every = -(-len(same) // FEW)
        for n, item in enumerate(same):
            if n % every:
                item.add_marker("slow")


SMALL = "tiny:hidden=32,layers=2,heads=2"
STEPS = "answer + 0 * steps:check=chain,split=semicolons"
"""Measures the steps of a response, and pays nothing for them: what sppo-hybrid reads."""


def small_policy(seed: int = 0, **changes) -> Policy:
    model, tokenizer = tiny.build(seed=seed, hidden=32, layers=2, heads=2, **changes)
    return Policy(model, tokenizer)


def small_critic(seed: int = 1) -> Critic:
    backbone, tokenizer = tiny.build(seed=seed, head=False, hidden=32, layers=1, heads=2)
    return Critic(backbone, tokenizer)


def small_config(**overrides) -> Config:
    """A recipe that is done in seconds, with its ratio settled as a run would."""
    base = {
        "policy.model": SMALL, "critic.model": "tiny:hidden=32,layers=1,heads=2", "task.train": "chain:steps=1-2",
        "rollout.prompts": 16, "rollout.max_tokens": 12, "training.lr": 1e-3, "training.critic_lr": 1e-3,
        "training.steps": 3, "evaluation.n": 16, "evaluation.every": 0,
    }  # fmt: skip
    if "sppo-hybrid" in overrides.values():
        base["reward.use"] = STEPS
    return Config.load(None, base | {k.replace("__", "."): v for k, v in overrides.items()}).settled()[0]


def small_rollouts(policy: Policy, n: int = 16, *, max_tokens: int = 12, temperature: float = 1.0, **kwargs):
    source = load_tasks("chain:steps=1-2")
    return collect(
        LocalEngine(policy), policy, load_reward("answer"), [source[i] for i in range(n)],
        Sampling(max_tokens, temperature), seed=("test",), **kwargs,
    )  # fmt: skip


def graded(rollout: Rollout, score: float, correct: float | None = None) -> Rollout:
    """With a reward, how right it is where that is not the same, and what a steps reward would have measured: 0, ½ and 1 in turn."""
    steps = [{"text": "", "end": i, "score": i % 3 / 2} for i, c in enumerate(rollout.text) if c == ";"]
    outcome = "correct" if (score if correct is None else correct) >= 0.5 else "wrong"
    return rollout.judged(Verdict(score, outcome, {"steps": steps, "split": "semicolons"}, correct))


def actions_of(ids_BL: torch.Tensor, prompt_len_B: torch.Tensor, response_len_B: torch.Tensor) -> torch.Tensor:
    """The action mask of one answer per row, [B, L]."""
    column_L = torch.arange(ids_BL.size(1))
    return (column_L >= prompt_len_B[:, None]) & (column_L < (prompt_len_B + response_len_B)[:, None])


def logps_of(policy: Policy, ids_BL, prompt_len_B, response_len_B, temperature: float):
    """`Policy.logps` of one answer per row."""
    return policy.logps(ids_BL, actions_of(ids_BL, prompt_len_B, response_len_B), temperature)


def gradients_of(learner) -> list[torch.Tensor]:
    """Each update's policy gradient as one vector, from here on, just before the optimiser takes it. (Weights after Adam's first step hide
    any factor of the gradient.)"""
    seen, step = [], learner.policy_optimiser.step

    def watched(lr: float, norm: float) -> float:
        seen.append(torch.cat([p.grad.flatten().clone() for p in learner.policy.model.parameters()]))
        return step(lr, norm)

    learner.policy_optimiser.step = watched
    return seen


@pytest.fixture
def policy() -> Policy:
    return small_policy()


@pytest.fixture
def critic() -> Critic:
    return small_critic()


def targets() -> list[str]:
    """What this processor can run: registers of 4, 8 and 16 numbers on x86, and whatever more it has itself."""
    flags = Path("/proc/cpuinfo").read_text()
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
    return ["native", *(level for level, needs in levels.items() if f" {needs} " in flags)]


def forget_compiled() -> None:
    """Let every module of kernels ask for its compiled code again: what one test compiled in its own way is not what the next should run."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("sppo.kernels"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.fixture(scope="module", params=targets())
def compiled_for(request, tmp_path_factory):
    """The code for each kind of register; a warning of the compiler is an error here."""
    with pytest.MonkeyPatch.context() as patch:
        flags = [f.replace("native", request.param) for f in compiled.COMPILE]
        patch.setattr(compiled, "COMPILE", (*flags, "-Wall", "-Wextra", "-Werror"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forget_compiled()
        yield
    forget_compiled()
