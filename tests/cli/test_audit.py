"""`sppo audit` on a real run: every change is found and named, every verdict comes out again, one chain of reasoning can be read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import sppo
from sppo.audit.integrity import verify
from sppo.cli.main import main
from sppo.errors import RecipeError
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Task

from ..conftest import small_config

STEPS = 4


def chain_of(run):
    return [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]


def written(entry):
    """A line as whoever forges one would write it, whole by its own hash."""
    body = {k: v for k, v in entry.items() if k != "sha256"}
    return json.dumps(body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()})


def write_chain(run, entries):
    """The whole chain anew, `audit.head` with it: all that somebody can do who may write the run."""
    head, out = "0" * 64, []
    for entry in entries:
        out.append(written(entry | {"previous": head}))
        head = json.loads(out[-1])["sha256"]
    (run / "audit.jsonl").write_text("".join(line + "\n" for line in out))
    (run / "audit.head").write_text(json.dumps({"lines": len(out), "sha256": head}) + "\n")


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
        "run.checkpoint_every": 2,
        "run.keep": 9,
        "run.anchor": str(out.parent / "heads.jsonl"),
    }
    job = Run.new(small_config(**changes))
    train(job)
    job.close()
    return out


def test_a_sound_run_is_sound(run, capsys):
    found = verify(run)
    assert found.damage == found.notes == []
    assert main(["audit", "verify", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = chain_of(run)
    assert said == {
        "sound": True, "steps": STEPS, "damage": [], "notes": [], "lines": len(lines), "head": lines[-1]["sha256"],
    }  # fmt: skip
    assert [e.get("event", "step") for e in lines] == [
        "begin", "start", "checkpoint", "step", "step", "checkpoint", "step", "step", "checkpoint", "end",
    ]  # fmt: skip


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
        found = verify(copy).damage
        assert found, (name, n)
        assert any(name in what or "the run has" in what or "cannot" in what for _, what in found)


def test_any_change_is_found_and_the_step_named(run, tmp_path):
    """200 single changes of one byte, deletions of a byte or a line or a file, and swaps of lines, files and neighbouring bytes."""
    rng = random.Random(5)
    files = ["audit.jsonl", *(f"rollouts/step-{s:06d}.parquet" for s in range(STEPS))]
    for n in range(200):
        copy = tmp_path / str(n)
        copy.mkdir()
        shutil.copytree(run / "rollouts", copy / "rollouts")
        (copy / "checkpoints").symlink_to(run / "checkpoints")
        for name in ("audit.jsonl", "audit.head", "recipe.toml", "metrics.jsonl", "start.json", "summary.json"):
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
        found = verify(copy).damage
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
    at = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == 2)
    lines[at] = written(json.loads(lines[at]) | {"seed": 99})
    (copy / "audit.jsonl").write_text("\n".join(lines) + "\n")
    assert [step for step, _ in verify(copy).damage] == [3]


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
        (["verify", "nowhere"], "is not a run directory"),
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
    from sppo.run.rollouts import task_json

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


# -- what else the record vouches for --------------------------------------------------------------------------------


def no_weights(checkpoint, name="policy/model"):
    def change(run):
        path = run / "checkpoints" / checkpoint / f"{name}.safetensors"
        save_file({k: v * 0 + 0.5 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})

    return change


def swap_checkpoints(run):
    a, b = sorted((run / "checkpoints").iterdir())[-2:]
    a.rename(run / "x"), b.rename(a), (run / "x").rename(b)


def swap_words_of_tokenizer(run):
    path = run / "checkpoints" / "step-000004" / "policy" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tree))


def edit_state(run):
    path = run / "checkpoints" / "step-000004" / "state.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["generated_tokens"] = 1
    torch.save(saved, path)


def copied(name, to):
    return lambda run: shutil.copytree(run / name, run / to)


def edited(name, before, after):
    return lambda run: (run / name).write_text((run / name).read_text().replace(before, after, 1))


def edit_json(name, **values):
    return lambda run: (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | values))


def cut(run, keep, also=()):
    """The last steps away, from every file, and the chain cut with them."""
    entries = chain_of(run)
    end = next(i for i, e in enumerate(entries) if e.get("step") == keep)
    for name, lines in (("audit.jsonl", end), ("metrics.jsonl", keep)):
        text = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(text[:lines]))
    for step in range(keep, STEPS):
        (run / "rollouts" / f"step-{step:06d}.parquet").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "summary.json").unlink()
    if "head" in also:
        write_chain(run, entries[:end])


CHANGES = {
    "the tail cut off": (lambda run: cut(run, 2), "the end was cut off"),
    "no head": (lambda run: (run / "audit.head").unlink(), "audit.head is missing"),
    "a head of another chain": (edit_json("audit.head", sha256="0" * 64), "audit.head is of another chain"),
    "a head that is none": (lambda run: (run / "audit.head").write_text("{"), "audit.head was changed"),
    "start.json": (edit_json("start.json", accuracy=0.001), "start.json was changed"),
    "no start.json": (lambda run: (run / "start.json").unlink(), "start.json is missing"),
    "summary.json": (edit_json("summary.json", accuracy_after=0.99), "summary.json was changed"),
    "no summary.json": (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
    "weights": (no_weights("step-000002"), "policy/model.safetensors was changed"),
    "critic": (no_weights("step-000004", "critic/value_head"), "critic/value_head.safetensors was changed"),
    "state": (edit_state, "state.pt was changed"),
    "tokenizer": (swap_words_of_tokenizer, "policy/tokenizer.json was changed"),
    "checkpoints swapped": (swap_checkpoints, "was changed"),
    "a checkpoint gone": (lambda run: shutil.rmtree(run / "checkpoints" / "step-000002"), "checkpoints/step-000002 is missing"),
    "a checkpoint more": (copied("checkpoints/step-000002", "checkpoints/step-000009"), "step-000009 has no line"),
    "a file more in one": (lambda run: (run / "checkpoints" / "step-000004" / "policy" / "x.py").write_text(""), "policy/x.py was added"),
    "other rollouts": (lambda run: shutil.copy(run / "rollouts" / "step-000000.parquet", run / "rollouts" / "other.parquet"), "other.parquet has no line"),
    "a buffer": (lambda run: (run / "buffer.jsonl").write_text('{"step": 1}\n'), "buffer.jsonl has 1 lines"),
    "the recipe": (lambda run: (run / "recipe.toml").write_text("seed = 2\n"), "recipe.toml is not the recipe"),
    "a pipe for a file": (lambda run: ((run / "start.json").unlink(), os.mkfifo(run / "start.json")), "start.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_that_a_run_is_told_by_can_be_changed_unnoticed(run, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    change, said = CHANGES[name]
    change(copy)
    assert any(said in what for _, what in verify(copy).damage), verify(copy).damage


def test_a_record_written_anew_is_noticed_where_a_head_was_kept_elsewhere(run, tmp_path, capsys):
    """Cut short, and with another accuracy, each made whole by its own hashes: the run alone cannot show it."""
    heads = run.parent / "heads.jsonl"
    (first, *_), head = chain_of(run), chain_of(run)[-1]["sha256"]
    assert verify(run, head, heads).damage == []
    assert verify(run, chain_of(run)[4]["sha256"]).damage == []  # a head of earlier stays good
    for n, forge in enumerate((lambda copy: cut(copy, 2, ["head"]), forge_accuracy, begin_anew)):
        copy = tmp_path / str(n)
        shutil.copytree(run, copy)
        forge(copy)
        assert verify(copy).damage == []
        assert verify(copy, head).damage
        assert verify(copy, anchor=heads).damage
        assert main(["audit", "verify", str(copy)]) == 1  # the recipe names the anchor
        assert "heads.jsonl" in capsys.readouterr().out
        assert main(["audit", "verify", str(copy), "--head", first["sha256"][:8]]) == 2
        assert "64 hexadecimal digits" in capsys.readouterr().err


def forge_accuracy(run):
    edit_json("summary.json", accuracy_after=0.99)(run)
    entries = chain_of(run)
    entries[-1]["summary_sha256"] = hashlib.sha256((run / "summary.json").read_bytes()).hexdigest()
    write_chain(run, entries)


def begin_anew(run):
    entries = chain_of(run)
    entries[0]["seed"] = 5
    write_chain(run, entries)


def test_lines_that_no_version_writes_are_refused_without_a_traceback(run, tmp_path):
    """Whole by their hashes, and of any shape."""
    entries = chain_of(run)
    for at, entry in enumerate(entries):
        for key in entry:
            for value in (None, -1, 10**30, "x", [[]], {"a": 1}):
                write_chain(tmp_path, [*entries[:at], entry | {key: value}, *entries[at + 1 :]])
                assert verify(tmp_path).damage


def test_a_verifier_of_other_code_is_said_before_the_verdicts(run, tmp_path):
    source = Path(sppo.__file__).parent.parent
    changed = tmp_path / "src"
    shutil.copytree(source, changed, ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "sppo" / "rewards" / "compare.py").open("a") as file:
        file.write("# changed\n")
    command = [sys.executable, "-m", "sppo.cli.main", "audit", "replay", str(run), "--n", "2", "--json"]
    for path, said in ((source, False), (changed, True)):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        assert lines[0].startswith("the verifier is another one than the one that judged 4 steps (0 to 3)") == said
        assert json.loads(lines[-1])["other_verifier"] == (list(range(STEPS)) if said else [])


def test_a_recipe_changed_half_way_is_in_the_record(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    resumed(copy, steps=5)
    found = verify(copy)
    assert found.damage == []
    assert found.notes == ["resumed after step 4", "after step 4: training.steps 4 → 5"]
    recipe = copy / "recipe.toml"
    recipe.write_text(
        recipe.read_text().replace("steps = 5", "steps = 6").replace("temperature = 1.0", "temperature = 0.7")
    )
    assert any("recipe.toml" in what for _, what in verify(copy).damage)
    resumed(copy)
    assert [(step, what) for step, what in verify(copy).damage] == [
        (5, "from here on it is another recipe: rollout.temperature 1.0 → 0.7, training.steps 5 → 6")
    ]


def resumed(run, **options):
    job = Run.resume(run, **options)
    train(job)
    job.close()


def test_steps_that_are_done_again_leave_the_record_whole(run, tmp_path):
    """Killed after step 3 with a checkpoint of step 2: the lines of the lost steps stay, and a head kept then is still known."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    kept = chain_of(copy)[7]["sha256"]
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    (copy / "audit.jsonl").write_text(
        (copy / "audit.jsonl").read_text() + '{"step": 4, "rol'
    )  # what a power cut leaves
    resumed(copy)
    found = verify(copy, kept)
    assert found.damage == []
    assert found.notes == ["resumed after step 2 (steps 2 to 3 were done again)"]
    assert found.steps == STEPS
    assert (
        json.loads((copy / "summary.json").read_text())["policy_sha256"]
        == json.loads((run / "summary.json").read_text())["policy_sha256"]
    )


def test_a_run_of_an_older_version_is_read_and_gone_on_with(run, tmp_path, capsys):
    """Its chain holds lines of steps alone, and no head."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    write_chain(copy, [e for e in chain_of(run) if "step" in e])
    (copy / "audit.head").unlink()
    assert main(["audit", "verify", str(copy), "--anchor", os.devnull]) == 2
    found = verify(copy)
    assert found.damage == []
    assert "older version" in found.notes[0]
    resumed(copy, steps=5)
    found = verify(copy)
    assert found.damage == []
    assert found.steps == 5
    assert any("older version" in note for note in found.notes)
    edit_state_of = copy / "checkpoints" / "step-000005" / "state.pt"
    edit_state_of.write_bytes(edit_state_of.read_bytes()[:-1])
    assert any("state.pt was changed" in what for _, what in verify(copy).damage)


# -- resuming --------------------------------------------------------------------------------------------------------


def snapshot(run):
    return {
        str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != "run.lock"
    }


REFUSED = {
    "no rollouts": (lambda run: shutil.rmtree(run / "rollouts"), "has no folder rollouts/"),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "has no folder checkpoints/"),
    "weights": (no_weights("step-000004"), "is not what was saved: policy/model.safetensors was changed"),
    "state": (edit_state, "is not what was saved: state.pt was changed"),
    "a foreign checkpoint": (copied("checkpoints/step-000002", "checkpoints/step-000009"), "audit.jsonl has no line about it"),
    "the tail cut off": (lambda run: cut(run, 2), "the end was cut off"),
    "a changed line": (edited("audit.jsonl", '"seed": 1', '"seed": 2'), "was changed"),
    "a recipe that is none": (lambda run: (run / "recipe.toml").write_bytes(b"\xff"), "recipe.toml cannot be read"),
    "data that is gone": (edited("recipe.toml", 'train = "chain:steps=1-2"', 'train = "gone.jsonl"'), "gone.jsonl"),
    "a reward that is gone": (edited("recipe.toml", 'use = "answer', 'use = "answr'), "answr"),
    "a folder for metrics": (lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()), "is no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_resumption_that_is_refused_changes_nothing(run, tmp_path, capsys, name):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    change, said = REFUSED[name]
    change(copy)
    before = snapshot(copy)
    assert main(["train", "--resume", str(copy), "--steps", "12", "--quiet"]) == 2
    assert said in capsys.readouterr().err
    assert snapshot(copy) == before


WITHOUT_RIGHTS = """
import pathlib, sys
from sppo.cli.main import main
run, out = map(pathlib.Path, sys.argv[1:])
for folder, mode in ((run, 0o555), (run / "rollouts", 0o555), (run / "checkpoints", 0o555), (run, 0o600), (run, 0o000)):
    folder.chmod(mode)
    for arguments in (["train", "--resume", run, "--quiet"], ["audit", "verify", run], ["report", run, "--out", out], ["audit", "show", run, "0:0"]):
        print(oct(mode), arguments[0], main(list(map(str, arguments))), file=sys.stderr)
    folder.chmod(0o755)
"""


def test_a_run_that_cannot_be_written_or_entered_is_one_sentence(run, tmp_path):
    """Root may write anything, unless it gives that up."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    bare = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.getuid() != 0:
        bare = []
    elif subprocess.run([*bare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root cannot give up its rights here")
    before = snapshot(copy)
    command = [*bare, sys.executable, "-c", WITHOUT_RIGHTS, str(copy), str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if " train " in line] == [
        f"{mode} train 2" for mode in ("0o555", "0o555", "0o555", "0o600", "0o0")
    ]
    assert done.stderr.count("cannot be written; make it writable") == 3
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    "left", [["run.lock"], ["run.lock", "rollouts/"], ["run.lock", "rollouts/", "checkpoints/", ".recipe.toml.tmp"]]
)
def test_a_start_killed_before_its_recipe_is_taken_over(tmp_path, capsys, left):
    out = tmp_path / "run"
    for name in left:
        (out / name).mkdir(parents=True) if name.endswith("/") else (
            out.mkdir(exist_ok=True),
            (out / name).write_text("7"),
        )
    assert main(["train", "--resume", str(out)]) == 2
    assert (
        "killed before its recipe was written, so there is nothing to go on with; start it again"
        in capsys.readouterr().err
    )
    job = Run.new(small_config(run__out=str(out), training__steps=1))
    train(job)
    job.close()
    assert verify(out).damage == []


@pytest.mark.parametrize("theirs", ["thesis.txt", "rollouts/x.parquet", "checkpoints/step-000001"])
def test_a_folder_that_holds_anything_of_somebodys_is_not_taken(tmp_path, theirs):
    out = tmp_path / "run"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("mine")
    (out / "run.lock").touch()
    with pytest.raises(RecipeError, match="is not empty and not a run"):
        Run.new(small_config(run__out=str(out)))
    assert (out / theirs).read_text() == "mine"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away_saves_the_run(tmp_path, ignored):
    """SIGHUP is SIGTERM's like; under nohup, which ignores it, the run goes on."""
    options = small_config().model_dump(mode="json")
    keys = (
        "policy.model",
        "critic.model",
        "task.train",
        "rollout.prompts",
        "rollout.max_tokens",
        "evaluation.n",
        "evaluation.every",
    )
    given = [x for key in keys for x in (f"--{key}", str(options[key.split(".")[0]][key.split(".")[1]]))]
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "sppo.cli.main",
        "train",
        *given,
        "--steps",
        "30" if ignored else "100000",
        "--out",
        str(out),
        "--json",
    ]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == (0 if ignored else 130), wrong
    summary = json.loads(said.splitlines()[-1])
    assert summary["stopped"] == ("finished" if ignored else "interrupted")
    assert (out / "checkpoints" / f"step-{summary['steps']:06d}" / "state.pt").exists()
    assert verify(out).damage == []
