"""Monitors inside a run: alerts on disk and on the terminal, the same after a resume; quarantine masks; stop stops, and the run can be resumed."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from sppo.cli.main import main
from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import small_config

HOLE = "tests.run.test_monitors:pays_always"


def pays_always(prompts, completions, answer):
    """The widest hole there is."""
    return [1.0] * len(answer)


def a_run(out, steps=6, stop_after=None, **changes):
    config = small_config(
        **{"run.out": str(out), "reward.use": HOLE, "training.steps": steps, "run.checkpoint_every": 2, **changes}
    )
    job = Run.new(config)
    if stop_after is not None:
        record = job.record

        def recording(step, *rest):
            record(step, *rest)
            if step == stop_after:
                job.interrupt()

        job.record = recording
    try:
        return train(job)
    finally:
        job.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_monitors(out):
    return [{k: v for k, v in m.items() if k.startswith(("monitor/", "text/"))} for m in lines(out / "metrics.jsonl")]


def test_an_alert_is_written_down_and_survives_a_resume(tmp_path):
    a_run(tmp_path / "whole")
    alerts = lines(tmp_path / "whole" / "alerts.jsonl")
    assert [a["monitor"] for a in alerts] == ["reference"]
    assert alerts[0]["step"] <= 1
    assert all(i.split(":")[0] in "01" for i in alerts[0]["evidence"])
    for after in (0, 3):
        out = tmp_path / f"cut-{after}"
        a_run(out, stop_after=after)
        job = Run.resume(out)
        train(job)
        job.close()
        assert lines(out / "alerts.jsonl") == alerts
        assert of_monitors(out) == of_monitors(tmp_path / "whole")


def test_what_was_raised_after_the_last_checkpoint_is_raised_again(tmp_path):
    """A crash between checkpoints: the lines of lost steps go, and come back the same."""
    out = tmp_path / "run"
    a_run(out, steps=1)
    alerts = lines(out / "alerts.jsonl")
    (out / "checkpoints" / "step-000001").rename(tmp_path / "lost")
    job = Run.resume(out)
    train(job)
    job.close()
    assert lines(out / "alerts.jsonl") == alerts


def test_quarantine_masks_and_never_scores_0(tmp_path):
    out = tmp_path / "run"
    a_run(out, **{"monitors.action": "quarantine"})
    rows = pq.read_table(out / "rollouts" / "step-000005.parquet").to_pylist()
    paid = [r for r in rows if r["finish"] == "stop"]  # what is cut at the limit is not paid, hole or no hole
    assert paid
    assert all(r["masked"] and r["score"] == 1.0 and r["advantage"] is None for r in paid)
    assert all(json.loads(r["evidence"])["quarantined"] == "reference" for r in paid)
    assert not any(r["masked"] for r in rows if r["finish"] != "stop")
    assert lines(out / "metrics.jsonl")[-1]["monitor/quarantined"] == len(paid)


def test_stop_stops_and_can_be_gone_on_from(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.toml"
    out = tmp_path / "run"
    keys = {"run.out": str(out), "reward.use": HOLE, "training.steps": 4, "monitors.action": "stop"}
    recipe.write_text(small_config(**keys).to_toml())
    assert main(["train", str(recipe), "--json"]) == 1
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["stopped"] == "alert: responses are rewarded whatever the reference says"
    assert summary["steps"] < 4
    assert f"sppo train --resume {out}" in said.err.replace("\n", "")
    assert main(["train", "--resume", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stopped"] == "finished"
    assert len(lines(out / "alerts.jsonl")) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"monitors.action": "shout"}, "monitors.action"),
        ({"monitors.second": "anwser"}, "did you mean 'answer'"),
        ({"monitors.sample": -1}, "monitors.sample"),
    ],
)
def test_nonsense_is_one_sentence(tmp_path, capsys, keys, said):
    options = [
        x
        for k, v in ({"task.train": "chain:steps=1", "policy.model": "tiny"} | keys).items()
        for x in (f"--{k}", str(v))
    ]
    assert main(["train", "--out", str(tmp_path / "x"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_off_changes_no_number_of_the_training(tmp_path):
    a_run(tmp_path / "on")
    a_run(tmp_path / "off", **{"monitors.action": "off"})
    assert not (tmp_path / "off" / "alerts.jsonl").exists()
    a, b = (json.loads((tmp_path / n / "summary.json").read_text())["policy_sha256"] for n in ("on", "off"))
    assert a == b
