"""The simulator of a cluster: cases worked by hand, and the commands in small."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sppo.errors import DataError, UserError
from sppo.run.loop import train
from sppo.run.run import Run

from .conftest import small_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name, path):
    """A script, or the package beside it; not the whole folder, whose names are those of everything."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("cluster", BENCHMARKS / "cluster" / "__init__.py")
from cluster import calibrate, events, model  # noqa: E402

layouts = load("layouts", BENCHMARKS / "layouts.py")
sim = load("cluster_sim", BENCHMARKS / "cluster_sim.py")
EVEN = model.Measured(responses=8, lengths=[[10, 1]], decode=[[1, 0.1], [8, 0.1]], train=0.01)
"""Eight responses of ten tokens: a pass takes 0.1 s however many are live, a trained token 0.01 s."""


def step(m=EVEN, **layout):
    return events.simulate(m, model.Layout(**layout))


# -- a step, by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learners", "rollouts", "seconds"), [(1, 1, 1 + 0.8), (2, 1, 1 + 0.4), (2, 8, 1 + 0.4), (8, 2, 1 + 0.1)]
)
def test_without_lag_sampling_update_transfer_and_driver_add_up(learners, rollouts, seconds):
    m = replace(EVEN, transfer=0.25, transfer_each=0.01, driver=0.05)
    found = step(m, learners=learners, rollouts=rollouts)
    assert found.step_seconds == pytest.approx(seconds + 0.25 + 0.01 * rollouts + 0.05)
    assert found.parts["sampling"] == pytest.approx(1.0)
    assert found.parts["transfer"] == pytest.approx(0.25 + 0.01 * rollouts)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert found.used["rollouts"] == pytest.approx(1 / found.step_seconds)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_a_lag_hides_an_update_as_long_as_sampling(lag):
    m = replace(EVEN, train=1 / 80)
    assert step(m).step_seconds == pytest.approx(2.0)
    found = step(m, lag=lag)
    assert found.step_seconds == pytest.approx(1.0)
    assert found.used == pytest.approx({"rollouts": 1.0, "verifiers": 0.0, "learners": 1.0})


def test_with_a_lag_the_longer_of_sampling_and_update_is_waited_for():
    assert step(lag=1).parts["sampling"] == pytest.approx(1.0)
    slow = step(replace(EVEN, train=0.05), lag=1)
    assert slow.step_seconds == pytest.approx(4.0)
    assert slow.binds == "update"
    assert slow.used["rollouts"] == pytest.approx(0.25)


def test_a_slow_verifier_binds_and_more_of_them_share_the_verdicts():
    m = replace(EVEN, verdicts=[[1.0, 1]])
    assert step(m).step_seconds == pytest.approx(1 + 8 + 0.8)
    assert step(m).binds == "verdicts"
    assert step(m, verifiers=4).step_seconds == pytest.approx(1 + 2 + 0.8)
    assert step(m, verifiers=3).parts["verdicts"] == pytest.approx(3.0)  # 3, 3 and 2 of them
    assert step(m, verifiers=100, lag=1).step_seconds == pytest.approx(1 + 1)


def test_a_worker_that_is_free_takes_the_next_chunk():
    for chunk, rollouts, rounds in ((4, 2, 1), (2, 2, 2), (3, 2, 2), (1, 3, 3), (8, 4, 1)):
        assert step(chunk=chunk, rollouts=rollouts).parts["sampling"] == pytest.approx(rounds)


def test_one_long_response_is_a_tail():
    m = replace(EVEN, lengths=[[1, 0.9], [100, 0.1]], responses=64)
    found = step(m, learners=8)
    assert found.binds == "tail"
    assert found.parts["sampling"] + found.parts["tail"] == pytest.approx(10.0)  # the longest of them


def test_an_evaluation_counts_by_its_share_of_a_step():
    m = replace(EVEN, evaluate_every=4, evaluated=16, verdicts=[[0.1, 1]])
    found = step(m, rollouts=2)
    evaluation = 2 * 1.0 + 16 * 0.1  # four chunks of four on two workers, then verdicts
    assert found.parts["evaluation"] == pytest.approx(evaluation / 4)
    assert found.step_seconds == pytest.approx(1 + 0.8 + 0.8 + evaluation / 4)


def test_workers_and_ranks_share_the_cores_of_one_machine():
    m = replace(EVEN, cores=2.0)
    assert step(m, rollouts=2).step_seconds == pytest.approx(1 + 0.8)
    assert step(m, rollouts=4).step_seconds == pytest.approx(2 + 0.8)
    assert step(m, learners=4).step_seconds == pytest.approx(1 + 0.4)
    beside = replace(m, train=1 / 80)  # a second on two workers beside a second on one rank: three on two cores
    assert step(beside, rollouts=2, lag=1).step_seconds == pytest.approx(1.5)
    two = replace(m, threads=2)  # as fast as they are together; several divide them
    assert step(two, rollouts=2).step_seconds == pytest.approx(2 + 0.8)
    assert step(replace(two, scaling=0.5), rollouts=2).step_seconds == pytest.approx(2**0.5 + 0.8)
    assert step(two, rollouts=3, chunk=3).step_seconds == pytest.approx(2 * 3 / 2 + 0.8)  # three threads on two cores


def test_a_transfer_to_each_worker_by_itself_hides_the_tail_that_a_lag_of_two_allows():
    """Lengths 1 and 100, one response per worker: together every step waits for a long one; each by itself, a worker that had a short one goes on."""
    m = replace(EVEN, lengths=[[1, 0.5], [100, 0.5]], train=1e-6, responses=64)
    together, each = (events.simulate(m, model.Layout(1, 16, 4, 1, sync=how), 32) for how in ("together", "each"))
    assert together.step_seconds > 1.05 * each.step_seconds
    assert each.step_seconds == pytest.approx(64 * 5.05 / 16, rel=0.1)  # what the workers have to do, and nothing else
    assert each.binds == "sampling"


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_passes_have_as_many_live_as_have_not_ended():
    passes, live = model.live_profile(np.array([3.0, 1.0, 1.0, 7.0]), 8)
    assert passes[np.nonzero(passes)].tolist() == [1, 2, 4]
    assert live[np.nonzero(passes)].tolist() == [4, 2, 1]
    passes, live = model.live_profile(np.array([3.0, 1.0, 1.0, 7.0]), 2)  # the second slot: 1, 1, then 7
    assert [(p, n) for p, n in zip(passes, live, strict=True) if p] == [(1, 2), (1, 2), (1, 2), (6, 1)]


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_chunks_computed_at_once_take_what_each_takes(size):
    m = replace(EVEN, decode=[[1, 0.1], [4, 0.3]], slots=6, prompt=5.0, prefill=0.01, call=0.5)
    lengths = np.random.default_rng(0).integers(1, 50, 16).astype(float)
    alone = [m.chunk_seconds(lengths[i : i + size]) for i in range(0, 16, size)]
    assert model.chunks(m, model.Layout(chunk=size), lengths) == pytest.approx(alone)


def test_passes_beyond_the_table_follow_its_last_slope():
    m = replace(EVEN, decode=[[1, 0.1], [2, 0.2], [4, 0.3]])
    assert m.pass_seconds(np.array([1, 1.5, 4, 6])).tolist() == pytest.approx([0.1, 0.15, 0.3, 0.4])


def test_rows_are_dealt_sorted_and_ranks_wait_for_the_longest():
    m = replace(EVEN, minibatch=0.5, optimiser=0.3)
    (works,) = model.update(m, model.Layout(learners=3), np.array([4.0, 1, 3, 2]), np.random.default_rng(0))
    assert works == pytest.approx([0.05 + 0.6, 0.02 + 0.6, 0.03 + 0.6])  # 1 and 4, 2, 3
    (works,) = model.update(m, model.Layout(learners=4, shards=2), np.ones(2), np.random.default_rng(0))
    assert works == pytest.approx([0.66, 0.66, 0.65, 0.65])  # two ranks have no row


def test_minibatches_hold_all_rows_once():
    m = replace(EVEN, minibatches=3)
    parts = model.update(m, model.Layout(), np.arange(1.0, 8), np.random.default_rng(0))
    assert len(parts) == 3
    assert sum(map(sum, parts)) == pytest.approx(0.28)


def test_what_ranks_exchange():
    m = replace(EVEN, gathered=8.0, reduced=16.0, bandwidth=4.0, bandwidth_between=1.0, node=4)
    for layout, micro_batches, seconds in (
        (model.Layout(1), 5, 0.0),
        (model.Layout(4), 5, 0.75 * 24 / 4),
        (model.Layout(4, gather="layer"), 5, 0.75 * (2 * 5 * 8 + 5 * 16) / 4),
        (model.Layout(4, shards=1), 5, 2 * 0.75 * 16 / 4),
        (model.Layout(8, shards=4), 5, 0.75 * 24 / 4 + 2 * 0.5 * 16 / 4 / 1),
        (model.Layout(8), 5, 7 / 8 * 24 / 1),
    ):
        assert model.exchange_seconds(m, layout, micro_batches) == pytest.approx(seconds), layout
    slow = replace(m, overlap=0.5, train=1.0)
    (works,) = model.update(slow, model.Layout(4), np.full(4, 2.0), np.random.default_rng(0))
    assert works == pytest.approx([2 + 4.5 - 1] * 4)


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def even(tmp_path):
    path = tmp_path / "even.json"
    path.write_text(json.dumps(EVEN.as_json()))
    return path


def last(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_best_split_of_eight_gpus(even, capsys):
    costs = ["--set", "train=0.05", "decode=[[1,0.1],[8,0.45]]"]
    assert sim.main(["--measured", str(even), "--gpus", "8", "--lag", "0", "1", "--json", *costs]) == 0
    rows = last(capsys)["rows"]
    m = replace(EVEN, train=0.05, decode=[[1, 0.1], [8, 0.45]])
    for lag, row in enumerate(rows):
        every = [step(m, learners=n, rollouts=8 - n, lag=lag).step_seconds for n in range(1, 8)]
        assert row["step_seconds"] == pytest.approx(min(every), rel=0.01)
        assert row["learners"] + row["rollouts"] == 8
        assert sum(row["parts"].values()) == pytest.approx(row["step_seconds"])


def test_splits_of_one_to_4096_gpus_for_every_lag(even, capsys):
    wide = ["--set", "responses=512", 'lengths={"lognormal":0.8,"mean":40,"limit":200}', "transfer=0.1"]
    asked = ["--gpus", "1", "3", "4096", "--lag", *"01234", "--steps", "2", "--json"]
    assert sim.main(["--measured", str(even), *asked, *wide]) == 0
    rows = last(capsys)["rows"]
    assert [(r["gpus"], r["lag"]) for r in rows] == [(1, 0), *((n, lag) for n in (3, 4096) for lag in range(5))]
    assert all(r["learners"] + r["rollouts"] == max(2, r["gpus"]) for r in rows)
    assert all(0 <= share <= 1 + 1e-9 for r in rows for share in r["used"].values())
    assert rows[0]["step_seconds"] > rows[1]["step_seconds"] > rows[6]["step_seconds"]


def test_shards_and_gpus_per_worker_limit_the_splits(even, capsys):
    asked = ["--gpus", "16", "--shards", "4", "--rollout-gpus", "4", "--lag", "0", "--json"]
    assert sim.main(["--measured", str(even), *asked]) == 0
    (row,) = last(capsys)["rows"]
    assert (row["learners"] % 4, row["learners"] + 4 * row["rollouts"]) == (0, 16)
    assert sim.main(["--measured", str(even), "--gpus", "4", "--shards", "4"]) == 2
    assert "no split" in capsys.readouterr().err


def test_predictions_are_checked_against_measured_steps(even, tmp_path, capsys):
    taken = [
        {"learners": 1, "rollouts": 2, "lag": 0, "step_seconds": 2.0},
        {"learners": 1, "rollouts": 1, "lag": 1, "step_seconds": 0.9, "responses": 16},
    ]
    (tmp_path / "taken.json").write_text(json.dumps(taken))
    asked = ["--measured", str(even), "--check", str(tmp_path / "taken.json"), "--json"]
    assert sim.main(asked) == 1
    found = last(capsys)
    assert [c["error"] for c in found["checks"]] == pytest.approx([1.8 / 2 - 1, 1.6 / 0.9 - 1])
    assert found["worst"] == pytest.approx(0.7 / 0.9)
    assert not found["ok"]
    assert sim.main([*asked, "--within", "0.8"]) == 0
    assert last(capsys)["ok"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "name a calibration"),
        (["--measured", "nowhere.json"], "nowhere.json is no calibration: no such file"),
        (["--measured", "EVEN", "--set", "decode=[[2,1],[1,1]]"], "`decode` is pairs"),
        (["--measured", "EVEN", "--set", "speed=1"], "has no speed"),
        (["--measured", "EVEN", "--set", "train=fast"], "--set train=fast"),
        (["--measured", "EVEN", "--learners", "4", "--shards", "3"], "does not divide"),
        (["--measured", "EVEN", "--check", "EVEN"], "no list of measured steps"),
        (["--calibrate", "nowhere"], "nowhere"),
        (["--assume", "9B"], "no shape 9B"),
    ],
)
def test_nonsense_is_one_sentence(asked, said, even, capsys):
    assert sim.main([str(even) if word == "EVEN" else word for word in asked]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("1.5B", 1_543_714_304), ("8B", 8_030_261_248), ("32B", 32_763_876_352), ("70B", 70_553_706_496)],
)
def test_shapes_have_the_published_numbers_of_weights(name, parameters):
    assert layouts.outline(name).parameters == parameters


def test_a_rank_that_holds_all_weights_needs_what_one_process_does_but_for_sampling():
    for name in ("1.5B", "8B"):  # the critic's update is the larger phase of the first, the policy's of the second
        critic = layouts.outline("critic", head=False)
        one = layouts.plan(
            layouts.recipe(1, 8192, {}), layouts.outline(name), critic, layouts.CUDA, layouts.PROMPT_MEAN, layouts.GPU
        )
        phases = max(sum(parts.values()) for phase, parts in one.phases.items() if phase != "sampling")
        assert sum(layouts.learner_bytes(name, 1, "update").values()) == sum(one.stays.values()) + phases


def test_shards_divide_what_is_held_between_ranks_and_nothing_else():
    of = {n: layouts.learner_bytes("8B", n, "layer") for n in (8, 16)}
    divided = {"masters and moments", "gradients of the shard", "critic and its optimiser"}
    for part, size in of[8].items():
        assert of[16][part] == (size // 2 if part in divided else size), part
    assert of[8]["masters and moments"] == 12 * 8_030_261_248 // 8
    update = layouts.learner_bytes("8B", 8, "update")
    assert update["weights put together"] == 2 * 8_030_261_248
    assert update["gradients before they are added up"] == 4 * 8_030_261_248


def test_every_layout_of_the_table_fits_and_its_parts_add_up():
    for planned in layouts.TABLE:
        row = layouts.row(planned)
        assert row["fits"] == (planned.model != "70B"), row  # which a rank cannot load before it is divided
        assert planned.learners % planned.shards == 0
        assert sum(row["learner_bytes"].values()) / layouts.GIB == pytest.approx(row["learner_gib"])
        page = (BENCHMARKS.parent / "docs/scale.md").read_text()
        sums, workers = (
            next(x for x in page.splitlines() if x.startswith(name)) for name in ("| **sum**", "| a rollout worker")
        )
        assert f"**{row['learner_gib']:.1f}**" in sums
        assert f" {row['rollout_gib']:.1f} " in workers
        for found in row["simulated"]:
            assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])


# -- calibration -------------------------------------------------------------------------------------------------------


def test_least_squares_finds_what_made_the_seconds_and_nothing_below_zero():
    random = np.random.default_rng(0)
    rows = random.uniform(1, 5, (40, 3))
    found, error = calibrate.least_squares(rows, rows @ [0.5, 0.0, 2.0])
    assert found == pytest.approx([0.5, 0.0, 2.0], abs=1e-9)
    assert error == pytest.approx(0.0, abs=1e-9)
    stalled = rows @ [0.5, 0.0, 2.0]
    stalled[3] *= 40  # the machine stood still
    assert calibrate.least_squares(rows, stalled)[0] == pytest.approx([0.5, 0.0, 2.0], abs=0.1)
    assert min(calibrate.least_squares(rows, rows @ [1.0, -0.2, 1.0])[0]) == 0.0


def test_steps_that_do_not_differ_are_explained_by_their_tokens():
    random = np.random.default_rng(1)
    rows = np.stack([np.full(12, 2.0), random.uniform(990, 1010, 12)], 1)
    seconds = 0.01 * rows[:, 1] * random.uniform(0.8, 1.25, 12)  # noise, in which no share of a constant can be seen
    (minibatch, train), _ = calibrate.least_squares(rows, seconds, rest=1)
    assert train == pytest.approx(0.01, rel=0.25)
    assert minibatch * 2 < 0.3 * seconds.mean()
    (minibatch, train), _ = calibrate.least_squares(rows, 5 + 1e-12 * rows[:, 1] + (1010 - rows[:, 1]) / 10, rest=1)
    assert train > 0  # fewer tokens took longer
    apart = np.stack([np.full(12, 2.0), np.linspace(100, 2000, 12)], 1)
    found, _ = calibrate.least_squares(apart, apart @ [3.0, 0.01], rest=1)
    assert found == pytest.approx([3.0, 0.01], rel=0.1)  # where steps differ, both are seen


def test_a_calibration_without_the_parts_it_needs_is_refused():
    with pytest.raises(DataError, match="needs decode, train"):
        model.Measured.of({"responses": 1, "lengths": [[1, 1]]})
    with pytest.raises(UserError, match="no such layout"):
        model.Layout(rollouts=0)


def test_a_run_is_calibrated_and_its_steps_are_checked(tmp_path, capsys):
    config = small_config(run__out=str(tmp_path / "run"), rollout__batch=8, monitors__action="off")
    run = Run.new(config)
    try:
        train(run)
    finally:
        run.close()
    files = [str(tmp_path / "run"), "--skip", "0"]
    out = tmp_path / "found.json"
    assert sim.main(["--calibrate", *files, "--out", str(out), "--json"]) == 0
    found = last(capsys)
    assert found == json.loads(out.read_text())
    assert (found["responses"], found["slots"], found["minibatches"]) == (16, 8, 2)
    assert sum(weight for _, weight in found["lengths"]) == 3 * 16
    assert [live for live, _ in found["decode"]] == [1, 2, 4, 8]
    assert 0 < found["decode"][0][1] <= found["decode"][-1][1]
    assert len(found["verdicts"]) == 16
    assert sim.main(["--measured", str(out), "--check", *files, "--within", "1e9", "--json"]) == 0
    (checked,) = last(capsys)["checks"]
    phases = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (
        checked["step_seconds"] == sorted(sum(v for k, v in m.items() if k.startswith("seconds/")) for m in phases)[1]
    )
    assert checked["predicted"] > 0
    assert sim.main(["--calibrate", *files[:1], "--skip", "3"]) == 2
    assert "no more than 3 steps" in capsys.readouterr().err
