"""Names of earlier versions: refused in a sentence that says what to use, dropped where they change nothing, readable in old runs."""

from __future__ import annotations

import json

import pytest
import tomli_w

from sppo.audit.chain import CHAIN, HEAD, AuditChain
from sppo.cli.main import main
from sppo.errors import RecipeError
from sppo.files import file_sha256
from sppo.recipe.config import Config, keys
from sppo.recipe.presets import PRESETS
from sppo.recipe.removed import KEYS, VALUES, is_neutral, refusal, without_removed
from sppo.report.reader import RunReader
from sppo.report.single import write

from ..conftest import small_config

OTHER = {  # a value with an effect, for each removed key
    "rollout.kind": "tree", "rollout.branch": 3, "rollout.entropy": 0.2, "rollout.budget": 512, "rollout.leaves": 4,
    "objective.phi": "siblings", "objective.ev_gate": True, "objective.half_life": 2.0, "objective.stakes": True,
    "task.environment": "mine:Guess",
}  # fmt: skip


def tree_of(given):
    out = {}
    for dotted, value in given.items():
        section, _, key = dotted.partition(".")
        out.setdefault(section, {})[key] = value
    return out


def test_the_table_names_only_what_is_gone():
    known = {name for name, _, _ in keys()}
    assert not known & KEYS.keys()
    assert {key for key, _ in VALUES} <= known
    assert not {value for key, value in VALUES if key == "objective.algorithm"} & PRESETS.keys()
    assert OTHER.keys() == KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_a_removed_key_is_refused_in_one_sentence_and_dropped_at_a_neutral_value(key):
    neutral, sentence = KEYS[key]
    with pytest.raises(RecipeError) as error:
        Config.load(None, {key: OTHER[key]})
    assert str(error.value) == f"the command line: {sentence}"
    for value in neutral:
        assert Config.load(None, {key: value}) == Config.load(None)
    assert any(word in sentence for word in ("new name", "leave it out", "leave phi out"))


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_a_removed_value_is_refused_in_one_sentence(key, value):
    with pytest.raises(RecipeError) as error:
        Config.load(None, {key: value})
    assert str(error.value) == f"the command line: {VALUES[key, value]}"


@pytest.mark.parametrize("key", KEYS)
def test_a_removed_option_of_the_command_line_gets_the_same_sentence(key, capsys):
    assert main(["train", "recipes/quickstart.toml", f"--{key}", str(OTHER[key])]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {KEYS[key][1]}"


def test_segments_are_neutral_only_where_nothing_read_them():
    """Every older recipe says phi = 'segments'; with baseline = 'hybrid' it asked for a critic that is gone."""
    steps = {"reward.use": "answer + 0 * steps:check=chain,split=lines", "objective.algorithm": "sppo-hybrid"}
    assert Config.load(None, {**steps, "objective.phi": "steps"}) == Config.load(None, steps)
    for hybrid in ({"objective.algorithm": "sppo-hybrid"}, {"objective.baseline": "hybrid"}):
        assert refusal({**hybrid, "objective.phi": "segments"}) == KEYS["objective.phi"][1]
        assert not is_neutral("objective.phi", "segments", hybrid)
    assert is_neutral("objective.phi", "segments", {"objective.baseline": "critic"})
    assert not is_neutral("objective.ratio", "token", {})


def test_the_resolved_recipe_of_an_older_run_loads_to_the_same_values(tmp_path):
    now = small_config()
    old = now.model_dump(mode="json", exclude_none=True)
    for dotted, (neutral, _) in KEYS.items():
        section, _, key = dotted.partition(".")
        if neutral[0] is not None:
            old[section][key] = neutral[-1]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(old))
    assert Config.load(path) == now
    assert Config.load(path).sha256 == now.sha256
    assert without_removed(old) == now.model_dump(mode="json", exclude_none=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("old") / "run"
    small = "tiny:hidden=32,layers=1,heads=2"
    keys = {
        "policy.model": small, "critic.model": small, "training.steps": 1, "rollout.prompts": 4, "rollout.max_tokens": 4,
        "evaluation.n": 4, "training.minibatches": 1,
    }  # fmt: skip
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    assert main(["train", *options, "--data", "chain:steps=1", "--out", str(out), "--quiet"]) == 0
    return out


def older(run, changes):
    """Make the run's recipe the one of an older version."""
    config = Config.load(run / "recipe.toml")
    tree = config.model_dump(mode="json", exclude_none=True)
    for dotted, value in changes.items():
        section, _, key = dotted.partition(".")
        tree[section][key] = value
    del tree["environment"]  # a section that it did not know
    (run / "recipe.toml").write_text(tomli_w.dumps(tree))
    return tree


def test_view_report_and_audit_read_runs_of_removed_keys(run, tmp_path, capsys):
    kept = (run / "recipe.toml").read_text()
    older(run, OTHER | {"objective.algorithm": "sppo-tree", "objective.baseline": "beta"})
    try:
        with pytest.raises(RecipeError):
            Config.load(run / "recipe.toml")
        reader = RunReader(run)
        assert (reader.config.objective.algorithm, reader.config.objective.baseline) == ("sppo-tree", "beta")
        assert "sppo-tree" in write(reader, tmp_path)[1].read_text()
        assert main(["report", str(run), "--out", str(tmp_path)]) == 0
        assert main(["audit", "verify", str(run)]) == 1  # recipe.toml is not the one that was sealed
        assert "recipe.toml" in capsys.readouterr().out
    finally:
        (run / "recipe.toml").write_text(kept)


def test_an_older_run_resumes_and_its_audit_chain_says_the_same_recipe(run, capsys):
    """Its recipe and its chain hold removed keys at neutral values and lack newer ones: neither makes it another recipe."""
    neutral = {key: values[0] for key, (values, _) in KEYS.items() if values[0] is not None}
    older(run, neutral)
    reseal(run, neutral)
    assert main(["audit", "verify", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--steps", "2", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["audit", "verify", str(run)]) == 0
    assert "another recipe" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["task = ['chain']", "lr = 'fast'", "until = {a = 1}"])
def test_a_value_of_another_type_is_no_recipe_of_any_version(tmp_path, line):
    """Also where the default is None: a report would fail on it later."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[bootstrap]\n{line}\n[objective]\nalgorithm = 'sppo-tree'\n")
    with pytest.raises(RecipeError, match="another type"):
        Config.recalled(path)
    path.write_text("[bootstrap]\nlr = 1\n[objective]\nalgorithm = 'sppo-tree'\n")
    assert Config.recalled(path).bootstrap.lr == 1


def reseal(run, neutral):
    """Write the chain anew, as a version with these keys would have."""
    lines = [json.loads(line) for line in (run / CHAIN).read_text().splitlines()]
    (run / CHAIN).unlink()
    (run / HEAD).unlink()
    chain = AuditChain(run)
    for entry in lines:
        entry = {k: v for k, v in entry.items() if k not in ("previous", "sha256")}
        if "recipe" in entry:
            entry["recipe"] |= neutral
            for known in [k for k in entry["recipe"] if k.startswith("environment.")]:
                del entry["recipe"][known]
        if "recipe_file_sha256" in entry:
            entry["recipe_file_sha256"] = file_sha256(run / "recipe.toml")
        chain.append(entry)
