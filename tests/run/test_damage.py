"""Damaged run and model folders: one sentence that names the file, whatever is wrong, in every command that takes one; no code of theirs runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from sppo.cli.main import main
from sppo.errors import ModelError, UserError
from sppo.models.loading import load, outline
from sppo.report.live import application
from sppo.report.reader import open_runs
from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import small_config

HUGE = "9" * 400
VALUES = ["null", "-1", HUGE, "1e308", '"x"', "[]", '{"a": 1}', "true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "run"
    job = Run.new(small_config(run__out=str(out), training__steps=2))
    train(job)
    job.close()
    return out


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


KINDS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "another kind": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text('{"a":' * 100_000),
    "long number": lambda path: path.write_text('{"step": ' + "9" * 5000 + "}\n"),
    "folder": folder,
    "loop": loop,
    "pipe": pipe,
}
OF_RUNS = [
    "recipe.toml", "metrics.jsonl", "start.json", "summary.json", "audit.jsonl", "audit.head", "rollouts/step-000001.parquet",
    "checkpoints/step-000002/state.pt", "checkpoints/step-000002/policy/tokenizer.json",
]  # fmt: skip
OF_MODELS = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def some(names, kind):
    """A third of them, another one for each kind of damage."""
    return names[list(KINDS).index(kind) % 3 :: 3]


def said(capsys, *arguments) -> int:
    """The exit code; what a user's mistake prints is one sentence."""
    code = main([str(a) for a in arguments])
    error = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 1, 2), arguments
    assert code != 2 or (error[-1].startswith("error: ") and len(error[-1]) < 1200), (arguments, error)
    assert code != 1 or arguments[0] == "audit", (arguments, error)
    return code


def pages(path) -> None:
    """Every page of a run can be looked at, or the run is refused."""
    try:
        runs = open_runs([str(path)])
    except UserError:
        return
    with TestClient(application(runs), base_url="http://127.0.0.1") as client:
        for page in (
            "/",
            "/rollouts?surprised=1&order=tokens",
            "/critic",
            "/health",
            "/rollouts/1/1",
            "/rollouts/1/1/text",
            "/data/critic",
        ):
            assert client.get(page).status_code in (200, 404), page


def look(capsys, run, out) -> None:
    said(capsys, "audit", "verify", run)
    said(capsys, "audit", "show", run, "1:1")
    said(capsys, "audit", "replay", run, "--n", 2)
    said(capsys, "report", run, "--out", out)
    pages(run)
    said(capsys, "train", "--resume", run, "--steps", 3, "--quiet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_is_one_sentence(run, tmp_path, capsys, kind):
    for n, name in enumerate(some(OF_RUNS, kind)):
        copy = tmp_path / str(n)
        shutil.copytree(run, copy)
        KINDS[kind](copy / name)
        look(capsys, copy, tmp_path / "report")


@pytest.mark.parametrize("name", ["metrics.jsonl", "start.json", "summary.json", "alerts.jsonl", "audit.head"])
def test_numbers_of_any_kind_are_one_sentence(run, tmp_path, capsys, name):
    lines = (
        (run / name).read_text().splitlines()
        if (run / name).exists()
        else ['{"step": 1, "what": "x", "since": 0, "evidence": ["1:1"]}']
    )
    whole = json.loads("".join(lines) if name != "metrics.jsonl" else lines[-1])
    for n, value in enumerate(VALUES[::2] if name in ("start.json", "audit.head") else VALUES[1::2]):
        copy = tmp_path / str(n)
        shutil.copytree(run, copy)
        fields = ", ".join(f"{json.dumps(key)}: {value if key != 'step' else 1}" for key in whole)
        (copy / name).write_text("{" + fields + "}\n")
        said(capsys, "report", copy, "--out", tmp_path / "report")
        said(capsys, "audit", "verify", copy)
        pages(copy)


@pytest.mark.parametrize("value", ["x\x1b[2J", b"\xff\xfe", [{"a": 1}], None, 10**18, "no such column"])
def test_rollouts_of_another_schema_are_one_sentence(run, tmp_path, capsys, value):
    table = pq.read_table(run / "rollouts" / "step-000001.parquet")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for i, column in enumerate(table.column_names):
        other = table.set_column(i, column, pa.array([value] * len(table)))
        if value == "no such column":
            other = table.drop_columns([column])
        pq.write_table(other, copy / "rollouts" / "step-000001.parquet")
        said(capsys, "audit", "show", copy, "1:1")
        said(capsys, "audit", "replay", copy, "--n", 2)
        runs = open_runs([str(copy)])
        runs[0].rollouts.find(runs_filter(), 0, 50)
        runs[0].rollouts.one(1, 1), runs[0].rollouts.text(1, 1)
    said(capsys, "report", copy, "--out", tmp_path / "report")
    pages(copy)


def runs_filter():
    from sppo.report.rollouts import Filter

    return Filter(outcome="wrong", order="tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_is_one_sentence(run, tmp_path, capsys, kind):
    for n, name in enumerate(some(OF_MODELS, kind)):
        copy = tmp_path / str(n)
        shutil.copytree(run / "checkpoints" / "step-000002" / "policy", copy)
        KINDS[kind](copy / name)
        said(capsys, "solve", copy, "3+4?", "--max-tokens", 2)
        said(capsys, "doctor", "--policy.model", copy, "--data", "chain:steps=1")
        copy = tmp_path / f"critic-{n}"
        shutil.copytree(run / "checkpoints" / "step-000002" / "critic", copy)
        KINDS[kind](copy / name if name != "generation_config.json" else copy / "value_head.safetensors")
        said(capsys, "critic", "score", copy, "--data", "chain:steps=1", "--n", 2)


@pytest.mark.parametrize("value", VALUES)
def test_a_config_of_any_kind_is_one_sentence(run, tmp_path, value):
    source = run / "checkpoints" / "step-000002" / "policy"
    config = json.loads((source / "config.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    for key in config:
        text = ", ".join(f"{json.dumps(k)}: {value if k == key else json.dumps(v)}" for k, v in config.items())
        (copy / "config.json").write_text("{" + text + "}")
        for reader in (load, outline):
            with contextlib.suppress(ModelError):
                reader(str(copy), role="policy.model", head=True)


def test_code_that_comes_with_a_model_is_never_run(run, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(run / "checkpoints" / "step-000002" / "policy", copy)
    ran = tmp_path / "ran"
    (copy / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\nclass Tokenizer: ...\n"
    )
    for name, kinds in (
        (
            "config.json",
            {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model", "AutoModel": "theirs.Model"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Tokenizer", None]}),
    ):
        for known in (True, False):
            config = json.loads((copy / name).read_text()) | {"auto_map": kinds}
            if not known:
                config["model_type" if name == "config.json" else "tokenizer_class"] = "theirs"
            (copy / name).write_text(json.dumps(config))
            said(capsys, "doctor", "--policy.model", copy, "--data", "chain:steps=1")
            said(capsys, "solve", copy, "3+4?", "--max-tokens", 2)
            said(capsys, "critic", "score", copy, "--data", "chain:steps=1")
    assert not ran.exists()
