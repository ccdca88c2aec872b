"""Modules of the current folder: a spec reaches its own, and no library reaches any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sppo import own
from sppo.errors import RecipeError
from sppo.rewards.loading import load_reward
from sppo.spec import is_import, parse_spec, resolve
from sppo.types import Rollout, Task

OPTIONAL = ("a2wsgi", "pynvml", "trio", "h2", "socksio", "opt_einsum", "mistral_common", "colorama", "uvloop_", "tomli")
"""What libraries look for, whether or not it is there."""


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)


def rollout(text: str = "yes") -> Rollout:
    return Rollout.answer(Task("t", "q"), [1], [2], [0.0], "stop", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(
    folder: Path, *arguments: str, module: str = "sppo", flags: tuple[str, ...] = (), trailing: bool = False
) -> subprocess.CompletedProcess[str]:
    root = str(Path(own.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root + (os.pathsep if trailing else "")}
    return subprocess.run(
        [sys.executable, *flags, "-m", module, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "flags", "trailing"),
    [("sppo", (), False), ("sppo.cli.main", ("-u",), False), ("sppo", ("-P",), False), ("sppo", ("-P",), True)],
)
def test_no_library_imports_from_the_current_folder(tmp_path, module, flags, trailing):
    """`trailing`: PYTHONPATH ends with a colon."""
    write(tmp_path, **{name: f"open('RAN_{name}', 'w')" for name in OPTIONAL})
    write(
        tmp_path, mine="import helpers\ndef reward(completions):\n    return [helpers.score(c) for c in completions]\n"
    )
    write(
        tmp_path,
        helpers="import httpx, uvicorn.middleware.wsgi\ndef score(c):\n    import later\n    return later.one\n",
    )
    write(tmp_path, later="one = 1.0")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "1", "response": "1"}) + "\n")
    arguments = ("verify", "rows.jsonl", "--reward", "mine:reward", "--json")
    done = command(tmp_path, *arguments, module=module, flags=flags, trailing=trailing)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["mean_score"] == 1.0
    assert list(tmp_path.glob("RAN_*")) == []


def test_doctor_imports_nothing_from_the_current_folder(tmp_path):
    write(tmp_path, **{name: f"open('RAN_{name}', 'w')" for name in OPTIONAL})
    done = command(tmp_path, "doctor", "--policy.model", "tiny:hidden=32,layers=1,heads=2")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("RAN_*")) == []


def test_the_module_of_a_judging_worker_is_never_of_the_current_folder(tmp_path):
    write(tmp_path, sympy="open('RAN', 'w')", json="open('RAN', 'w')", latex2sympy2_extended="open('RAN', 'w')")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "1", "response": r"\boxed{1}"}) + "\n")
    done = command(tmp_path, "verify", "rows.jsonl", "--reward", "math", "--json", flags=("-P",))
    assert json.loads(done.stdout.splitlines()[-1])["mean_score"] == 1.0
    assert not (tmp_path / "RAN").exists()


def test_a_module_imports_what_lies_beside_it_at_once_and_later(folder):
    write(
        folder,
        mine="""
import helpers.deep as d, helpers
from helpers import *
from helpers.deep import one as uno
import statistics
def reward(completions):
    from late import two
    return [d.one + helpers.deep.one + uno + two + starred] * len(completions)
""",
        helpers__deep="one = 0.25",
        late="two = 0.25",
        statistics="raise RuntimeError('a file of the same name as the standard library')",
    )
    (folder / "helpers" / "__init__.py").write_text("from . import deep\nstarred = 0.0\n__all__ = ['starred']\n")
    before = set(sys.modules)
    assert load_reward("mine:reward").judge([rollout()])[0].score == 1.0
    assert set(sys.modules) & {"mine", "helpers", "late"} <= before
    assert str(folder) not in sys.path


def test_packages_with_and_without_init(folder):
    write(
        folder,
        pack__rewards="from pack.parts import one\ndef reward(completions):\n    return [one] * len(completions)\n",
        pack__parts="one = 1.0",
    )
    assert load_reward("pack.rewards:reward").judge([rollout()])[0].score == 1.0
    (folder / "pack" / "__init__.py").write_text("")
    (folder / "pack" / "parts.py").write_text("one = 0.5")
    write(
        folder,
        datasets__rows="raise RuntimeError('a folder of data')",
        mine="import datasets\nlibrary = datasets.__file__\n",
    )
    assert "site-packages" in resolve("mine:library", "sppo.rewards", "build")


def test_a_file_of_the_folder_comes_before_an_installed_module_of_that_name(folder):
    import yaml

    write(folder, yaml="def reward(completions):\n    return [1.0] * len(completions)\n")
    assert load_reward("yaml:reward").judge([rollout()])[0].score == 1.0
    assert sys.modules["yaml"] is yaml


def test_a_folder_that_is_on_the_path_already_gives_one_module_not_two(folder, monkeypatch):
    write(folder, on_the_path="class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    import on_the_path  # type: ignore[import-not-found]

    assert resolve("on_the_path:Thing", "sppo.rewards", "build") is on_the_path.Thing
    del sys.modules["on_the_path"]


def test_worker_processes_can_import_it(folder):
    """Each way of starting one; what they are given is pickled by name."""
    write(
        folder, mine="import helpers\nfrom concurrent.futures import ProcessPoolExecutor\nfrom multiprocessing import get_context\n"
        "def reward(completions, how):\n    with ProcessPoolExecutor(1, mp_context=get_context(how)) as pool:\n"
        "        return list(pool.map(helpers.score, completions))\n",
        helpers="import more\ndef score(completion):\n    return more.one\n", more="one = 1.0",
        trio="open('RAN', 'w')",
    )  # fmt: skip
    (folder / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "1", "response": "1"}) + "\n")
    for how in ("fork", "spawn", "forkserver"):
        done = command(folder, "verify", "rows.jsonl", "--reward", f"mine:reward,how={how}", "--json", flags=("-P",))
        assert json.loads(done.stdout.splitlines()[-1])["mean_score"] == 1.0, done.stderr
    assert not (folder / "RAN").exists()


def test_another_folder_is_another_set_of_modules(folder, monkeypatch):
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "mine.py").write_text(f"name = {name!r}\n")
        monkeypatch.chdir(folder / name)
        assert resolve("mine:name", "sppo.rewards", "build") == name


@pytest.mark.parametrize(
    ("text", "spec", "why"),
    [
        ("x = 1", "mine:reward", "module 'mine' has no 'reward': known: x"),
        ("def rewards(completions): ...", "mine:reward", "did you mean 'rewards'"),
        ("import no_such_thing", "mine:reward", r"there is no module 'no_such_thing' \(mine.py, line 1\)"),
        ("x = (", "mine:reward", "SyntaxError"),
        ("\n1 / 0", "mine:reward", r"ZeroDivisionError: division by zero \(mine.py, line 2\)"),
        ("raise SystemExit(3)", "mine:reward", "SystemExit: 3"),
        ("", "other:reward", "there is no other.py in the current folder, and no module 'other' is installed"),
        ("", "answr:reward", "did you mean 'answer'"),
        ("reward = 3", "mine:reward", "neither callable nor has a judge"),
        ("reward = 3", "mine:reward,a=1", "takes no options"),
        ("def reward(completions, level=1): ...", "mine:reward,levle=2", "has no option 'levle': did you mean 'level'"),
        ("def reward(completions, level=1): ...", "mine:reward,2", "'2' has no name"),
        ("class reward:\n    def __init__(self, level): ...", "mine:reward", "missing a required argument: 'level'"),
        ("class reward:\n    def __init__(self, level): self.x = 1 / level", "mine:reward,level=0", r"ZeroDivisionError.*line 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(folder, text, spec, why):
    write(folder, mine=text)
    with pytest.raises(RecipeError if "judge" not in why else Exception, match=why):
        load_reward(spec)


def test_options_of_own_rewards(folder):
    write(
        folder, mine="from sppo import Verdict\n"
        "def function(completions, answer, level=0.25, **columns):\n    assert 'level' not in columns\n    return [level] * len(completions)\n"
        "class Judge:\n    def __init__(self, level=0.25):\n        self.level = level\n"
        "    def judge(self, rollouts):\n        return [Verdict(self.level, 'correct') for r in rollouts]\n"
        "def make(level=0.25):\n    return lambda completions: [level] * len(completions)\n"
        "made = Judge()\n",
    )  # fmt: skip
    row = Rollout.answer(Task("t", "q", {"answer": "1", "level": 9}), [1], [2], [0.0], "stop", "yes")
    for name in ("function", "Judge", "make"):
        assert load_reward(f"mine:{name},level=0.5").judge([row])[0].score == 0.5
    for name in ("Judge", "make", "made"):
        assert load_reward(f"mine:{name}").judge([row])[0].score == 0.25
    mixed = load_reward("mine:Judge,level=1 + 0.5 * mine:function,level=0.25")
    assert mixed.judge([row])[0].score == pytest.approx((1 + 0.5 * 0.25) / 1.5)


def test_specs_of_own_objects_keep_their_options():
    spec = parse_spec("my.pack:engine,fast,size=3,rate=0.5", "sppo.rollout")
    assert (spec.name, spec.words, spec.options) == ("my.pack:engine", ("fast",), {"size": 3, "rate": 0.5})
    assert parse_spec("vllm:gpu=1", "sppo.rollout").name == "vllm"
    assert parse_spec("chain:steps=4-6", "sppo.tasks").options == {"steps": "4-6"}
    assert is_import("mine:engine", "sppo.rollout")
    assert is_import("mine:engine,a=1", "sppo.rollout")
    assert not is_import("gym:chain_sum,max_terms=2", "sppo.tasks")
    assert not is_import("mine:a=1", "sppo.rollout")


def test_the_constraints_are_what_is_tested_with_and_say_which_build_an_index_has():
    import torch

    text = (Path(own.__file__).parents[2] / "constraints.txt").read_text()
    pinned = next(line for line in text.splitlines() if line.startswith("torch=="))
    assert pinned == f"torch=={torch.__version__.partition('+')[0]}"
    assert "CUDA build" in text
    assert "https://download.pytorch.org/whl/cpu" in text
