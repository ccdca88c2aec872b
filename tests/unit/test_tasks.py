"""Tasks: the embedded one is right, every row layout is read, splits are disjoint, specs are parsed."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from sppo.config import Config, keys
from sppo.errors import DataError, RecipeError
from sppo.spec import parse_spec, split_specs
from sppo.tasks.base import in_split, load_pair, load_tasks
from sppo.tasks.records import read_rows, task_from


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_chain_problems_are_right():
    source = load_tasks("chain:steps=1-6")
    seen = set()
    for i in range(300):
        task = source[i]
        value, *rest = re.match(r"(\d)((?:[-+*]\d)*)\?$", task.text).groups()
        value, operations = int(value), re.findall(r"([-+*])(\d)", rest[0])
        steps = ""
        for operator, y in operations:
            result = {"+": value + int(y), "-": value - int(y), "*": value * int(y)}[operator] % 10
            steps += f"{value}{operator}{y}={result};"
            value = result
        assert task.solution == f"{steps}A:{value}"
        assert task.columns["answer"] == str(value)
        assert task.difficulty == len(operations)
        seen.add(len(operations))
    assert seen == {1, 2, 3, 4, 5, 6}
    assert source[7] == load_tasks("chain:steps=1-6")[7]


def test_gym_worked_solutions_end_with_the_answer_and_add_up():
    source = load_tasks("gym:chain_sum,min_terms=2,max_terms=5,min_digits=1,max_digits=2")
    for i in range(50):
        task = source[i]
        assert task.solution.endswith(f"Answer: {task.columns['answer']}")
        for line in task.solution.splitlines()[:-1]:
            left, right = line.split(" = ")
            a, sign, b = re.match(r"(-?\d+) ([+-]) (\d+)$", left).groups()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    held = load_tasks("gym:chain_sum,min_terms=2,max_terms=5,split=held-out")
    assert not {source[i].text for i in range(200)} & {held[i].text for i in range(200)}
    assert load_tasks("gym:basic_arithmetic")[0].solution.startswith("Answer:")


def test_gym_errors_name_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'chain_sum'"):
        load_tasks("gym:chain_sums")
    with pytest.raises(RecipeError, match="did you mean 'max_terms'"):
        load_tasks("gym:chain_sum,max_term=3")
    with pytest.raises(RecipeError, match="refuses these options"):
        load_tasks("gym:chain_sum,min_terms=5,max_terms=2")


def test_the_layouts_that_people_have(tmp_path):
    rows = [
        {"question": "2+2?", "answer": 4, "level": "easy"},
        {"prompt": "2+2=", "answer": "4"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}], "tests": ["assert True"]},
        {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4", "style": "rule"}},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"question": "2+2?", "solution": "2+2=4\nAnswer: 4", "answer": "4"},
    ]
    source = load_tasks(write(tmp_path / "rows.jsonl", rows))
    tasks = [source[i] for i in range(len(source))]
    assert tasks[0].prompt == [{"role": "user", "content": "2+2?"}]
    assert tasks[0].columns == {"question": "2+2?", "answer": 4, "level": "easy"}
    assert tasks[1].prompt == "2+2="
    assert tasks[2].columns["tests"] == ["assert True"]
    assert tasks[3].columns["answer"] == "4"
    assert tasks[4].solution == "4"
    assert tasks[4].prompt == [{"role": "user", "content": "2+2?"}]
    assert tasks[5].solution.endswith("Answer: 4")


def test_every_file_format_reads_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("a.jsonl", "b.json", "c.parquet", "d.jsonl.gz"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows, name


def test_splits_of_rows_are_disjoint_and_whole(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(300)])
    parts = {s: load_tasks(f"records:path={path},split={s}") for s in ("train", "held-out", "all")}
    texts = {s: {p[i].text for i in range(len(p))} for s, p in parts.items()}
    assert not texts["train"] & texts["held-out"]
    assert texts["train"] | texts["held-out"] == texts["all"]
    assert 10 < len(texts["held-out"]) < 60
    with pytest.raises(RecipeError, match="split=test"):
        in_split("x", "test")


def test_a_file_named_for_evaluation_is_taken_whole(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", [{"question": f"{n}{i}?", "answer": "1"} for i in range(50)]) for n in "ab"]
    train, held_out = load_pair(paths[0], paths[1], "")
    assert (len(train), len(held_out)) == (50, 50)
    train, held_out = load_pair(paths[0], None, "")
    assert len(train) + len(held_out) == 50
    train, held_out = load_pair(f"records:path={paths[0]},split=train", None, "")
    assert not {t.text for t in train.tasks} & {t.text for t in held_out.tasks}
    for train_spec, eval_spec in (
        (f"records:path={paths[0]},split=all", None),
        ("mine:make", None),
        (paths[0], paths[0]),
    ):
        with pytest.raises(RecipeError, match=r"task\.(eval|train)"):
            load_pair(train_spec, eval_spec, "")


def test_instruction_is_added_to_the_question(tmp_path):
    task = load_tasks("chain:steps=1", instruction="Think.")[0]
    assert task.prompt[-1]["content"].endswith("?\nThink.")


def test_a_source_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mytasks.py").write_text(
        "from sppo import Task\ndef make():\n    return [Task('a', 'q', {'answer': '1'})]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_tasks("mytasks:make")[0].prompt == "q"


def test_specs():
    spec = parse_spec("gym:chain_sum,min_terms=2,flag=true,x=0.5")
    assert (spec.name, spec.words, spec.options) == ("gym", ("chain_sum",), {"min_terms": 2, "flag": True, "x": 0.5})
    assert split_specs("chain:steps=4-6,split=held-out,gym:chain_sum,min_terms=2,data.jsonl") == [
        "chain:steps=4-6,split=held-out", "gym:chain_sum,min_terms=2", "data.jsonl",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="twice"):
        parse_spec("chain:steps=1,steps=2")


def test_rows_that_cannot_be_used():
    for row, message in (
        ({"answer": "1"}, "no prompt"),
        ({"prompt": 3}, "text or a list of chat messages"),
        ({"prompt": []}, "text or a list"),
        ({"question": 5}, "must be text"),
    ):
        with pytest.raises(DataError, match=message):
            task_from(row, "rows.jsonl:1")


def test_every_key_of_a_recipe_has_help_text_and_survives_a_round_trip(tmp_path):
    assert all(description for _, _, description in keys())
    config = Config.load(None, {"training.steps": 3, "objective.dual_clip": 0, "bootstrap.steps": 5}).with_rates(
        10**6, 10**6
    )
    assert config.training.lr == 2e-4
    assert config.bootstrap.lr == 2e-3
    (tmp_path / "recipe.toml").write_text(config.to_toml())
    again = Config.load(tmp_path / "recipe.toml")
    assert again == config
    assert again.sha256 == config.sha256
    moved = Config.load(tmp_path / "recipe.toml", {"run.out": "elsewhere"})
    assert moved.sha256 == config.sha256


@pytest.mark.parametrize("name", ["quickstart", "smollm2-arithmetic", "code"])
def test_the_recipes_that_come_with_the_project_load(name):
    from pathlib import Path

    config = Config.load(Path(__file__).parents[2] / "recipes" / f"{name}.toml")
    assert load_tasks(config.task.train)[0].solution


def test_a_list_in_a_spec_is_one_value():
    from sppo.spec import parse_spec, split_specs

    text = "sppo:objective.clip=[0.1, 0.3],training.lr=1e-4,grpo"
    assert split_specs(text) == ["sppo:objective.clip=[0.1, 0.3],training.lr=1e-4", "grpo"]
    assert parse_spec(split_specs(text)[0]).options == {"objective.clip": "[0.1, 0.3]", "training.lr": 1e-4}
