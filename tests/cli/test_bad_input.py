"""Bad input: one clear sentence that names the file, key or row and the mend; exit code 2; no traceback; nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sppo
from sppo.cli.main import main
from sppo.models import tiny

SMALL = "tiny:hidden=32,layers=1,heads=2"
QUICK = [
    "--policy.model", SMALL, "--critic.model", SMALL, "--training.steps", "1", "--rollout.prompts", "4", "--rollout.max_tokens", "4",
    "--evaluation.n", "4", "--training.minibatches", "1", "--quiet",
]  # fmt: skip


def good_rows(path, n=60):
    path.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(n)))
    return path


def fails(capsys, *arguments, code=2):
    assert main([str(a) for a in arguments]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture
def train(tmp_path, capsys):
    def run(*extra, data="chain:steps=1"):
        return fails(capsys, "train", *QUICK, "--data", data, "--out", tmp_path / "run", *extra)

    return run


def recipe(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_unknown_key_names_the_nearest(tmp_path, capsys):
    message = fails(capsys, "train", recipe(tmp_path, "[training]\nstep = 3\n"))
    assert "recipe.toml: unknown key 'training.step': did you mean 'steps'?" in message
    message = fails(capsys, "train", recipe(tmp_path, "[trainning]\nsteps = 3\n"))
    assert "did you mean 'training'?" in message


def test_values_out_of_range_and_of_the_wrong_type(tmp_path, capsys):
    assert "training.steps" in fails(capsys, "train", recipe(tmp_path, "[training]\nsteps = 0\n"))
    assert "objective.clip" in fails(capsys, "train", recipe(tmp_path, "[objective]\nclip = [1.2, 0.2]\n"))
    assert "rollout.temperature" in fails(capsys, "train", recipe(tmp_path, "[rollout]\ntemperature = 'hot'\n"))
    assert "minibatches" in fails(
        capsys, "train", recipe(tmp_path, "[rollout]\nprompts = 1\n[training]\nminibatches = 2\n")
    )
    assert "kl_form" in fails(capsys, "train", recipe(tmp_path, "[objective]\nkl_form = 'k1'\n"))


def test_broken_toml_is_named_with_its_line(tmp_path, capsys):
    assert "line 2" in fails(capsys, "train", recipe(tmp_path, "seed = 1\n[training\n"))


def test_missing_recipe_and_missing_data(tmp_path, capsys, train):
    assert "no recipe at" in fails(capsys, "train", tmp_path / "none.toml")
    assert "there is no file" in train(data=str(tmp_path / "none.jsonl"))
    assert "did you mean 'chain'?" in train(data="chian:steps=1")
    assert "no option 'step': did you mean 'steps'?" in train(data="chain:step=1")
    assert not (tmp_path / "run").exists()


def test_broken_json_is_named_with_its_line(tmp_path, train):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n{"question": oops}\n')
    assert f"{path}:2: broken JSON" in train(data=str(path))
    path.write_text("[1, 2]\n")
    assert f"{path}:1: a row must be an object" in train(data=str(path))
    path.write_bytes(b'{"question": "\xff"}\n')
    assert "not UTF-8" in train(data=str(path))
    path.write_text("")
    assert "holds no rows" in train(data=str(path))


def test_rows_that_no_reader_could_use(tmp_path, train, capsys):
    """One sentence that names the file, and the row or the column."""
    path = tmp_path / "rows.jsonl"
    for line, why in (
        ('{"question": "a", "question": "b"}', "the key `question` is given twice"),
        ('{"question": ' + "[" * 5000 + "]" * 5000 + "}", "nested over 100 levels deep"),
        ('{"question": "q", "answer": ' + "[" * 150 + "]" * 150 + "}", "nested over 100 levels deep"),
        ('{"question": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "digits"),
        ('{"prompt": 5}', "`prompt` must be text or a list of chat messages, not int"),
        ('{"prompt": [{"role": null, "content": "x"}]}', "a chat message must look like"),
        ('{"prompt": [{"role": "user"}]}', "a chat message must look like"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
            "a part that is not text (image)",
        ),
        ('{"prompt": [{"role": "assistant", "tool_calls": [{}]}]}', "a tool call must look like"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "holds the assistant's turn alone"),
        ('{"q": "x", "a": "y"}', "its columns are `q`, `a`"),
        ("\x00", "broken JSON"),
    ):
        path.write_text('{"question": "1+1?", "answer": "2"}\n' + line + "\n")
        message = train(data=str(path))
        assert f"{path}:2: " in message
        assert why in message
        assert main(["data", "check", str(path)]) == 2
        assert f"{path}:2: row: " in capsys.readouterr().out
    path.write_bytes('{"question": "1+1?"}'.encode("utf-16"))
    assert f"{path}:1: not UTF-8 text" in train(data=str(path))


def test_tables_that_are_damaged(tmp_path, train):
    path = tmp_path / "rows.csv"
    for text, why in (
        ("question,question\na,b\n", ":1: the header names the column `question` twice"),
        ("question,answer\na,b\nc\n", ":3: the row has 1 cells, and the header names 2: `question`, `answer`"),
        ('question,answer\n"a,b\n', ":2: broken CSV"),
        ("a;b\nq;1\n", ":2: the row has no prompt"),
        ("", "holds no rows"),
    ):
        path.write_text(text)
        assert why in train(data=str(path))
    assert "holds no rows" in train(data=str(path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.parquet").write_bytes(b"")
    assert "is a folder; name a file in it: `a.parquet`" in train(data=str(tmp_path / "folder"))
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    assert "cut.jsonl.gz cannot be read" in train(data=str(tmp_path / "cut.jsonl.gz"))
    assert "there is no file" in train(data="x" * 5000 + ".jsonl")
    assert "there is no file ~no-such-user/rows.jsonl" in train(data="~no-such-user/rows.jsonl")


def test_a_parquet_file_whose_text_is_no_text(tmp_path, train):
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets, text = (0, 1, 3, 4), b"a\xff\xfeb"
    buffers = [None, pa.py_buffer(b"".join(o.to_bytes(4, "little") for o in offsets)), pa.py_buffer(text)]
    path = tmp_path / "rows.parquet"
    table = {"question": pa.Array.from_buffers(pa.string(), 3, buffers), "answer": ["1", "2", "3"]}
    pq.write_table(pa.table(table), path)
    assert f"{path}:2: column `question` cannot be read: it is not UTF-8 text" in train(data=str(path))
    pq.write_table(pa.table({"question": ["a"], "when": pa.array([10**15], pa.timestamp("s"))}), path)
    assert f"{path}:1: column `when` cannot be read" in train(data=str(path))


def test_recipes_that_nobody_writes(tmp_path, capsys):
    for text, why in (
        ("a = " + "[" * 10_000, "nested too deeply"),
        ("a = " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("[" + ".".join("a" * 500) + "]\n", "nested too deeply"),
        ("a" + ".b" * 10**5 + " = 1\n", "nested too deeply"),
        ("a" + ".b" * 3000 + " = 1\n", "nested too deeply"),
        ("seed = " + "9" * 5000, "not valid TOML"),
        ("seed = 0x" + "f" * 50_000, "seed: "),
        ("x = '" + "y" * (2**20) + "'", "characters, which no recipe needs"),
        ("seed = 1\nseed = 2\n", "not valid TOML"),
        ("[curriculum]\nkind = 'staged'\nstages = [" + "1," * 10_000 + "]\n", "stages must rise"),
        ("[task]\ncolumns = {a = 1}\n", "task.columns.a"),
        ("[task]\ncolumns = [1]\n", "task.columns"),
        ("[task]\ntrain = ['a']\n", "task.train"),
        ("[training]\n" + "x" * 5000 + " = 1\n", "unknown key"),
        ("seed = \x00", "not valid TOML"),
    ):
        message = fails(capsys, "train", recipe(tmp_path, text))
        assert why in message, text[:40]
        assert len(message) < 1000
    assert len(fails(capsys, "train", "--task.columns", "[" * 5000)) < 1000
    assert "prompt=q,answer=a" in fails(capsys, "verify", tmp_path / "x", "--reward", "answer", "--columns", "q")


def test_data_that_moved_or_changed_since_the_run_began(tmp_path, capsys, monkeypatch):
    data, out = good_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--data", "rows.jsonl", "--out", str(out)]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(out), "--steps", "2", "--quiet"]) == 0  # from any folder
    moved = data.rename(tmp_path / "elsewhere" / "rows.jsonl")
    capsys.readouterr()
    message = fails(capsys, "train", "--resume", out)
    assert f"there is no file {data} any more" in message
    assert f"--resume {out} --task.train FILE" in message
    assert main(["train", "--resume", str(out), "--task.train", "rows.jsonl", "--steps", "3", "--quiet"]) == 0
    assert f'train = "{moved}"' in (out / "recipe.toml").read_text()
    told = [json.loads(line).get("data") for line in (out / "audit.jsonl").read_text().splitlines()]
    assert len({str(data) for data in told if data is not None}) == 1
    assert main(["audit", "verify", str(out)]) == 0
    moved.write_text(moved.read_text() + '{"question": "new", "answer": "1"}\n')
    capsys.readouterr()
    assert "does not hold what this run began with" in fails(capsys, "train", "--resume", out, "--steps", "4")
    assert "must be a file or a folder" in fails(capsys, "train", "--resume", out, "--data", "chain:steps=1")
    assert "reads no file there" in fails(capsys, "train", "--resume", out, "--task.eval", moved)
    (out / "data.json").write_text("{")
    assert "data.json cannot be read" in fails(capsys, "train", "--resume", out)


def test_a_row_without_a_prompt(tmp_path, train):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n{"answer": "2"}\n')
    assert f"{path}:2: the row has no prompt" in train(data=str(path))
    path.write_text('{"prompt": [{"role": "robot", "content": "x"}], "answer": "2"}\n')
    assert f"{path}:1: a chat message must look like" in train(data=str(path))


def test_a_parquet_file_that_is_none(tmp_path, train):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet")
    assert "not a readable parquet file" in train(data=str(path))


def test_model_folders(tmp_path, train):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no config.json" in train("--policy.model", str(folder))
    assert "there is no folder" in train("--policy.model", str(tmp_path / "none"))
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    model.save_pretrained(folder)
    assert "no tokenizer" in train("--policy.model", str(folder))
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights" in train("--policy.model", str(folder))
    assert "critic.model" in train("--critic.model", str(folder))
    assert "tiny has no option 'width'" in train("--policy.model", "tiny:width=3")


def test_weights_that_are_not_weights(tmp_path, train):
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "policy.model" in train("--policy.model", str(tmp_path / "model"))


def test_an_encoder_decoder_is_no_critic_and_no_policy(tmp_path, train):
    from transformers import T5Config, T5Model

    tokenizer = tiny.character_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in train("--critic.model", str(tmp_path / "t5"))
    assert "encoder-decoder" in train("--policy.model", str(tmp_path / "t5"))


def test_a_chat_template_that_refuses(tmp_path, train):
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "System role not supported" in train("--policy.model", str(tmp_path / "model"))


def test_doctor_of_a_model_that_is_not_there(tmp_path, capsys):
    assert "there is no folder" in fails(capsys, "doctor", "--policy.model", str(tmp_path / "none"))


def test_a_model_that_pull_would_fetch(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "fetch it with: sppo pull smollm2-135m" in fails(capsys, "doctor", "--policy.model", "models/smollm2-135m")


def test_a_hub_name_with_a_dot_is_not_taken_for_a_folder(train):
    assert "policy.model: Qwen/Qwen2.5-0.5B has no config that can be read" in train(
        "--policy.model", "Qwen/Qwen2.5-0.5B"
    )


def test_eval_where_nothing_can_be_graded(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?"}\n')
    assert main(["eval", SMALL, "--tasks", str(path), "--max-tokens", "4"]) == 0
    assert "none of 1 responses could be graded" in capsys.readouterr().out


def test_a_tokenizer_without_pad_is_handled(tmp_path):
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert (
        main(
            [
                "train",
                *QUICK,
                "--policy.model",
                str(tmp_path / "model"),
                "--data",
                "chain:steps=1",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )


def test_a_conversation_needs_a_chat_template(tmp_path, train):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path.write_text(
        "".join(
            json.dumps({"prompt": [*turns, {"role": "user", "content": str(i)}], "answer": "1"}) + "\n"
            for i in range(40)
        )
    )
    assert "no chat template" in train(data=str(path))


def test_prompts_longer_than_the_limit(tmp_path, train, capsys):
    data = good_rows(tmp_path / "rows.jsonl")
    message = train("--task.max_prompt_tokens", "2", data=str(data))
    assert "the limit is 2 (task.max_prompt_tokens)" in message
    assert "leaves no room" in message or "has only" in train("--rollout.max_tokens", "5000")
    message = fails(capsys, "solve", SMALL, "x" * 3000, "--max-tokens", "10")
    assert "does not fit" in message


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("raise ValueError('boom')", "raised ValueError: boom"),
        ("return [1.0]", "returned 1 scores for 4"),
        ("return [float('nan')] * len(prompts)", "must lie in [0, 1]"),
        ("return [2.0] * len(prompts)", "must lie in [0, 1]"),
        ("return 'good'", "returned str"),
    ],
)
def test_rewards_that_break_their_promise(tmp_path, train, monkeypatch, body, wanted):
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions, **kwargs):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    assert wanted in train("--reward.use", "mine:score")


def test_a_run_directory_in_use(tmp_path, train):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is not empty and not a run" in train()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    (tmp_path / "run" / "thesis.txt").unlink()
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(tmp_path / "run")]) == 0
    assert "already holds a run; go on with it" in train()


def test_resume_of_nothing_and_with_changes(tmp_path, capsys):
    assert "holds no run" in fails(capsys, "train", "--resume", tmp_path)
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(tmp_path / "run")]) == 0
    assert "training.steps" in fails(capsys, "train", "--resume", tmp_path / "run", "--steps", "0")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2", "--quiet"]) == 0
    assert "has already done 2" in fails(capsys, "train", "--resume", tmp_path / "run", "--steps", "1")
    assert "steps = 2" in (tmp_path / "run" / "recipe.toml").read_text()  # a refusal changes nothing
    assert "leave --training.lr out" in fails(capsys, "train", "--resume", tmp_path, "--training.lr", "1")


def test_unknown_commands_and_options(capsys):
    assert "invalid choice: 'tarin'" in fails(capsys, "tarin")
    assert "--bootstrap.lr or --training.lr" in fails(capsys, "train", "--model", SMALL, "--data", "chain", "--lr", "3")
    assert "did you mean 'training.steps'" in fails(capsys, "train", "--training.stepz", "3")
    assert "give a recipe" in fails(capsys, "train")
    assert "unrecognised argument" in fails(capsys, "eval", SMALL, "--tasks", "chain", "--bogus")


def test_no_space_left(tmp_path):
    """A real full disk: a tiny tmpfs where one may be mounted, else a file-size limit that the kernel enforces the same way."""
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sppo.cli.main", "train", *QUICK, "--data", "chain:steps=1", "--out", str(out / "run")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
    assert done.returncode == 2, done.stderr
    assert "no space left on the disk" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_errors_are_one_object_on_the_last_line(capsys):
    assert main(["eval", "/nowhere/model", "--tasks", "chain", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit"] == 2


def test_a_start_that_fails_leaves_its_folder_free(train, tmp_path, capsys):
    """The reward raises at the first evaluation: mended, the same command works."""
    message = train("--reward.use", "tests.cli.test_bad_input:always_raises")
    assert "always_raises" in message
    assert not (tmp_path / "run").exists()
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(tmp_path / "run"), "--json"]) == 0


def always_raises(prompts, completions, answer):
    raise KeyError("nothing there")


def test_a_resumed_start_that_fails_keeps_its_folder(tmp_path, capsys):
    """Interrupted before its first step, then resumed with a reward that is gone: nothing is deleted."""
    out = tmp_path / "run"
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(out), "--training.steps", "1"]) == 0
    for folder in (out / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    recipe = out / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('use = "answer"', 'use = "tests.cli.test_bad_input:always_raises"'))
    capsys.readouterr()
    fails(capsys, "train", "--resume", out)
    assert recipe.exists()


def test_a_question_that_is_no_text(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert "not UTF-8" in fails(capsys, "solve", out, "\udcff\udcfe")


def test_a_critic_that_cannot_be_read_is_not_exported(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *QUICK, "--data", "chain:steps=1", "--out", str(out)]) == 0
    capsys.readouterr()
    newest = sorted((out / "checkpoints").iterdir())[-1]
    (newest / "critic" / "model.safetensors").write_bytes(b"\x00" * 100)
    fails(capsys, "critic", "export", out, "--out", tmp_path / "critic")
    assert not (tmp_path / "critic").exists()


def test_a_module_of_ones_own_that_is_not_found_says_where_to_stand(train):
    assert "PYTHONPATH" in train("--reward.use", "no_such_module_here:reward")


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"adapter.rank": "0"}, "adapter.rank: input should be greater than or equal to 1 (got 0)"),
        ({"adapter.targets": '["q_prj"]'}, "no layer of this model is called 'q_prj'; did you mean 'q_proj'?"),
        ({"policy.quantize": "nf4"}, "policy.quantize = 'nf4' freezes the weights: add [adapter]"),
        ({"policy.quantize": "nf3", "adapter.rank": "4"}, "policy.quantize: input should be '', 'nf4' or 'int8'"),
        ({"critic.model": "policy"}, "critic.model = 'policy' puts a second adapter on frozen weights: add [adapter]"),
    ],
)
def test_adapters_that_cannot_be(train, tmp_path, keys, why):
    assert why in train(*(piece for key, value in keys.items() for piece in (f"--{key}", value)))
    assert not (tmp_path / "run").exists()


def model_folder(folder, **size):
    model, tokenizer = tiny.build(**{"hidden": 32, "layers": 1, "heads": 2, **size})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_and_an_adapter_on_an_adapter(tmp_path, capsys, train):
    base = model_folder(tmp_path / "base")
    out = tmp_path / "first"
    assert (
        main(
            [
                "train",
                *QUICK,
                "--policy.model",
                str(base),
                "--adapter.rank",
                "2",
                "--data",
                "chain:steps=1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    adapter = out / "checkpoints/step-000001/policy"
    assert "holds an adapter, which is trained on: leave [adapter] out" in train(
        "--policy.model", adapter, "--adapter.rank", "2"
    )
    model_folder(base, seed=1)
    for arguments in (("eval", adapter, "--tasks", "chain:steps=1"), ("train", "--resume", out, "--steps", "2")):
        assert f"its base, {base}, has other weights than the adapter was trained on" in fails(capsys, *arguments)
    model_folder(base, hidden=64)
    message = fails(capsys, "eval", adapter, "--tasks", "chain:steps=1")
    assert "is not an adapter of this base model: size mismatch for base_model" in message


def test_a_quantised_model_is_not_trained_whole_or_quantised_again(tmp_path, train):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, packed = model_folder(tmp_path / "plain"), model_folder(tmp_path / "packed")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu").save_pretrained(packed)
    assert "is quantised, so its weights cannot be trained: add [adapter]" in train("--policy.model", packed)
    again = train("--policy.model", packed, "--adapter.rank", "2", "--policy.quantize", "int8")
    assert "was saved in nf4; leave policy.quantize out" in again


@pytest.mark.parametrize(
    ("package", "keys", "why"),
    [
        ("peft", ["--adapter.rank", "2"], "[adapter] needs peft: pip install 'sppo[adapters]'"),
        (
            "bitsandbytes",
            ["--adapter.rank", "2", "--policy.quantize", "nf4"],
            "policy.quantize = 'nf4' needs bitsandbytes: pip install 'sppo[adapters]'",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_named(tmp_path, package, keys, why):
    """With all the packages that are here but one."""
    there = tmp_path / "packages"
    there.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith((package, "__")) and entry.suffix != ".pth":
            (there / entry.name).symlink_to(entry)
    arguments = ["train", *QUICK, *keys, "--data", "chain:steps=1", "--out", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(sppo.__file__).parents[1]), str(there)])}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "sppo", *arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: {why}"
