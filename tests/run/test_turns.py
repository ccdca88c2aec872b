"""A run with tools: it trains on whole conversations, resumes to the same bits, and every command shows them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from sppo.cli.main import main
from sppo.report.pages import environment, rollout_view
from sppo.report.reader import RunReader

KEYS = {
    "policy.model": "tiny:hidden=64,layers=2,heads=2", "critic.model": "tiny:hidden=32,layers=1,heads=2",
    "task.train": "calculations:steps=1,digits=2", "environment.tools": "[\"calculator\", \"python\"]", "environment.turns": 3,
    "environment.tokens": 160, "bootstrap.steps": 60, "bootstrap.lr": 5e-3, "rollout.prompts": 24, "rollout.max_tokens": 48,
    "training.steps": 4, "training.critic_lr": 1e-3, "evaluation.n": 8, "evaluation.every": 0, "run.threads": 1, "run.checkpoint_every": 1,
    "monitors.action": "warn", "seed": 3,
}  # fmt: skip


def command(out):
    given = [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "sppo.cli.main", "train", *given, "--out", str(out), "--quiet", "--json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("turns") / "run"
    began = time.monotonic()
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1]), time.monotonic() - began


def rows_of(run):
    return [row for path in sorted((run / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_it_trains_on_what_the_policy_wrote(run):
    out, summary, _ = run
    rows = rows_of(out)
    several = [row for row in rows if len(row["turns"]) > 1]
    assert several, "no trajectory called a tool"
    for row in several:
        assert [i for s, e in row["turns"] for i in row["ids"][s:e]] == row["response_ids"]
        assert row["ids"][: row["turns"][0][0]] == row["prompt_ids"]
        assert len(row["ids"]) <= 160
        roles = [m["role"] for m in json.loads(row["messages"])]
        assert roles[:2] == ["assistant", "tool"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(m["turns/mean"] > 1 and m["tools/calls"] > 0 for m in metrics)
    assert summary["steps"] == 4


def test_a_killed_run_resumes_to_the_same_bits(run, tmp_path):
    out, summary, whole = run
    moment = random.Random(os.urandom(8)).uniform(0.4, 0.9) * whole
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    again = ["train", "--resume", str(tmp_path / "killed")] if (tmp_path / "killed" / "recipe.toml").exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "sppo.cli.main", *again, "--quiet", "--json"] if again else command(tmp_path / "killed"),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["policy_sha256"] == summary["policy_sha256"], moment
    assert [row["ids"] for row in rows_of(tmp_path / "killed")] == [row["ids"] for row in rows_of(out)]


def test_verdicts_are_replayed_without_the_environment(run, capsys):
    out, _, _ = run
    assert main(["audit", "replay", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["reproduced"] == found["replayed"] == 96


def test_commands_show_the_conversation(run, capsys):
    out, _, _ = run
    row = next(
        i
        for i, r in enumerate(pq.read_table(out / "rollouts" / "step-000003.parquet").to_pylist())
        if len(r["turns"]) > 1
    )
    assert main(["audit", "show", str(out), f"3:{row}"]) == 0
    said = capsys.readouterr().out
    assert "→ calculate" in said
    assert "← " in said
    assert main(["eval", str(out), "--tasks", "calculations:steps=1,digits=2", "--n", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"][0]["n"] == 16
    assert main(["solve", str(out), "12+34?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["messages"][0][0]["role"] == "assistant"


def test_the_page_folds_what_tools_gave(run):
    out, _, _ = run
    reader = RunReader(out)
    row = next(
        i
        for i, r in enumerate(pq.read_table(out / "rollouts" / "step-000003.parquet").to_pylist())
        if len(r["turns"]) > 1
    )
    view = rollout_view(reader, reader.rollouts.one(3, row))
    assert [m["who"] for m in view["conversation"]][:2] == ["policy", "calculate gave"]
    page = environment().get_template("_rollout.html").render(r=view, uid="1", live=False, chosen="")
    assert "<details" in page
    assert "calls calculate" in page
    assert "turns of the policy" in page
