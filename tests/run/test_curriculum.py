"""Which problems come next: choices whose expectation is exact, stages that begin on evidence, problems that rest."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from sppo.errors import DataError, RecipeError
from sppo.experimental.predicted import Predicted, systematic
from sppo.recipe.config import Config
from sppo.recipe.sections import CurriculumSection
from sppo.run.curriculum import Aside, Staged, Uniform, curriculum
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.tasks.base import ListSource
from sppo.tasks.records import task_from
from sppo.types import Rollout, Task, Verdict

from ..conftest import SMALL, small_config


def tasks(count: int, dial: bool = True) -> list[Task]:
    return [
        Task(f"t{i}", f"{i}?", {"answer": "1"}, difficulty=float(1 + i % 6) if dial else None) for i in range(count)
    ]


def judged(task: Task, correct: float, outcome: str = "correct", sample: int = 0) -> Rollout:
    return Rollout.answer(task, [1], [2], [-1.0], "stop", "", sample, Verdict(correct, outcome))  # type: ignore[arg-type]


class Oracle:
    """A critic that knows; only its logits are asked for."""

    def __init__(self, value: dict[str, float]) -> None:
        self.value = value

    def logits(self, tasks: list[Task], token_budget: int) -> torch.Tensor:
        return torch.tensor([self.value[t.id] for t in tasks]).logit()


# -- systematic choice ------------------------------------------------------------------------------------------------


def expectation(weight: np.ndarray, n: int, f: np.ndarray) -> float:
    """E[Σ over the chosen f] exactly: the choice changes only at finitely many values of the random number."""
    edges = np.cumsum(weight) / weight.sum() * n
    breaks = sorted({0.0, 1.0, *(e % 1.0 for e in edges)})
    return sum((b - a) * f[systematic(weight, n, (a + b) / 2)].sum() for a, b in itertools.pairwise(breaks))


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_choice_and_correction_together_are_the_uniform_mean(n, seed):
    rng = np.random.default_rng(seed)
    weight, f = rng.random(11) + 0.05, rng.normal(size=11)
    factor = weight.mean() / weight
    assert expectation(weight, n, f * factor) / n == pytest.approx(f.mean(), abs=1e-12)
    assert abs(expectation(weight, n, f) / n - f.mean()) > 1e-3  # the control: without the correction another objective
    assert expectation(weight, n, f) / n == pytest.approx((f * weight).sum() / weight.sum(), abs=1e-12)


def test_nothing_is_chosen_a_whole_time_more_or_less_than_its_share():
    weight = np.array([0.1, 2.0, 0.5, 0.4])
    for uniform in np.linspace(0, 1, 50, endpoint=False):
        counts = np.bincount(systematic(weight, 6, uniform), minlength=4)
        assert (np.abs(counts - 6 * weight / weight.sum()) < 1).all()
        assert counts.sum() == 6


# -- predicted --------------------------------------------------------------------------------------------------------


def predicted(**changes) -> tuple[Predicted, dict[str, float]]:
    source = tasks(40)
    value = {t.id: (0.5 if i % 2 else 0.999) for i, t in enumerate(source)}
    section = CurriculumSection(kind="predicted", **changes)
    return Predicted(section, ListSource(source), 0, lambda t: None, Oracle(value)), value  # type: ignore[arg-type]


def test_open_problems_are_drawn_more_and_count_less():
    made, value = predicted(floor=0.1, pool=4)
    drawn = [t for _ in range(20) for t in made.sample(10)]
    share = sum(value[t.id] == 0.5 for t in drawn) / len(drawn)
    w = [0.6, 0.1 + (0.999 * 0.001) ** 0.5]
    assert share == pytest.approx(w[0] / sum(w), abs=0.05)  # 200 draws; the expectation is tested exactly above
    for t in drawn:
        assert t.weight == pytest.approx(sum(w) / 2 / (w[0] if value[t.id] == 0.5 else w[1]), rel=1e-3)
    assert np.mean([t.weight for t in drawn]) == pytest.approx(1, abs=0.15)
    assert made.position == 20 * 10 * 4
    assert made.metrics()["curriculum/weight_max"] > 2 > made.metrics()["curriculum/weight_min"] > 0


def test_the_biased_option_leaves_weights_alone():
    made, value = predicted(corrected=False)
    drawn = [t for _ in range(10) for t in made.sample(10)]
    assert {t.weight for t in drawn} == {1.0}
    assert sum(value[t.id] == 0.5 for t in drawn) > 75


def test_it_goes_on_where_it_was():
    one, _ = predicted()
    one.sample(5)
    state = one.state_dict()
    then = one.sample(8)
    other, _ = predicted()
    other.load_state_dict(state)
    assert other.sample(8) == then


# -- staged -----------------------------------------------------------------------------------------------------------


def staged(**changes) -> Staged:
    section = CurriculumSection(kind="staged", stages=(2, 4, 6), **changes)
    return Staged(section, ListSource(tasks(60)), 0, lambda t: None, tasks(60))


def heard(made: Staged, accuracy: dict[int, float], n: int = 200) -> str | None:
    """An evaluation with these accuracies by stage."""
    rollouts = []
    for stage, share in accuracy.items():
        for i in range(n):
            task = Task(f"h{stage}/{i}", "?", difficulty=2.0 * stage + 1 + i % 2)
            rollouts.append(judged(task, float(i < share * n)))
    return made.evaluated(rollouts, 1)


def test_stages_begin_when_the_interval_clears_and_rehearse_the_earlier_ones():
    made = staged(clear=0.6, rehearse=0.25)
    assert {t.difficulty for t in made.sample(16)} == {1.0, 2.0}
    assert heard(made, {0: 0.65, 1: 0.1, 2: 0.0}) is None  # 0.65 of 200: the lower end is 0.58
    assert made.stage == 0
    assert "difficulty 2 to 4" in str(heard(made, {0: 0.75, 1: 0.1, 2: 0.0}))
    drawn = made.sample(16)
    assert sum(t.difficulty in (3.0, 4.0) for t in drawn) == 12
    assert sum(t.difficulty in (1.0, 2.0) for t in drawn) == 4
    assert made.metrics()["curriculum/stage"] == 2
    assert made.metrics()["curriculum/accuracy"] == pytest.approx(0.1)
    other = staged(clear=0.6, rehearse=0.25)
    other.load_state_dict(made.state_dict())
    assert other.sample(16) == made.sample(16)


def test_stages_that_are_known_already_are_passed_at_once():
    made = staged(clear=0.6)
    assert "stage 3 of 3" in str(heard(made, {0: 0.9, 1: 0.9, 2: 0.99}))
    assert made.stage == 2
    assert heard(made, {0: 0.9, 1: 0.9, 2: 0.99}) is None  # there is no fourth


def test_samples_of_a_problem_are_no_independent_problems_and_masked_ones_say_nothing():
    made = staged(clear=0.6)
    task = Task("h", "?", difficulty=1.0)
    assert made.evaluated([judged(task, 1.0, sample=k) for k in range(64)], 64) is None
    sure = [judged(Task(f"h{i}", "?", difficulty=1.0), 1.0, "infra_error") for i in range(300)]
    assert made.evaluated(sure, 1) is None
    assert made.stage == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"source": tasks(9, dial=False)}, "needs problems with a dial"),
        ({"held_out": [t for t in tasks(60) if t.difficulty != 5.0 and t.difficulty != 6.0]}, "above 4 and up to 6"),
    ],
)
def test_a_curriculum_without_a_dial_is_refused(change, why):
    made = {"source": tasks(60), "held_out": tasks(60)} | change
    with pytest.raises(RecipeError, match=why):
        Staged(
            CurriculumSection(kind="staged", stages=(2, 4, 6)), ListSource(made["source"]), 0, lambda t: None, made["held_out"]
        )  # fmt: skip


def test_a_stage_without_training_problems_says_so():
    made = Staged(
        CurriculumSection(kind="staged", stages=(2, 4, 6)), ListSource([t for t in tasks(60) if t.difficulty > 2]), 0, lambda t: None, tasks(60)
    )  # fmt: skip
    with pytest.raises(DataError, match=r"none of the 40 training prompts.*its difficulty is"):
        made.sample(4)


# -- resting ----------------------------------------------------------------------------------------------------------


def test_what_teaches_nothing_rests_and_comes_back():
    a, b = tasks(2)
    made = Aside(after=2, epochs=2)
    for epoch in range(2):
        made.observe([judged(a, 1.0), judged(b, float(epoch))], epoch)
    assert made.rests(a.id, 2)
    assert made.rests(a.id, 3)
    assert not made.rests(b.id, 2)
    assert len(made) == 1
    assert not made.rests(a.id, 4)  # back
    made.observe([judged(a, 1.0)], 4)
    assert made.rests(a.id, 5)  # one visit is enough now
    assert not made.rests(a.id, 7)
    made.observe([judged(a, 0.0)], 7)
    assert not made.rests(a.id, 8)


def test_samples_that_differ_partial_scores_and_masked_ones_do_not_rest():
    (a,) = tasks(1)
    made = Aside(after=1, epochs=1)
    made.observe([judged(a, 1.0), judged(a, 0.0, sample=1)], 0)
    made.observe([judged(a, 0.5)], 0)
    made.observe([judged(a, 0.0, "infra_error")], 0)
    assert not made.rests(a.id, 1)
    made.observe([judged(a, 0.0), judged(a, 0.0, sample=1)], 1)
    assert made.rests(a.id, 2)


def test_when_all_rest_they_wake():
    section = CurriculumSection(aside=1, revisit=5)
    made = Uniform(section, ListSource(tasks(6)), 0, lambda t: None)
    for _ in range(4):
        made.observe([judged(t, 1.0) for t in made.sample(6)])
    assert made.metrics() == {"curriculum/aside": 6}
    assert len({t.id for t in made.sample(6)}) == 6
    assert made.passed_over == 0


def test_uniform_is_what_it_was():
    made = Uniform(CurriculumSection(), ListSource(tasks(10)), 3, lambda t: None)
    assert len({t.id for t in made.sample(10)}) == 10
    assert {t.weight for t in made.sample(10)} == {1.0}


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_names_and_sentences():
    assert small_config().curriculum.kind == "uniform"
    for changes, why in (
        ({"curriculum.kind": "staged"}, "needs stages"),
        ({"curriculum.stages": [2, 3]}, "stages belong to"),
        ({"curriculum.kind": "staged", "curriculum.stages": [3, 3]}, "must rise"),
        ({"curriculum.kind": "predicted", "objective.algorithm": "reinforce"}, "asks the critic"),
        ({"curriculum.floor": 0}, "greater than 0"),
    ):
        with pytest.raises(RecipeError, match=why):
            Config.load(None, {"policy.model": SMALL} | changes)
    with pytest.raises(RecipeError, match="has none that reads"):
        curriculum(CurriculumSection(kind="predicted"), ListSource(tasks(3)), 0, lambda t: None, None, [])
    assert task_from({"question": "?", "answer": "1", "level": 3}, "f:1").difficulty == 3
    assert task_from({"question": "?", "answer": "1", "level": "Level 3"}, "f:1").difficulty is None


@pytest.mark.parametrize(
    "changes",
    [
        {"curriculum.kind": "predicted", "curriculum.pool": 3},
        {"curriculum.kind": "staged", "curriculum.stages": [1, 2], "curriculum.clear": 0.01, "evaluation.every": 1},
        {"curriculum.aside": 1},
    ],
)
def test_a_run_resumes_to_the_same_bits(tmp_path, changes):
    def run(name: str, **more):
        config = small_config(
            **{"run.out": str(tmp_path / name), "training.steps": 4, "run.checkpoint_every": 2} | changes | more
        )
        job = Run.new(config)
        train(job)
        job.close()
        return job

    whole = run("whole")
    broken = run("broken", **{"training.steps": 2})
    again = Run.resume(broken.components.directory.path, steps=4)
    train(again)
    again.close()
    assert again.components.policy.fingerprint() == whole.components.policy.fingerprint()
    assert again.components.curriculum.state_dict() == whole.components.curriculum.state_dict()
    lines = [json.loads(line) for line in (whole.components.directory.path / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("curriculum/") for key in lines[-1])


def test_the_weight_reaches_the_advantage(tmp_path):
    keys = {"curriculum.kind": "predicted", "objective.algorithm": "sppo"}  # whose baseline learns nothing from a batch
    config = small_config(**{"run.out": str(tmp_path / "run"), **keys})
    job = Run.new(config)
    job.begin()
    from sppo.learning.batch import pack
    from sppo.run.sample import sample

    sampled = sample(job.components, 0)
    batch = pack(sampled.rollouts, job.components.policy.pad_id)
    batch.weight_B = torch.linspace(0.5, 2, len(batch))
    weighted, _, _ = job.learner.advantage(batch)
    batch.weight_B = None
    bare, _, _ = job.learner.advantage(batch)
    assert torch.allclose(weighted, bare * torch.linspace(0.5, 2, len(batch)))
    job.close()


def test_a_key_that_nothing_reads_is_said():
    assert small_config().without_effect() == []
    found = small_config(
        **{
            "objective.algorithm": "grpo",
            "objective.gae_lambda": 0.5,
            "rollout.segments": "tokens",
            "curriculum.pool": 9,
        }
    ).without_effect()
    assert [why.partition(" ")[0] for why in found] == ["objective.gae_lambda", "rollout.segments", "curriculum.pool"]
    assert found[0] == "objective.gae_lambda has no effect here: it needs objective.baseline = 'token-critic'"
    assert small_config(**{"objective.algorithm": "ppo", "objective.gae_lambda": 0.5}).without_effect() == []
