"""`sppo export`: what others load is what was trained; the hub here is a small server that speaks its protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sppo.cli.main import main
from sppo.models import tiny
from sppo.models.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's use of transformers
SMALL = "tiny:hidden=32,layers=1,heads=2"
IDS = torch.arange(3, 21).view(2, 9)


def trained(out, *keys, model=SMALL):
    arguments = [
        "train", "--model", model, "--data", "chain:steps=1", "--out", out, "--steps", "2", "--critic.model", "policy", "--adapter.rank", "4",
        "--training.lr", "1e-2", "--training.critic_lr", "1e-2", "--rollout.prompts", "8", "--rollout.max_tokens", "8", "--evaluation.n", "8",
        "--evaluation.every", "1", "--run.checkpoint_every", "1", "--quiet", *keys,
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    return Path(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("adapted") / "run")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bfloat16 model in a folder, with a card that says its licence."""
    folder = tmp_path_factory.mktemp("model") / "small"
    made, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def export(capsys, *arguments, code=0):
    assert main(["export", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[-1] if code else said.out


def loaded(folder):
    return Policy.load(str(folder), dtype="auto", device=torch.device("cpu"), seed=0)[0]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_an_adapter_goes_with_its_base_and_the_runs_evidence(run, tmp_path, capsys):
    to = tmp_path / "out"
    said = export(capsys, run, "--to", to, "--json")
    result = json.loads(said.splitlines()[-1])
    assert result == {"folder": str(to), "adapter": True, "base": str(to / "base"), "hub": None}
    assert f"vllm serve {to / 'base'} --enable-lora --lora-modules out={to}" in said
    expected = logits(loaded(run / "checkpoints/step-000002/policy").model)
    base = AutoModelForCausalLM.from_pretrained(to / "base")
    assert not torch.equal(logits(base), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, to)), expected)
    assert GenerationConfig.from_pretrained(to).eos_token_id == AutoTokenizer.from_pretrained(to).eos_token_id
    card = ModelCard.load(to / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None
    head = json.loads((run / "audit.head").read_text())["sha256"]
    for evidence in ("95% interval", "| steps | 2 of 2 |", "rank 4, alpha 32", f"--head {head}", "[adapter]\nrank = 4"):
        assert evidence in card.text
    assert str(run) not in card.text
    to.rename(tmp_path / "moved")  # its base goes along
    assert torch.equal(logits(loaded(tmp_path / "moved").model), expected)
    export(capsys, tmp_path / "moved", "--to", tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again").model), expected)
    assert (tmp_path / "again/README.md").read_text() == (tmp_path / "moved/README.md").read_text()
    (tmp_path / "moved/README.md").unlink()
    export(capsys, tmp_path / "moved", "--to", tmp_path / "bare")
    assert "Its training run is not known here." in (tmp_path / "bare/README.md").read_text()


def test_an_older_checkpoint_has_its_own_evidence(run, tmp_path, capsys):
    export(capsys, run / "checkpoints/step-000001", "--to", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| steps | 1 of 2 |" in card
    assert "These are the weights after 1 step " in card
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert f"| held-out accuracy | {first['eval/accuracy']:.3f} " in card


def test_merged_is_the_sum_in_float32_rounded_once(model, tmp_path, capsys):
    run = trained(tmp_path / "run", "--policy.dtype", "bfloat16", "--adapter.alpha", "64", model=model)
    assert not (run / "base").exists()  # the folder that was named is its base
    to = tmp_path / "out"
    export(capsys, run, "--to", to, "--merged")
    found = AutoModelForCausalLM.from_pretrained(to, dtype="auto").state_dict()
    policy = loaded(run / "checkpoints/step-000002/policy")
    adapter, scale = policy.adapters.named("default"), 64 / 4
    before = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert found.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        a, b = (adapter.get(f"{name.removesuffix('.weight')}.lora_{m}.default.weight") for m in "AB")
        assert found[name].dtype == torch.bfloat16
        expected = weight if a is None else (weight.float() + scale * (b.float() @ a.float())).bfloat16()
        assert torch.equal(found[name], expected)
        changed += not torch.equal(weight, found[name])
    assert changed == 7
    assert not list(to.glob("adapter*"))
    AutoTokenizer.from_pretrained(to)
    card = ModelCard.load(to / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
    export(capsys, run, "--to", tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter/README.md").data.library_name == "peft"
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


def test_a_whole_model_is_copied(tmp_path, capsys):
    arguments = [
        "train", "--model", SMALL, "--data", "chain:steps=1", "--out", str(tmp_path / "run"), "--steps", "1", "--critic.model", SMALL,
        "--rollout.prompts", "8", "--rollout.max_tokens", "4", "--evaluation.n", "8", "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    export(capsys, tmp_path / "run", "--to", tmp_path / "out")
    expected = loaded(tmp_path / "run/checkpoints/step-000001/policy").sha256()
    assert loaded(tmp_path / "out").sha256() == expected
    assert "held-out accuracy" in (tmp_path / "out/README.md").read_text()
    assert "is a whole model already" in export(capsys, tmp_path / "run", "--to", tmp_path / "x", "--merged", code=2)
    assert not (tmp_path / "x").exists()


def test_merging_into_a_quantised_base_is_refused(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    run = trained(tmp_path / "run", "--policy.quantize", "nf4")
    assert "is quantised (nf4)" in export(capsys, run, "--to", tmp_path / "out", "--merged", code=2)
    assert "vllm serve" in (said := export(capsys, run, "--to", tmp_path / "out"))
    assert "--quantization bitsandbytes" in said
    expected = logits(loaded(run / "checkpoints/step-000002/policy").model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), expected)


def test_what_cannot_be_exported_is_one_sentence(run, tmp_path, capsys):
    altered = tmp_path / "altered"
    shutil.copytree(run, altered)
    (altered / "checkpoints/step-000002/policy/tokenizer_config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    for arguments, why in (
        ((run, "--to", tmp_path / "full"), "is not empty; choose a new folder"),
        ((altered, "--to", tmp_path / "x"), "policy/tokenizer_config.json was changed"),
        ((tmp_path / "nowhere", "--to", tmp_path / "x"), "there is no folder"),
        ((tmp_path / "full", "--to", tmp_path / "x"), "is no run, no checkpoint and no model folder"),
        ((run, "--to", tmp_path / "x", "--private"), "--private is of --hub"),
        ((run, "--to", "/proc/x"), "cannot be written"),
    ):
        assert why in export(capsys, *arguments, code=2)
    (altered / "base").rename(tmp_path / "gone")
    source = tmp_path / "lonely"
    shutil.copytree(run / "checkpoints/step-000002/policy", source)
    (source / "adapter_config.json").write_text(
        json.dumps(json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/none/base"})
    )
    assert "its base model, /none/base, is not there any more" in export(capsys, source, "--to", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


def test_the_critics_adapter_goes_with_its_base(run, tmp_path, capsys):
    def scores(folder):
        assert main(["critic", "score", str(folder), "--data", "chain:steps=1", "--n", "6", "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["ranked"]

    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    assert main(["critic", "export", str(moved), "--out", str(tmp_path / "critic")]) == 0
    assert f"PeftModel on {tmp_path / 'critic/base'}" in capsys.readouterr().out
    expected = scores(run)
    assert len({row["chance"] for row in expected}) > 1
    shutil.rmtree(moved)
    assert scores(tmp_path / "critic") == expected
    (tmp_path / "critic").rename(tmp_path / "elsewhere")
    assert scores(tmp_path / "elsewhere") == expected
    assert "holds an adapter" in (tmp_path / "elsewhere/README.md").read_text()


# -- the hub -------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The endpoints of huggingface_hub that an upload calls; `repos` holds what was committed."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repos, path = self.server.repos, self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in repos:
                return self.answer(409, {"url": f"http://{self.headers['Host']}/{name}"})
            repos[name] = {"private": bool(asked.get("private")) or asked.get("visibility") == "private", "files": {}}
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            if name == "me/full":
                return self.answer(507, {"error": "no space"})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repos[name]["files"][line["value"]["path"]] = content
            return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1"})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        if name in self.server.repos:
            return self.answer(
                200, {"id": name, "sha": "0", "private": self.server.repos[name]["private"], "siblings": []}
            )
        return self.answer(404, {"error": self.path})

    def answer(self, status, found):
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.endpoint = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_upload_holds_the_folder(run, hub, tmp_path, capsys):
    to = tmp_path / "a"
    assert "it is at me/mine" in export(capsys, run, "--to", to, "--hub", "mine", "--private")
    assert hub.repos["me/mine"]["private"]
    there = {str(p.relative_to(to)) for p in to.rglob("*") if p.is_file()}
    assert there == hub.repos["me/mine"]["files"].keys()
    assert {"README.md", "adapter_model.safetensors", "base/model.safetensors"} <= there
    for name, content in hub.repos["me/mine"]["files"].items():
        assert (to / name).read_bytes() == content
    assert 'snapshot_download("me/mine")' in hub.repos["me/mine"]["files"]["README.md"].decode()


def test_the_hub_is_where_the_environment_says(run, hub, tmp_path, capsys):
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": hub.endpoint}
    arguments = ["export", str(run), "--to", str(tmp_path / "a"), "--hub", "me/public"]
    subprocess.run([sys.executable, "-m", "sppo", *arguments], env=env, check=True, timeout=300)
    assert hub.repos["me/public"]["files"]
    assert not hub.repos["me/public"]["private"]
    said = export(capsys, run, "--to", tmp_path / "b", "--hub", "me/public", "--private", code=2)
    assert "me/public is there and public" in said
    assert not (tmp_path / "b").exists()


def test_an_upload_that_fails_is_one_sentence(run, hub, tmp_path, capsys, monkeypatch):
    to = tmp_path / "x"

    def fails(name="me/a"):
        return export(capsys, run, "--to", to, "--hub", name, code=2)

    assert "Repo id" in fails("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "other")
    assert "(401): the token may not write there" in fails()
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "needs a token" in fails()
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fails()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not to.exists()
    assert f"{to} is written, and could not be uploaded" in fails("me/full")
    assert (to / "adapter_model.safetensors").exists()
    shutil.rmtree(to)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in fails()
