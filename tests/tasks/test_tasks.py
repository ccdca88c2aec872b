"""Tasks: the embedded one is right, every row layout is read, splits are disjoint, specs are parsed."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from sppo.errors import DataError, RecipeError
from sppo.recipe.config import Config, keys
from sppo.spec import parse_spec, split_specs
from sppo.tasks.base import ListSource, in_split, with_instruction
from sppo.tasks.loading import load_pair, load_tasks
from sppo.tasks.records import task_from
from sppo.tasks.rows import read_rows


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
    import bz2
    import lzma

    import pyarrow as pa

    text = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "e.jsonl.bz2").write_bytes(bz2.compress(text))
    (tmp_path / "f.jsonl.xz").write_bytes(lzma.compress(text))
    with pa.output_stream(str(tmp_path / "g.jsonl.zst"), compression="zstd") as stream:
        stream.write(text)
    (tmp_path / "h.json").write_bytes(text)  # lines by another name
    (tmp_path / "i.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    for path in sorted(p for p in tmp_path.iterdir()):
        name = path.name
        assert [row for _, row in read_rows(tmp_path / name)] == rows, name


def test_published_layouts_of_references_and_tests():
    def columns(row):
        return task_from({"question": "q", **row}, "rows:1").columns

    stdio = {"inputs": ["1\n"], "outputs": ["2\n"]}
    for truth in (stdio, json.dumps(stdio)):  # Eurus-2-RL's code rows, as an object and as JSON text
        found = columns({"reward_model": {"ground_truth": truth, "style": "rule"}})
        assert found["tests"] == stdio
        assert "answer" not in found
    cases = [{"input": "1", "output": "2", "testtype": "stdin"}]
    assert columns({"reward_model": {"ground_truth": json.dumps(cases)}})["tests"] == cases
    assert columns({"reward_model": {"ground_truth": '["assert f(1) == 2"]'}})["tests"] == ["assert f(1) == 2"]
    assert columns({"reward_model": json.dumps({"ground_truth": "4"})})["answer"] == "4"  # a table of text alone
    assert columns({"ground_truth": "4"})["answer"] == "4"
    assert columns({"reward_model": {"ground_truth": {"target": ["4", "four"]}}})["answer"] == ["4", "four"]
    assert columns({"answer": "5", "reward_model": {"ground_truth": "4"}})["answer"] == "5"
    assert columns({"answer": '["34"]'})["answer"] == "34"  # Skywork's lists of one
    assert columns({"answer": '["a", "b"]'})["answer"] == ["a", "b"]
    assert columns({"answer": "[1, 2]"})["answer"] == "[1, 2]"  # an interval
    assert columns({"answer": "[1, 2)"})["answer"] == "[1, 2)"
    assert columns({"answer": float("nan")})["answer"] is None
    assert columns({"reward_model": {"ground_truth": float("nan")}}).get("answer") is None


def test_a_row_without_a_reference_answer_is_masked_not_scored():
    from sppo.rewards.loading import load_reward
    from sppo.types import Rollout

    tests = '{"inputs": ["1"], "outputs": ["1"]}'
    for row in (
        {"answer": float("nan")},
        {"reward_model": {"ground_truth": float("nan")}},
        {"reward_model": {"ground_truth": tests}},  # which are no answer, even to a response that repeats them
    ):
        task = task_from({"question": "q", **row}, "rows:1")
        rollouts = [Rollout.answer(task, [], [], [], "stop", f"The answer is {text}") for text in ("nan", tests)]
        assert {v.outcome for v in load_reward("answer").judge(rollouts)} == {"invalid_task"}


def test_conversations_of_sharegpt_and_instructions_of_alpaca():
    task = task_from(
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        },
        "rows:1",
    )
    assert task.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert task.solution == "4"
    turns = [("human", "a"), ("gpt", "b"), ("human", "c")]
    task = task_from({"conversations": [{"from": f, "value": v} for f, v in turns], "answer": "1"}, "rows:1")
    assert [m["role"] for m in task.prompt] == ["user", "assistant", "user"]
    assert task.solution is None
    task = task_from({"instruction": "Add.", "input": "2+2", "output": "4"}, "rows:1")
    assert (task.prompt, task.solution) == ([{"role": "user", "content": "Add.\n\n2+2"}], "4")
    assert task_from({"instruction": "Hi", "input": "", "output": "o"}, "rows:1").text == "Hi"
    assert task_from({"prompt": "p", "instruction": "i"}, "rows:1").prompt == "p"


def test_tool_calls_in_a_history_are_kept():
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1, "b": null}'},
        "extra": None,
    }
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"properties": {"a": {"type": "int"}, "z": None}}},
    }
    history = [
        {"role": "user", "content": "1+1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "c1", "name": None},
    ]
    for row in ({"prompt": history, "tools": [tool]}, {"messages": history, "tools": json.dumps([tool])}):
        task = task_from(row, "rows:1")
        user, said, answered = task.prompt
        assert user == {"role": "user", "content": "1+1?"}
        assert said["content"] == ""
        assert said["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": None}}
        assert answered == {"role": "tool", "content": "2", "tool_call_id": "c1"}
        assert task.columns["tools"][0]["function"]["parameters"] == {"properties": {"a": {"type": "int"}}}
        assert task.text == "1+1?\n\n\n\n2"
    sharegpt = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    said = task_from({"conversations": sharegpt}, "rows:1").prompt[1]
    assert said["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert task_from({"question": "q", "tools": "hammer"}, "rows:1").columns["tools"] == "hammer"


def test_an_instruction_is_added_to_what_the_user_said_last():
    rows = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    rows.append({"role": "tool", "content": "2"})
    source = with_instruction(ListSource([task_from({"prompt": rows}, "rows:1")]), "Think.")
    assert [m["content"] for m in source[0].prompt] == ["1+1?\nThink.", "", "2"]


def test_tables_of_text(tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffquestion,answer,tests\n"1+1,\n then?",2,\n2+2?,4,"[""assert True""]"\n', encoding="utf-8"
    )
    (tmp_path / "b.tsv").write_text("question\tanswer\n1+1?\t2\n")
    source = load_tasks(str(tmp_path / "a.csv"))
    assert [t.text for t in (source[0], source[1])] == ["1+1,\n then?", "2+2?"]
    assert source[0].columns["tests"] is None
    assert [t.id for t in (source[0], source[1])] == ["a.csv:2", "a.csv:4"]  # the lines on which they begin
    assert load_tasks(str(tmp_path / "b.tsv"))[0].columns["answer"] == "2"
    (tmp_path / "c.csv").write_text("prompt,answer\n" + '"[{""role"": ""user"", ""content"": ""hi""}]",1\n')
    assert load_tasks(str(tmp_path / "c.csv"))[0].prompt == [{"role": "user", "content": "hi"}]


def test_a_dataset_saved_to_disk(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    ).save_to_disk(str(tmp_path / "two"))
    assert [row for _, row in read_rows(tmp_path / "one")] == rows
    assert len(load_tasks(str(tmp_path / "two" / "test"))) == 2
    with pytest.raises(DataError, match="the splits `test`, `train`; name one"):
        load_tasks(str(tmp_path / "two"))
    damaged = next((tmp_path / "one").glob("*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        load_tasks(str(tmp_path / "one"))


def test_columns_of_other_names(tmp_path):
    rows = [{"q": f"{i}+1?", "meta": {"gold": str(i + 1)}} for i in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = {"question": "q", "answer": "meta.gold"}
    train, held_out = load_pair(path, None, "", columns)
    assert len(train) + len(held_out) == 50
    assert train[0].prompt[0]["content"].endswith("+1?")
    assert train[0].columns["answer"] == str(int(train[0].columns["q"].split("+")[0]) + 1)
    with pytest.raises(DataError, match=r"no column `qq`, which is to be `question`; its columns are `q`, `meta`"):
        load_tasks(path, columns={"question": "qq"})
    with pytest.raises(DataError, match="its columns are `q`, `meta`"):
        load_tasks(path)
    assert (
        task_from({"question": "q", "a": "1"}, "r:1", {"question": "missing", "answer": "a"}).columns["answer"] == "1"
    )
    with pytest.raises(RecipeError, match=r"task\.columns renames"):
        load_pair("chain:steps=1", None, "", columns)
    for given in (columns, "question=q, answer=meta.gold"):
        assert Config.load(None, {"task.columns": given}).task.columns == columns
    with pytest.raises(RecipeError, match="prompt=q,answer=a"):
        Config.load(None, {"task.columns": "question"})
    config = Config.load(None, {"task.columns": columns})
    (tmp_path / "recipe.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "recipe.toml") == config


def test_paths_in_a_recipe_are_relative_to_it_or_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    beside = write(tmp_path / "recipes" / "a.jsonl", [{"question": "1", "answer": "1"}])
    here = write(tmp_path / "elsewhere" / "b.jsonl", [{"question": "1", "answer": "1"}])
    text = '[task]\ntrain = "records:path=a.jsonl,split=train"\neval = "b.jsonl"\n[bootstrap]\ntask = "../recipes/a.jsonl"\n'
    (tmp_path / "recipes" / "r.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Config.load("../recipes/r.toml")
    assert config.data() == {
        "task.train": f"records:split=train,path={beside}",
        "task.eval": here,
        "bootstrap.task": beside,
    }
    assert Config.load("../recipes/r.toml", {"task.train": "b.jsonl"}).task.train == here
    (tmp_path / "recipes" / "r.toml").write_text('[task]\ntrain = "chain:steps=1"\n')
    assert Config.load("../recipes/r.toml").task.train == "chain:steps=1"
    assert Config.load(None, {"task.train": "none.jsonl"}).task.train == "none.jsonl"  # said when it is read


def test_the_same_rows_elsewhere_are_the_same_problems_and_recipe(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [write(tmp_path / f / "rows.jsonl", [{"question": f"{i}", "answer": "1"} for i in range(9)]) for f in "ab"]
    first, second = ([t.id for t in load_tasks(p).tasks] for p in paths)
    assert first == second == [f"rows.jsonl:{i}" for i in range(1, 10)]
    assert len({Config.load(None, {"task.train": p}).sha256 for p in paths}) == 1
    assert (
        Config.load(None, {"task.train": paths[0] + "x"}).sha256 != Config.load(None, {"task.train": paths[0]}).sha256
    )


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
    for many in ("a," * 10**5, "[" * 10**5, "a:" + "k=[1,2]," * 10**4, "," * 10**5):
        split_specs(many)  # at once, whatever it holds
    assert parse_spec(split_specs(text)[0]).options == {"objective.clip": "[0.1, 0.3]", "training.lr": 1e-4}
