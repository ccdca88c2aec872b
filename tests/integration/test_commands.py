"""The commands as a user meets them: their text, their JSON, their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sppo.cli.main import main

SMALL = "tiny:hidden=32,layers=1,heads=2"


def sppo(capsys, *arguments, code=0):
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr().out


def last_json(text):
    return json.loads(text.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    arguments = [
        "train", "--model", SMALL, "--data", "chain:steps=1", "--out", str(out), "--seed", "3", "--steps", "2", "--critic.model", SMALL,
        "--rollout.prompts", "8", "--rollout.max_tokens", "8", "--evaluation.n", "8", "--quiet", "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    return out


def test_train_on_the_users_own_rows_with_nothing_else(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"{i}+{j}?", "answer": str(i + j)}) + "\n" for i in range(10) for j in range(10)
        )
    )
    out = sppo(
        capsys, "train", "--model", SMALL, "--data", path, "--out", tmp_path / "run", "--steps", "2", "--rollout.prompts", "8",
        "--rollout.max_tokens", "4", "--json",
    )  # fmt: skip
    summary = last_json(out)
    assert summary["steps"] == 2
    assert summary["stopped"] == "finished"


def test_resume_of_a_finished_run_changes_nothing(trained, capsys):
    before = json.loads((trained / "summary.json").read_text())
    after = last_json(sppo(capsys, "train", "--resume", trained, "--json", "--quiet"))
    assert after["policy_sha256"] == before["policy_sha256"]
    assert after["accuracy_after"] == before["accuracy_after"]


def test_eval(trained, capsys):
    text = sppo(
        capsys,
        "eval",
        trained,
        "--tasks",
        "chain:steps=1,gym:chain_sum,max_terms=2",
        "--n",
        6,
        "--samples",
        4,
        "--json",
    )
    result = last_json(text)
    assert [t["task"] for t in result["tasks"]] == ["chain:steps=1", "gym:chain_sum,max_terms=2"]
    for task in result["tasks"]:
        assert task["n"] == 6
        assert task["low"] <= task["accuracy"] <= task["high"]
        assert set(task["pass_at_k"]) == {"pass@1", "pass@2", "pass@4"}
    assert "accuracy" in text
    again = last_json(
        sppo(capsys, "eval", trained, "--tasks", "chain:steps=1", "--n", 6, "--samples", 4, "--batch", 3, "--json")
    )
    assert again["tasks"][0]["outcomes"] == result["tasks"][0]["outcomes"]


def test_solve_prints_the_predicted_chance(trained, capsys):
    text = sppo(capsys, "solve", trained, "3+4?", "--samples", 3, "--json")
    assert "predicted chance of success" in text
    result = last_json(text)
    assert 0 < result["predicted_chance"] < 1
    assert len(result["responses"]) == 3
    assert last_json(sppo(capsys, "solve", SMALL, "3+4?", "--max-tokens", "4", "--json"))["predicted_chance"] is None


def test_sft_leaves_a_model_folder(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "solution": f"Answer: {i}"}) + "\n" for i in range(60)))
    out = tmp_path / "model"
    result = last_json(
        sppo(
            capsys,
            "sft",
            "--model",
            SMALL,
            "--data",
            path,
            "--out",
            out,
            "--steps",
            "3",
            "--bootstrap.batch",
            "4",
            "--json",
        )
    )
    assert result["steps"] == 3
    AutoModelForCausalLM.from_pretrained(out)
    assert main(["sft", "--model", SMALL, "--data", str(path), "--out", str(out), "--steps", "1"]) == 2
    assert "is not empty" in capsys.readouterr().err
    path.write_text(json.dumps({"question": "1?", "answer": "1"}) + "\n")
    assert (
        main(
            [
                "sft",
                "--model",
                SMALL,
                "--data",
                f"records:path={path},split=all",
                "--out",
                str(tmp_path / "x"),
                "--steps",
                "1",
            ]
        )
        == 2
    )
    assert "no worked solution" in capsys.readouterr().err


def test_verify(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"response": "Answer: 4", "answer": "4"},
        {"response": "Answer: 5", "answer": "4"},
        {"response": "x", "answer": "4"},
        {"response": "Answer: 4", "answer": ""},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "verdicts.jsonl"
    result = last_json(sppo(capsys, "verify", path, "--reward", "answer", "--out", out, "--json"))
    assert result == {
        "n": 4,
        "graded": 3,
        "mean_score": 1 / 3,
        "outcomes": {"correct": 1, "wrong": 1, "unparseable": 1, "invalid_task": 1},
    }
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert verdicts[3]["masked"]
    assert verdicts[0]["evidence"]["extracted"] == "4"
    path.write_text('{"answer": "4"}\n')
    assert main(["verify", str(path), "--reward", "answer"]) == 2
    assert "rows.jsonl:1: the row has no `response`" in capsys.readouterr().err


def test_data_check(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"what is {i}?", "answer": str(i)} for i in range(20)]
    rows += [
        {"question": "a", "answer": r"\frac{1"},
        {"question": "b", "answer": "x_{0"},
        {"question": "c", "answer": ""},
    ]
    rows += [
        {"question": " ", "answer": "1"},
        {"question": "what  is 3?", "answer": "3"},
        {"question": "long " * 3000, "answer": "1"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"answer": "1"}\n{broken\n')
    text = sppo(capsys, "data", "check", path, "--json", code=2)
    result = last_json(text)
    assert result["n"] == 28
    assert result["bad"] == 8
    assert result["kinds"] == {"row": 2, "prompt": 1, "duplicate": 1, "over-long": 1, "reference": 3}
    assert {p["row"] for p in result["problems"]} == {f"{path}:{i}" for i in (21, 22, 23, 24, 25, 26, 27, 28)}
    assert f"{path}:21: reference: the reference answer looks cut off" in text
    sppo(capsys, "data", "check", path, "--threshold", 0.5)
    assert last_json(sppo(capsys, "data", "check", "chain:steps=1,size=100", "--json", code=2))["kinds"].keys() == {
        "duplicate"
    }


def test_data_check_with_the_math_parser(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "\\\\frac{1}{2}"}\n{"question": "b", "answer": "3"}\n')
    assert last_json(sppo(capsys, "data", "check", path, "--reward", "math", "--json"))["bad"] == 0


def test_doctor(capsys):
    result = last_json(sppo(capsys, "doctor", "--json"))
    assert "torch" in result["machine"]
    result = last_json(sppo(capsys, "doctor", "--policy.model", SMALL, "--json"))
    assert result["recipe"]["fits"]
    assert result["recipe"]["memory_bytes"]["total"] > 0


def test_help_is_quick_and_explains_every_key():
    script = (
        "import sys\nfrom sppo.cli.main import main\ntry:\n    main(['train', '--help'])\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--objective.ratio" in done.stdout
    assert "importance ratio" in done.stdout


def test_pull_knows_its_models(tmp_path, capsys):
    assert main(["pull", "smollm2-135", "--to", str(tmp_path / "m")]) == 2
    assert "did you mean 'smollm2-135m'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_the_code_recipe_judges_in_the_sandbox_and_measures_hidden_tests(tmp_path, capsys):
    recipe = Path(__file__).parents[2] / "recipes" / "code.toml"
    small = {
        "policy.model": "tiny:hidden=32,layers=1,heads=2", "bootstrap.steps": 2, "bootstrap.batch": 4, "rollout.prompts": 8,
        "rollout.max_tokens": 40, "training.steps": 1, "evaluation.n": 8,
    }  # fmt: skip
    options = [str(piece) for key, value in small.items() for piece in (f"--{key}", value)]
    out = tmp_path / "run"
    text = sppo(capsys, "train", recipe, "--out", out, "--json", "--quiet", *options)
    assert last_json(text)["steps"] == 1
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 <= metrics["reward/mean"] <= 1
    assert "eval/accuracy" in metrics
    outcomes = {k for k in metrics if k.startswith("outcome/")}
    assert outcomes <= {"outcome/correct", "outcome/wrong", "outcome/crashed", "outcome/unparseable", "outcome/timeout"}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_data_check_finds_the_reward_that_fits_the_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "tests": ["assert f(1) == 2"]}\n{"question": "b", "tests": ["1 +"]}\n')
    result = last_json(sppo(capsys, "data", "check", path, "--json", code=2))
    assert [p["row"] for p in result["problems"]] == [f"{path}:2"]


def test_the_critic_is_a_product(trained, tmp_path, capsys):
    from transformers import AutoModel

    folder = tmp_path / "critic"
    assert last_json(sppo(capsys, "critic", "export", trained, "--out", folder, "--json"))["critic"] == str(folder)
    assert "explained variance" in (folder / "README.md").read_text()
    AutoModel.from_pretrained(folder)
    scores = tmp_path / "scores.jsonl"
    said = last_json(
        sppo(capsys, "critic", "score", folder, "--data", "chain:steps=1", "--n", "20", "--out", scores, "--json")
    )
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert said["scored"] == len(rows) == 20
    same = last_json(sppo(capsys, "critic", "score", trained, "--data", "chain:steps=1", "--n", "20", "--json"))[
        "ranked"
    ]
    assert [r["chance"] for r in same] == sorted(r["chance"] for r in rows)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"question": "", "answer": "1"}\n')
    for arguments, why in (
        (["export", trained, "--out", folder], "is not empty"),
        (["score", trained, "--data", "chain:steps=1"], "say how many: --n N"),
        (["score", tmp_path, "--data", "chain:steps=1", "--n", "2"], "is no critic"),
        (["score", folder, "--data", "chain:steps=1", "--n", "0"], "--n must be 1 or more"),
        (["export", tmp_path / "nowhere"], "is no run with a checkpoint"),
        (["score", folder, "--data", blank], "can be read"),
    ):
        assert main(["critic", *map(str, arguments)]) == 2
        assert why in capsys.readouterr().err
