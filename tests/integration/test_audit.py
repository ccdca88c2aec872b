"""`sppo audit` on a real run: every change is found and named, every verdict comes out again, one chain of reasoning can be read."""

from __future__ import annotations

import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo.audit.chain import verify
from sppo.cli.main import main
from sppo.training.loop import train
from sppo.training.run import Run
from sppo.types import Task

from ..conftest import small_config

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "run"
    use = "answer + 1 * steps:check=chain,split=semicolons"
    changes = {
        "run.out": str(out),
        "training.steps": STEPS,
        "reward.use": use,
        "reward.anneal": 4,
        "rollout.max_tokens": 8,
    }
    job = Run.new(small_config(**changes))
    train(job)
    job.close()
    return out


def test_a_sound_run_is_sound(run, capsys):
    assert list(verify(run)) == []
    assert main(["audit", "verify", str(run), "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == {"sound": True, "steps": STEPS, "damage": []}


@pytest.mark.parametrize("name", ["metrics.jsonl", "alerts.jsonl", "recipe.toml"])
def test_numbers_alerts_and_recipe_are_vouched_for(run, tmp_path, name):
    """One changed byte, a line less, a line more, and no file at all."""
    rng = random.Random(7)
    for n in range(24):
        copy = tmp_path / f"{name}-{n}"
        shutil.copytree(run, copy)
        alerts = copy / "alerts.jsonl"
        assert not alerts.exists()
        path = copy / name
        if name == "alerts.jsonl":
            path.write_text(json.dumps({"step": rng.randrange(STEPS + 2)}) + "\n")
        elif n % 4 == 0:
            path.unlink()
        elif n % 4 == 1:
            lines = path.read_text().splitlines(keepends=True)
            del lines[rng.randrange(len(lines))]
            path.write_text("".join(lines))
        elif n % 4 == 2:
            path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])
        else:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data) - 1)] ^= 1
            path.write_bytes(bytes(data))
        found = list(verify(copy))
        assert found, (name, n)
        assert any(name in what or "tells of" in what or "cannot" in what for _, what in found)


def test_any_change_is_found_and_the_step_named(run, tmp_path):
    """200 single changes of one byte, deletions of a byte or a line or a file, and swaps of lines, files and neighbouring bytes."""
    rng = random.Random(5)
    files = ["audit.jsonl", *(f"rollouts/step-{s:06d}.parquet" for s in range(STEPS))]
    for n in range(200):
        copy = tmp_path / str(n)
        copy.mkdir()
        shutil.copytree(run / "rollouts", copy / "rollouts")
        for name in ("audit.jsonl", "metrics.jsonl", "summary.json"):
            shutil.copy(run / name, copy / name)
        path = copy / rng.choice(files)
        data, kind = path.read_bytes(), n % 5
        at = rng.randrange(len(data) - 1)
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + 1 :]
        elif kind == 2:
            while data[at] == data[at + 1]:
                at = rng.randrange(len(data) - 1)
            data = data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
        elif kind == 3 and path.suffix == ".jsonl":
            lines = data.splitlines(keepends=True)
            if rng.random() < 0.5:
                del lines[rng.randrange(len(lines))]
            else:
                i, j = rng.sample(range(len(lines)), 2)
                lines[i], lines[j] = lines[j], lines[i]
            data = b"".join(lines)
        elif kind == 4 and path.suffix == ".parquet":
            other = copy / rng.choice([f for f in files[1:] if f != str(path.relative_to(copy))])
            theirs = other.read_bytes()
            other.write_bytes(data)
            data = theirs
        elif path.suffix == ".parquet":
            path.unlink()
        else:
            data = data[:-1]
        if path.exists():
            path.write_bytes(data)
        found = list(verify(copy))
        assert found, (n, kind, path.name)
        named = {step for step, _ in found}
        if path.suffix == ".parquet":
            assert int(path.stem[5:]) in named
        shutil.rmtree(copy)


def test_a_line_of_another_run_does_not_pass(run, tmp_path):
    """Whole again by its own hash, and still not the one that belongs here."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    lines = (copy / "audit.jsonl").read_text().splitlines()
    from sppo.audit.chain import _line

    entry = json.loads(lines[2])
    body = {k: v for k, v in entry.items() if k != "sha256"} | {"seed": 99}
    lines[2] = _line(body)
    (copy / "audit.jsonl").write_text("\n".join(lines) + "\n")
    assert [step for step, _ in verify(copy)] == [3]


def test_every_verdict_comes_out_again(run, capsys):
    """Truncated responses and a fading reward included."""
    assert main(["audit", "replay", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["replayed"] == said["reproduced"] == 16 * STEPS
    rows = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
    assert any(row["finish"] == "length" for row in rows)
    assert {json.loads(row["evidence"]).get("fade") for row in rows} == {0.75}
    assert main(["audit", "replay", str(run), "--step", "1", "--n", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["replayed"] == 3


def test_a_verdict_that_was_changed_is_found(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "rollouts" / "step-000002.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[5]["score"] = 1.0 - rows[5]["score"]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    assert main(["audit", "replay", str(copy), "--json"]) == 1
    (wrong,) = json.loads(capsys.readouterr().out.splitlines()[-1])["mismatches"]
    assert wrong["id"] == "2:5"
    assert main(["audit", "verify", str(copy)]) == 1
    assert "step 2: step-000002.parquet was changed" in capsys.readouterr().out


def test_one_chain_of_reasoning_can_be_read(run, tmp_path, capsys):
    assert main(["audit", "show", str(run), "3:4"]) == 0
    said = capsys.readouterr().out
    row = pq.read_table(run / "rollouts" / "step-000003.parquet").to_pylist()[4]
    for part in (row["task_id"], row["prompt"], row["outcome"], "the file's hash is the chain's"):
        assert part in said
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "rollouts" / "step-000003.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[4]["response"] = "\x1b[2Jgone\u202e"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    assert main(["audit", "show", str(copy), "3:4"]) == 1
    said = capsys.readouterr().out
    assert "THE FILE IS NOT WHAT THE CHAIN SAYS" in said
    assert "\x1b" not in said
    assert "\\x1b[2Jgone\\u202e" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["verify", "nowhere"], "is no run directory"),
        (["show", "RUN", "3"], "write it as STEP:ROW"),
        (["show", "RUN", "3:99"], "has 16 rollouts"),
        (["show", "RUN", "9:0"], "has no step 9"),
        (["replay", "RUN", "--step", "9"], "has no step 9"),
        (["replay", "RUN", "--n", "0"], "--n must be 1 or more"),
    ],
)
def test_nonsense_is_one_sentence(arguments, why, run, capsys):
    assert main(["audit", *(str(run) if a == "RUN" else a for a in arguments)]) == 2
    assert why in capsys.readouterr().err


def test_columns_that_json_would_change_are_not_recorded_and_the_replay_says_so(tmp_path, capsys):
    from sppo.training.rundir import task_json

    assert task_json(Task("t", "p", {"answer": (1, 2)})) is None
    assert json.loads(task_json(Task("t", [{"role": "user", "content": "p"}], {"answer": "4"})))["columns"] == {
        "answer": "4"
    }


def test_what_cannot_be_read_is_one_sentence(run, tmp_path, capsys):
    for n, (column, value) in enumerate(
        (("evidence", "{"), ("task", "{"), ("response", None), ("logps", None), ("score", None))
    ):
        copy = tmp_path / str(n)
        shutil.copytree(run, copy)
        path = copy / "rollouts" / "step-000001.parquet"
        table = pq.read_table(path)
        rows = table.to_pylist()
        rows[2][column] = value
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
        codes = [main(["audit", "replay", str(copy)]), main(["audit", "show", str(copy), "1:2"])]
        assert set(codes) <= {0, 1, 2}
        assert 2 in codes
        assert "audit verify" in capsys.readouterr().err
    (copy / "rollouts" / "step-000000.parquet").unlink()
    (copy / "rollouts" / "step-000000.parquet").mkdir()
    assert main(["audit", "verify", str(copy)]) == 1
