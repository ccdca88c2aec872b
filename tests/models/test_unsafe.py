"""What is said each time that something is not as safe as it could be, and code that comes with a model."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest

from sppo.cli.main import main
from sppo.errors import ModelError
from sppo.models import tiny
from sppo.models.loading import load, load_tokenizer, outline
from sppo.sandbox import Sandbox

CODE = """
open({mark!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_backend_that_isolates_nothing_says_so_each_time(capfd):
    for _ in range(2):
        with Sandbox("unsafe-subprocess", 1):
            assert "is not a sandbox: programs run as you" in capfd.readouterr().err


@pytest.fixture
def with_code(tmp_path):
    """A model folder that wants its own code to be run."""
    folder = tmp_path / "model"
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.Mine"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(told | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (folder / "mine.py").write_text(CODE.format(mark=str(tmp_path / "RAN")))
    return folder


def test_code_that_comes_with_a_model_is_never_run(with_code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))  # to whoever asks
    for call in (
        lambda: outline(str(with_code), role="policy.model", head=True),
        lambda: load(str(with_code), role="policy.model", head=True),
        lambda: load(str(with_code), role="critic.model", head=False),
    ):
        with pytest.raises(ModelError, match=r"cannot be loaded|no config that can be read"):
            call()
    with contextlib.suppress(ModelError):  # one that needs no code may be loaded without
        load_tokenizer(str(with_code), "policy.model")
    for command in ("doctor", "train"):
        arguments = [command, "--policy.model", str(with_code), "--task.train", "chain:steps=1"]
        assert main([*arguments, *(["--out", str(tmp_path / "run")] if command == "train" else [])]) == 2
        assert "error: policy.model" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "sppo", "doctor", "--policy.model", str(with_code)], cwd=with_code, input="y\n" * 20, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert not (tmp_path / "RAN").exists()
