"""Trackers for real, offline: the numbers that they hold afterwards, a resumed run, one that does not start, one that fails later."""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from pathlib import Path

import pytest

from sppo.errors import RecipeError
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.trackers.base import TrackedRun, Trackers

from ..conftest import small_config

pytest.importorskip("tensorboard")


class Broken:
    """A tracker that starts, and fails at its second step."""

    id = "b"

    def __init__(self) -> None:
        self.heard: list[int] = []

    def log(self, step, metrics):
        self.heard.append(step)
        if step == 1:
            raise ConnectionError("the server went away\nand more")

    def close(self, summary):
        raise AssertionError("it is left out by then")


BROKEN = Broken()


def broken(run):
    return BROKEN


class Ears:
    """An observer that remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text):
        self.notes.append(text)

    def __getattr__(self, name):
        return lambda *a, **k: None


def run_with(trackers, out: Path, steps: int = 3, **changes) -> Ears:
    ears = Ears()
    job = Run.new(
        small_config(
            **{
                "run.out": str(out),
                "run.trackers": trackers,
                "training.steps": steps,
                "run.checkpoint_every": 2,
                **changes,
            }
        ),
        ears,
    )
    try:
        train(job)
    finally:
        job.close()
    return ears


def resume(out: Path, steps: int) -> None:
    job = Run.resume(out, steps=steps)
    try:
        train(job)
    finally:
        job.close()


def rewards(out: Path) -> dict[int, float]:
    return {m["step"]: m["reward/mean"] for m in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


def test_tensorboard(tmp_path):
    out = tmp_path / "run"
    run_with(["tensorboard"], out)
    resume(out, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("reward/mean")} == rewards(out)


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "run"
    run_with("mlflow", out)
    resume(out, 5)
    with sqlite3.connect(out / "mlflow.db") as db:
        rows = db.execute("select step, value from metrics where key = 'reward/mean'").fetchall()
        assert {step: pytest.approx(value) for step, value in rows} == rewards(out)
        assert db.execute("select count(*) from metrics where key = 'eval/pass_1'").fetchone()[0] > 0
        assert db.execute("select name, status from runs").fetchall() == [("run", "FINISHED")]
        assert db.execute("select value from params where key = 'policy.model'").fetchone()[0].startswith("tiny:")
    db.close()


def test_wandb_offline(tmp_path):
    out = tmp_path / "run"
    run_with(["wandb:mode=offline,project=tests"], out)
    known = json.loads((out / "trackers.json").read_text())["wandb"]
    resume(out, 5)
    assert json.loads((out / "trackers.json").read_text())["wandb"] == known
    kept = list((out / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(kept) == 2
    deadline = time.monotonic() + 120  # a process of wandb's writes them
    while not all(b"reward/mean" in p.read_bytes() for p in kept):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_trackio(tmp_path, monkeypatch, capsys):
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    out = tmp_path / "run"
    run_with(["trackio:project=tests"], out)
    resume(out, 5)
    found = {}
    for path in (tmp_path / "trackio").rglob("*.db"):
        with sqlite3.connect(path) as db:
            for step, metrics in db.execute("select step, metrics from metrics"):
                found[step] = json.loads(metrics)["reward/mean"]
        db.close()
    assert found == pytest.approx(rewards(out))
    assert capsys.readouterr().out == ""


def test_one_that_cannot_start_ends_the_run_before_it_begins(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        run_with("tensorbord", tmp_path / "a")
    with pytest.raises(RecipeError, match="no option 'folders'"):
        run_with("tensorboard:folders=x", tmp_path / "a")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RecipeError, match=r"run.trackers: mlflow:uri=sqlite:///\S+ does not start"):
        run_with(["tensorboard", f"mlflow:uri=sqlite:///{blocked}/x.db"], tmp_path / "a")
    assert not (tmp_path / "a").exists()  # the folder is free for the next try


def test_one_that_fails_later_only_warns(tmp_path):
    out = tmp_path / "run"
    ears = run_with(["tests.trackers.test_trackers:broken", "tensorboard"], out, steps=4)
    assert BROKEN.heard == [0, 1]
    [said] = [n for n in ears.notes if "tracker" in n]
    assert "failed at step 1" in said
    assert "the server went away" in said
    assert "and more" not in said
    assert json.loads((out / "summary.json").read_text())["stopped"] == "finished"


def test_only_numbers_are_logged(tmp_path):
    heard = {}

    class One:
        id = "x"

        def log(self, step, metrics):
            heard.update(metrics)

        def close(self, summary):
            heard["end"] = summary

    trackers = Trackers([], TrackedRun("r", tmp_path, {}), print)
    trackers.running["x"] = One()
    trackers.log(0, {"a": 1, "b": None, "c": "text", "d": True, "e": 0.5})
    trackers.close({"stopped": "finished"})
    assert heard == {"a": 1.0, "e": 0.5, "end": {"stopped": "finished"}}
