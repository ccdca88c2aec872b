"""`objective.ratio = "auto"`: a static rule, by updates a step and the length of responses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sppo.recipe import recipe as module
from sppo.recipe.config import Config
from sppo.recipe.objective import PER_TOKEN
from sppo.recipe.presets import LONG_RATIO, PRESETS
from sppo.rollout.engine import Sampling
from sppo.run.run import Run
from sppo.run.warnings import Warnings

from ..conftest import SMALL, small_config

LONG = LONG_RATIO["ratio"]
RECIPES = Path(__file__).parents[2] / "recipes"


def settled(**overrides):
    config, words = Config.load(None, {k.replace("__", "."): v for k, v in overrides.items()}).settled()
    o = config.objective
    return o.ratio, o.engine_correction_level, words


@pytest.mark.parametrize(
    ("tokens", "minibatches", "epochs", "ratio", "level"),
    [
        (64, 4, 2, "sequence", "sequence"),
        (65, 2, 1, LONG, "token"),
        (65, 1, 2, LONG, "token"),
        (8192, 1, 1, "sequence", "token"),  # its ratio is 1, but what corrects for the engine is not
    ],
)
def test_the_rule(tokens, minibatches, epochs, ratio, level):
    keys = {"rollout__max_tokens": tokens, "training__minibatches": minibatches, "training__epochs": epochs}
    for name in ("sppo", "sppo-optimal", "sppo-centred"):
        found = settled(objective__algorithm=name, **keys)
        assert found[:2] == (ratio, level)
        assert found[2].startswith(f"ratio {ratio}")
        assert "(auto: " in found[2]


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n]["objective"]["ratio"] != "auto"])
def test_a_peer_keeps_its_papers_ratio(name):
    ratio = PRESETS[name]["objective"]["ratio"]
    for tokens in (32, 4096):
        reward = "answer + 0 * steps:check=chain,split=semicolons"  # what sppo-hybrid needs
        found = settled(objective__algorithm=name, rollout__max_tokens=tokens, reward__use=reward)
        assert found[0] == ratio
        assert "auto" not in found[2]
        assert found[1] == ("sequence" if tokens == 32 and ratio not in PER_TOKEN else "token")


def test_which_presets_leave_it_open():
    assert {n for n in PRESETS if PRESETS[n]["objective"]["ratio"] == "auto"} == {
        "sppo",
        "sppo-optimal",
        "sppo-centred",
    }


def test_what_a_recipe_names_stays():
    assert settled(objective__ratio="sequence", rollout__max_tokens=4096)[0] == "sequence"
    assert settled(objective__ratio="token", rollout__max_tokens=16)[0] == "token"
    named = settled(objective__engine_correction_level="sequence", rollout__max_tokens=4096)
    assert named[:2] == (LONG, "sequence")
    long = Config.load(None, {"objective.ratio": "family", "objective.kappa": 0.25, "rollout.max_tokens": 512})
    assert long.settled()[0].objective.kappa == 0.25
    assert long.without_effect() == []
    short = Config.load(None, {"objective.kappa": 0.25, "rollout.max_tokens": 32})
    assert short.without_effect() == ["objective.kappa has no effect here: it needs objective.ratio = 'family'"]
    off = Config.load(None, {"objective.engine_correction": 0, "objective.engine_correction_beyond": "mask"})
    assert "engine_correction_beyond has no effect" in off.without_effect()[0]
    assert off.settled()[0].without_effect() == off.without_effect()


def test_another_constant_brings_the_clip_that_fits_it_unless_the_recipe_has_its_own(monkeypatch):
    monkeypatch.setattr(module, "LONG_RATIO", {"ratio": "geometric", "clip": (0.003, 0.004)})
    o = Config.load(None, {"rollout.max_tokens": 512}).settled()[0].objective
    assert (o.ratio, o.clip) == ("geometric", (0.003, 0.004))
    own = Config.load(None, {"rollout.max_tokens": 512, "objective.clip": [0.01, 0.01]}).settled()[0].objective
    assert (own.ratio, own.clip) == ("geometric", (0.01, 0.01))


def test_it_is_settled_for_each_algorithm_and_length_of_a_comparison():
    recipe = Config.load(None, {"rollout.max_tokens": 256})
    assert recipe.objective.ratio == "auto"
    assert recipe.as_algorithm("sppo-optimal", {}).settled()[0].objective.ratio == LONG
    assert recipe.as_algorithm("sppo", {"rollout.max_tokens": 48}).settled()[0].objective.ratio == "sequence"
    grpo = recipe.as_algorithm("grpo", {})
    assert grpo.objective.ratio == "token"
    assert grpo.as_algorithm("sppo", {}).settled()[0].objective.ratio == LONG


def test_settling_twice_changes_nothing():
    config = Config.load(None, {"rollout.max_tokens": 256}).settled()[0]
    assert config.settled()[0] == config
    assert Config.validated(__import__("tomllib").loads(config.to_toml()), "again") == config


NAMED = {  # recipe: what it trains with
    "calibration": "sequence", "code": "sequence", "hybrid": "token", "predicted": "sequence", "quickstart": "sequence", "search": "sequence",
    "smollm2-arithmetic": "sequence", "staged": "sequence", "steps": "sequence", "paper-1.5b": "token", "paper-7b": "token",
    "paper-7b-small-critic": "token", "control-cartpole": "token", "control-hopper": "token", "control-lunarlander": "token",
    "control-mountaincar": "token", "control-pendulum": "token", "tools-calculator": "sequence",
    "llama-3.1-8b-lora": "token", "qwen3-4b-lora-24gb": "token", "qwen2.5-1.5b-full": "token",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_what_the_recipes_train_with(path):
    assert Config.load(path).settled()[0].objective.ratio == NAMED[path.stem]


def test_a_run_says_its_ratio_and_its_recipe_holds_it(tmp_path):
    class Heard:
        def __init__(self):
            self.notes = []

        def note(self, sentence):
            self.notes.append(sentence)

        def __getattr__(self, name):
            return lambda *a, **k: None

    heard = Heard()
    config = Config.load(
        None,
        {"policy.model": SMALL, "critic.model": SMALL, "task.train": "chain:steps=1", "rollout.max_tokens": 80,
         "rollout.prompts": 4, "evaluation.n": 4, "run.out": str(tmp_path / "run")},
    )  # fmt: skip
    job = Run.new(config, heard)
    job.close()
    assert "algorithm sppo, ratio token (auto: a step has 2 updates" in " ".join(heard.notes)
    kept = Config.load(tmp_path / "run" / "recipe.toml").objective
    assert (kept.ratio, kept.engine_correction_level) == (LONG, "token")


# -- what is said of weights that vary too much ------------------------------------------------------------------------


def said(metrics, **keys) -> list[str]:
    sentences: list[str] = []
    config = small_config(**keys)
    warnings = Warnings(config, Sampling.of(config.rollout), sentences.append)
    step = {"rollout/mean_tokens": 80.0, "rollout/truncated": 0.0, "rollout/overruled": 0.0, "reward/spread": 1.0}
    for _ in range(2):  # the second time nothing is said
        warnings.look(step | metrics, [])
    return sentences


@pytest.mark.parametrize(
    ("metrics", "keys", "parts"),
    [
        ({"ratio/ess": 0.49}, {"objective__ratio": "sequence"}, ("updates of one step", "49% at 80 tokens", "'token'", "training.lr")),
        ({"ratio/ess": 0.2}, {"objective__ratio": "token"}, ("use fewer minibatches or epochs",)),
        ({"engine/correction_ess": 0.4, "engine/correction_mean": 1.0}, {},
         ("whole responses of 80 tokens", "effective sample size of 40%", "engine_correction_level = 'token'")),
        ({"engine/correction_ess": 0.7, "engine/correction_mean": 0.75}, {}, ("a mean weight of 0.75 instead of 1",)),
        ({"engine/correction_ess": 0.4, "engine/correction_mean": 0.3}, {"rollout__top_p": 0.9},
         ("rollout.top_k, top_p or min_p", "sample without them", "engine_correction_level = 'token'")),
        ({"engine/correction_ess": 0.9, "engine/correction_mean": 0.7}, {"rollout__top_p": 0.9, "objective__ratio": "token"},
         ("each token", "objective.engine_correction = 0")),
        ({"engine/correction_ess": 0.4}, {"objective__ratio": "token"}, ("policy.dtype = 'float32'", "engine/gap_mean")),
    ],
)  # fmt: skip
def test_weights_that_vary_too_much_are_said_once_with_cause_and_mend(metrics, keys, parts):
    (sentence,) = said(metrics, **keys)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    "metrics", [{"ratio/ess": 0.51}, {"engine/correction_ess": 0.67, "engine/correction_mean": 0.84}, {}]
)
def test_weights_that_are_well_are_not_spoken_of(metrics):
    assert said(metrics) == []
