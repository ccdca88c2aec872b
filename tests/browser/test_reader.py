"""What the pages are made of, without a browser: numbers that follow a growing run, filters against brute force, sentences, odd addresses."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from itertools import product

import numpy as np
import pyarrow.parquet as pq
import pytest

from sppo.errors import RecipeError, UserError
from sppo.recipe.config import Config
from sppo.report import panels
from sppo.report.reader import RunReader, open_runs
from sppo.report.rollouts import Filter
from sppo.report.single import write
from sppo.report.summary import summarise


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def everything(run):
    out = []
    for path in sorted((run / "rollouts").glob("*.parquet")):
        out += [{**r, "row": i} for i, r in enumerate(pq.read_table(path).to_pylist())]
    return out


def test_what_evaluations_measure_beside_accuracy_is_told(copy):
    """pass@k of the largest k, and entropy, from the evaluation before the first step on; nothing of either where an older run has none."""
    start = json.loads((copy / "start.json").read_text())
    (copy / "start.json").write_text(json.dumps(start | {"entropy": 0.5, "pass_at_k": {"pass@1": 0.1, "pass@4": 0.2}}))
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        if line.get("eval/accuracy") is not None:
            line |= {"eval/pass@2": 0.3, "eval/pass@4": (40 + n) / 100, "eval/entropy": None if n < 2 else 0.25}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = RunReader(copy)
    tiles = {t["kind"]: t for t in summarise(reader)["tiles"]}
    assert (tiles["pass"]["name"], tiles["pass"]["value"], tiles["entropy"]["value"]) == (
        "held-out pass@4",
        "45.0%",
        "0.250",
    )
    figures = {f["id"]: f for f in panels.overview([reader])}
    assert figures["passes"]["title"] == "Held-out pass@4"
    assert (figures["passes"]["traces"][0]["x"], figures["passes"]["traces"][0]["y"]) == (
        [0, 2, 4, 6],
        [0.2, 0.41, 0.43, 0.45],
    )
    assert (figures["held-entropy"]["traces"][0]["x"], figures["held-entropy"]["traces"][0]["y"]) == (
        [0, 4, 6],
        [0.5, 0.25, 0.25],
    )
    for line in lines:
        for key in [k for k in line if k == "eval/entropy" or k.startswith("eval/pass@")]:
            del line[key]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "start.json").write_text(json.dumps({k: v for k, v in start.items() if k not in ("entropy", "pass_at_k")}))
    old = RunReader(copy)
    assert not {"pass", "entropy"} & {t["kind"] for t in summarise(old)["tiles"]}
    assert not {"passes", "held-entropy"} & {f["id"] for f in panels.overview([old])}


@pytest.mark.parametrize("want", [
    Filter(), Filter(first=2), Filter(last=3), Filter(first=1, last=1), Filter(outcome="correct"), Filter(outcome="wrong", first=4),
    Filter(shortest=6, longest=9), Filter(lowest=0.0), Filter(highest=-0.2), Filter(surprised=True), Filter(clipped=True), Filter(task="/TRAIN/1"),
    Filter(first=99), Filter(first=3, last=2),
])  # fmt: skip
def test_filters_against_brute_force(run, want):
    def keep(r):
        surprise = None if r["masked"] else abs(r["correct"] - r["value"])
        return (
            (want.first is None or r["step"] >= want.first) and (want.last is None or r["step"] <= want.last)
            and (not want.outcome or r["outcome"] == want.outcome) and (want.task.lower() in r["task_id"].lower())
            and (want.shortest is None or r["tokens"] >= want.shortest) and (want.longest is None or r["tokens"] <= want.longest)
            and (want.lowest is None or r["advantage"] >= want.lowest) and (want.highest is None or r["advantage"] <= want.highest)
            and (not want.surprised or surprise >= 0.8) and (not want.clipped or r["clipped"] > 0)
        )  # fmt: skip

    expected = [r for r in everything(run) if keep(r)]
    expected.sort(key=lambda r: (-r["step"], r["row"]))
    reader = RunReader(run)
    for start, count in product((0, 7, 59, 60, 61), (5, 130)):
        total, rows = reader.rollouts.find(want, start, count)
        assert total == len(expected)
        assert [(r["step"], r["row"]) for r in rows] == [(r["step"], r["row"]) for r in expected[start : start + count]]
        assert [r["response"] for r in rows] == [r["response"][:400] for r in expected[start : start + count]]


def test_beside_walks_over_the_ends_of_steps(run):
    reader = RunReader(run)
    assert reader.rollouts.beside(0, 0) == (None, (0, 1))
    assert reader.rollouts.beside(2, 0) == ((1, 59), (2, 1))
    assert reader.rollouts.beside(5, 59) == ((5, 58), None)
    assert reader.rollouts.beside(5, 60) == (None, None)
    assert reader.rollouts.one(5, 60) is None
    assert reader.rollouts.one(77, 0) is None


def test_numbers_follow_a_file_that_grows_is_cut_and_written_anew(copy):
    reader = RunReader(copy)
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(reader.metrics()) == 6
    with path.open("a") as file:
        file.write('{"step": 6, "reward/me')
    assert len(reader.metrics()) == 6  # half a line is no line yet
    with path.open("a") as file:
        file.write('an": 0.5}\nnot json\n[1]\n')
    assert [m["step"] for m in reader.metrics()] == list(range(7))
    other = copy / "other"
    other.write_text("".join(lines[:2]))
    other.rename(path)
    assert [m["step"] for m in reader.metrics()] == [0, 1]


def test_a_recipe_that_changes_and_a_summary_of_before(copy):
    reader = RunReader(copy)
    assert reader.summary()["stopped"] == "finished"
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 9"))
    assert reader.config.training.steps == 9
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/mean": 0.5}\n')
    assert reader.summary() == {}
    assert "interrupted" in summarise(reader)["sentence"]


def test_a_rollouts_file_that_is_made_again_or_damaged(copy):
    reader = RunReader(copy)
    assert (
        reader.rollouts.find(Filter(outcome="correct", first=5))[0]
        == reader.rollouts.find(Filter(outcome="correct", first=5))[0]
    )
    path = copy / "rollouts/step-000005.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 10), path)
    assert reader.rollouts.find(Filter(first=5))[0] == 10
    assert reader.rollouts.index().num_rows == 310
    path.write_bytes(b"PAR1 nonsense")
    assert reader.rollouts.find(Filter(first=5))[0] == 0
    assert reader.rollouts.index().num_rows == 300
    assert reader.rollouts.one(5, 0) is None


@pytest.mark.parametrize(("before", "after", "says"), [
    ((0.2, 0.15, 0.25), (0.6, 0.5, 0.7), "rose from 20.0% to 60.0%"), ((0.6, 0.5, 0.7), (0.2, 0.1, 0.3), "fell from 60.0% to 20.0%"),
    ((0.5, 0.4, 0.6), (0.55, 0.45, 0.65), "no change beyond chance"),
])  # fmt: skip
def test_the_sentence_does_not_claim_what_intervals_do_not(copy, before, after, says):
    (copy / "start.json").write_text(json.dumps(dict(zip(("accuracy", "low", "high"), before, strict=True))))
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= dict(zip(("eval/accuracy", "eval/low", "eval/high"), after, strict=True))
    (copy / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert says in summarise(RunReader(copy))["sentence"]


def test_an_alert_about_the_verifier_casts_doubt(copy):
    assert summarise(RunReader(copy))["doubt"] == ""
    (copy / "alerts.jsonl").write_text(
        '{"monitor": "reference", "what": "paid", "step": 3, "evidence": [1, "3:4"]}\n"no object"\n'
    )
    told = summarise(RunReader(copy))
    assert "Do not believe" in told["doubt"]
    [alert] = told["alerts"]
    assert alert["evidence"] == ["3:4"]
    assert alert["since"] == "?"


def test_curves_are_thinned_and_smoothed_without_a_shift():
    x, y = panels._thin(list(range(10_000)), [float(i) for i in range(10_000)])
    assert len(x) <= 2 * panels.POINTS
    assert x == [int(v) for v in y]
    assert panels._smoothed([1.0] * 50) == [1.0] * 50
    ramp = np.arange(100, dtype=float)
    assert panels._smoothed(ramp.tolist())[50] == pytest.approx(50.0)


def test_two_runs_of_one_name_are_told_apart(run, copy, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copytree(copy, tmp_path / "a" / "run")
    assert [r.name for r in open_runs([str(copy), str(tmp_path / "a" / "run")])] == [
        str(copy),
        str(tmp_path / "a" / "run"),
    ]
    with pytest.raises(UserError, match="is not a run directory"):
        open_runs([str(tmp_path)])
    (copy / "recipe.toml").write_text("[policy\nmodel = 1\n")
    with pytest.raises(UserError, match="not valid TOML"):
        open_runs([str(copy)])
    (copy / "recipe.toml").write_text("policy = 3\n")
    with pytest.raises(UserError, match=r"recipe.toml: policy"):
        open_runs([str(copy)])


def test_a_run_of_another_version_can_be_looked_at(copy):
    """A value that is not known here is shown as it stands, a key that is not known here is left out; nothing warns."""
    recipe = copy / "recipe.toml"
    text = recipe.read_text()
    now = 'algorithm = "sppo"'
    assert now in text
    recipe.write_text(text.replace(now, 'algorithm = "of-old"\nforgotten = 1'))
    with pytest.raises(RecipeError):
        Config.load(recipe)
    page, card = write(RunReader(copy), copy / "report")
    assert "of-old" in page.read_text()
    assert "trained with `of-old`" in card.read_text()
    assert "forgotten" not in page.read_text()


@pytest.mark.parametrize("query", [
    "run=²", "start=²", "start=" + "9" * 5000, "run=" + "9" * 400, "shortest=" + "9" * 30, "first=-1e400", "lowest=nan", "highest=inf", "first=%00",
    "task=" + "x" * 5000, "order=;drop", "outcome=<b>", "surprised=&clipped=", "start=-1",
])  # fmt: skip
def test_odd_addresses_get_a_page(run, serve, query):
    address = serve(run).rstrip("/")
    quoted = urllib.request.quote(query, safe="=&%")
    for page in ("rollouts", "rollouts/2/3", "critic", "data/critic", "data/overview"):
        with urllib.request.urlopen(f"{address}/{page}?{quoted}") as answer:
            assert answer.status == 200
            if page.startswith("data"):
                json.loads(answer.read())
    for page in (
        "rollouts/99999999999999999999/0",
        "rollouts/1/99999999999",
        "static/../reader.py",
        "static/%2e%2e/reader.py",
        "data/nothing",
        "x",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/{page}")
        assert refused.value.code == 404
        refused.value.close()
