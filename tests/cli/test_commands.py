"""The commands as a user meets them: their text, their JSON, their exit codes."""

from __future__ import annotations

import json
import re
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
        assert task["entropy"] > 0
    assert "accuracy" in text
    assert re.search(r"pass@4 [01]\.\d{3}\n.*, entropy \d\.\d{3} nats per token", text)
    greedy = sppo(capsys, "eval", trained, "--tasks", "chain:steps=1", "--n", 6, "--temperature", 0, "--json")
    assert last_json(greedy)["tasks"][0]["entropy"] is None
    assert "entropy" not in greedy.splitlines()[1]
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
        (["score", tmp_path, "--data", "chain:steps=1", "--n", "2"], "is not a critic"),
        (["score", folder, "--data", "chain:steps=1", "--n", "0"], "--n must be 1 or more"),
        (["export", tmp_path / "nowhere"], "is not a run with a checkpoint"),
        (["score", folder, "--data", blank], "can be read"),
    ):
        assert main(["critic", *map(str, arguments)]) == 2
        assert why in capsys.readouterr().err


OPTIONAL = ("a2wsgi", "pynvml", "trio", "h2", "socksio", "opt_einsum", "mistral_common")
"""What libraries import where it is there."""


def test_view_eval_and_solve_import_nothing_from_the_current_folder(trained, tmp_path):
    import urllib.request

    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / f'RAN_{name}')!r}, 'w')")
    for arguments in (["eval", trained, "--tasks", "chain:steps=1", "--n", "2"], ["solve", trained, "1+1?"]):
        subprocess.run(
            [sys.executable, "-m", "sppo", *map(str, arguments)], cwd=tmp_path, check=True, capture_output=True
        )
    view = subprocess.Popen(
        [sys.executable, "-m", "sppo", "view", str(trained)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # fmt: skip
    try:
        with urllib.request.urlopen(view.stdout.readline().strip(), timeout=60) as page:
            assert page.status == 200
    finally:
        view.terminate()
        view.wait()
        view.stdout.close()
    assert list(tmp_path.glob("RAN_*")) == []


OWN = '''
from sppo.models import tiny
from sppo.rollout.local import LocalEngine


class Rows:
    """Rows, and not tasks: they become tasks as rows of a file do."""

    def __init__(self, n=20):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"question": f"{index}+1?", "answer": str(index + 1)}


rows = [{"question": f"{i}+2?", "answer": str(i + 2)} for i in range(8)]


def engine(policy, fast=False):
    made = LocalEngine(policy)
    made.stated = f"my engine, fast={fast}"
    return made


class Tracker:
    id = "mine"

    def __init__(self, run, name="log"):
        self.file = open(run.folder / f"{name}.txt", "w")

    def log(self, step, metrics):
        print(step, file=self.file)

    def close(self, summary):
        self.file.close()


def critic(hidden=32):
    return tiny.build(hidden=hidden, layers=1, heads=2, head=False)


def policy(layers=1):
    return tiny.build(hidden=32, layers=layers, heads=2)


def reward(completions, answer, bonus=0.5):
    return [float(c[-1]["content"] == a) * bonus for c, a in zip(completions, answer)]


def not_an_engine(policy):
    return 3


OWNED = 3
'''


def train_own(capsys, tmp_path, names, code=0):
    options = {
        "policy.model": SMALL, "critic.model": SMALL, "task.train": "chain:steps=1", "rollout.prompts": 4, "rollout.max_tokens": 4,
        "evaluation.n": 4, "training.steps": 1, "run.out": tmp_path / "run",
    }  # fmt: skip
    arguments = [str(piece) for key, value in (options | names).items() for piece in (f"--{key}", value)]
    assert main(["train", *arguments, "--json"]) == code
    return capsys.readouterr()


@pytest.mark.parametrize(
    "names",
    [
        {"rollout.engine": "mine:engine", "task.train": "mine:Rows", "task.eval": "mine:rows", "run.trackers": "mine:Tracker",
         "critic.model": "mine:critic", "policy.model": "mine:policy", "reward.use": "mine:reward"},
        {"rollout.engine": "mine:engine,fast=true", "task.train": "mine:Rows,n=12", "task.eval": "mine:Rows,n=4",
         "run.trackers": "mine:Tracker,name=other", "critic.model": "mine:critic,hidden=16", "policy.model": "mine:policy,layers=2",
         "reward.use": "mine:reward,bonus=1"},
    ],
)  # fmt: skip
def test_own_objects_of_every_room_with_and_without_options(tmp_path, capsys, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    with_options = "," in names["rollout.engine"]
    said = train_own(capsys, tmp_path, names)
    assert f"my engine, fast={with_options}" in said.err
    run = tmp_path / "run"
    assert (run / ("other.txt" if with_options else "log.txt")).read_text() == "0\n"
    config = json.loads((run / "checkpoints/step-000001/critic/config.json").read_text())
    assert config["hidden_size"] == (16 if with_options else 32)
    config = json.loads((run / "checkpoints/step-000001/policy/config.json").read_text())
    assert config["num_hidden_layers"] == (2 if with_options else 1)
    assert last_json(sppo(capsys, "train", "--resume", run, "--steps", "2", "--json"))["steps"] == 2


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("rollout.engine", "mine:not_an_engine", "makes a int without stated, context, generate"),
        ("rollout.engine", "mine:engine,slow=1", "engine mine:engine has no option 'slow': known: fast"),
        ("rollout.engine", "mine:rows", "engine mine:rows is a list, which cannot be called"),
        ("rollout.engine", "mine:nothing", "module 'mine' has no 'nothing'"),
        ("task.train", "mine:engine,policy=3", "decides its own problems; name held-out ones in task.eval"),
        ("task.eval", "mine:critic", "mine:critic[0] is a LlamaModel; a problem is a Task, or a row"),
        ("task.eval", "mine:OWNED", "is a int; a source of problems is a sequence"),
        ("task.eval", "mine:Tracker", "missing a required argument: 'run'"),
        ("task.eval", "mine:Rows,m=3", "has no option 'm'"),
        ("run.trackers", "mine:Tracker,nme=3", "has no option 'nme': did you mean 'name'"),
        ("run.trackers", "mine:critic,hidden=3", "critic"),
        ("critic.model", "mine:engine", "missing a required argument: 'policy'"),
        ("critic.model", "mine:Rows", "it must return a transformers model and its tokenizer"),
        ("reward.use", "mine:reward,bnus=2", "has no option 'bnus': did you mean 'bonus'"),
    ],
)
def test_own_objects_that_do_not_fit_are_one_sentence(tmp_path, capsys, monkeypatch, key, value, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    assert why in train_own(capsys, tmp_path, {key: value}, code=2).err


def test_a_critic_that_lies_next_to_a_model_is_not_its_own(trained, tmp_path, capsys):
    models = tmp_path / "models"
    sppo(capsys, "critic", "export", trained, "--out", models / "critic")
    shutil.copytree(trained / "checkpoints" / "step-000002" / "policy", models / "mine")
    shutil.copytree(trained / "checkpoints" / "step-000002" / "policy", models / "policy")
    for name in ("mine", "policy"):
        solved = last_json(sppo(capsys, "solve", models / name, "3+4?", "--max-tokens", "4", "--json"))
        assert solved["predicted_chance"] is None
        assert main(["critic", "score", str(models / name), "--data", "chain:steps=1", "--n", "2"]) == 2
        assert "is not a critic" in capsys.readouterr().err
        assert main(["critic", "export", str(models / name), "--out", str(tmp_path / "x")]) == 2
        assert "is not a run with a checkpoint" in capsys.readouterr().err
    for part in ("", "checkpoints/step-000002", "checkpoints/step-000002/policy"):
        assert last_json(sppo(capsys, "solve", trained / part, "3+4?", "--json"))["predicted_chance"] is not None


def test_solve_takes_a_system_message_and_a_conversation(trained, capsys):
    plain = last_json(sppo(capsys, "solve", trained, "3+4?", "--json"))
    system = last_json(sppo(capsys, "solve", trained, "3+4?", "--system", "Answer in words.", "--json"))
    assert system["system"] == "Answer in words."
    assert system["predicted_chance"] != plain["predicted_chance"]
    written = json.dumps([{"role": "system", "content": "Answer in words."}, {"role": "user", "content": "3+4?"}])
    chat = last_json(sppo(capsys, "solve", trained, written, "--json"))
    assert chat["predicted_chance"] == system["predicted_chance"]
    assert chat["responses"] == system["responses"]
    assert main(["solve", str(trained), written, "--system", "twice"]) == 2
    assert "begin with a system message already" in capsys.readouterr().err
    assert main(["solve", str(trained), '[{"role": "user"}]']) == 2
    assert "the question" in capsys.readouterr().err
    assert last_json(sppo(capsys, "solve", trained, "[1, 2] + [3]?", "--json"))["question"] == "[1, 2] + [3]?"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_eval_writes_every_response(trained, tmp_path, capsys, name):
    out = tmp_path / name
    result = last_json(
        sppo(
            capsys,
            "eval",
            trained,
            "--tasks",
            "chain:steps=1,chain:steps=2",
            "--n",
            3,
            "--samples",
            2,
            "--out",
            out,
            "--json",
        )
    )
    text = out.read_text()
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert result["out"] == str(out)
    assert len(rows) == 2 * 3 * 2
    for task in result["tasks"]:
        own = [r["correct"] for r in rows if r["task"] == task["task"] and not r["masked"]]
        assert sum(own) / len(own) == pytest.approx(task["accuracy"])
    assert {"id", "prompt", "response", "score", "outcome", "evidence", "finish"} <= rows[0].keys()
    assert main(["eval", str(trained), "--tasks", "chain:steps=1", "--out", str(tmp_path / "no" / "x.jsonl")]) == 2
    assert "--out" in capsys.readouterr().err
