"""The peers: hand-worked advantages, each loss against a plain version and against TRL's own, and what no baseline may see."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import Share, pack
from sppo.learning.learner import Learner
from sppo.learning.update_stats import Tally
from sppo.recipe.config import Config
from sppo.recipe.objective import PER_TOKEN
from sppo.recipe.presets import PRESETS
from sppo.run.build import Parts
from sppo.run.loop import train
from sppo.run.observer import Silent
from sppo.run.run import Run
from sppo.run.sample import _sorted_out
from sppo.types import Verdict

from ..conftest import graded, gradients_of, small_config, small_critic, small_policy, small_rollouts

SCORES = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # two groups of four


def judged(rollouts, scores):
    return [graded(r, s) for r, s in zip(rollouts, scores, strict=True)]


def a_batch(policy, name, *, scores=SCORES, masked=()):
    """Eight judged rollouts as the algorithm would sample them: one a prompt, or two prompts of four."""
    samples = 1 if PRESETS[name]["rollout"]["samples"] == 1 else 4
    rollouts = small_rollouts(policy, 8 // samples, samples=samples)
    rollouts = judged(rollouts, scores)
    rollouts = [
        r.judged(replace(r.verdict, outcome="infra_error")) if i in masked else r for i, r in enumerate(rollouts)
    ]
    if PRESETS[name]["objective"]["baseline"] == "greedy":
        greedy = judged(small_rollouts(policy, 8, temperature=0.0), [1.0, 0.0] * 4)
        rollouts = [replace(r, greedy=g) for r, g in zip(rollouts, greedy, strict=True)]
    return pack(rollouts, policy.pad_id)


def a_config(name, **changes):
    base = {"objective__algorithm": name, "rollout__prompts": 8, "objective__engine_correction": 0}
    if PRESETS[name]["rollout"]["samples"] > 1:
        base |= {"rollout__samples": 4, "rollout__prompts": 2}
    return small_config(**base | changes)


def a_learner(policy, name, **changes):
    config = a_config(name, **changes)
    return Learner(policy, small_critic() if config.critic_reads else None, None, config)


# -- advantages


def test_a_critic_that_lags_blames_nobody_when_centred():
    """A stage whose problems the critic overrates: all fail, and nothing is left of V."""
    policy = small_policy()
    batch = a_batch(policy, "sppo-centred", scores=[0.0] * 8)
    for name, largest in (("sppo", 0.5), ("sppo-centred", 0.0)):
        learner = a_learner(policy, name)
        learner.credit.critic.start_at(0.5)
        assert float(learner.advantage(batch)[0].abs().max()) == pytest.approx(largest, abs=1e-6)


def test_what_was_missed_is_of_ones_own_difficulty():
    """Sixteen problems of a kind that all succeed, sixteen of one that all fail, V = ½ for all: nobody did better than expected."""
    policy = small_policy()
    rollouts = judged(small_rollouts(policy, 32), [1.0] * 16 + [0.0] * 16)
    rollouts = [replace(r, task=replace(r.task, difficulty=float(2 + i // 16))) for i, r in enumerate(rollouts)]
    learner = a_learner(policy, "sppo-centred")
    learner.credit.critic.start_at(0.5)
    assert float(learner.advantage(pack(rollouts, policy.pad_id))[0].abs().max()) < 1e-6


BASELINE = {
    "reinforce": [(sum(SCORES) - s) / 7 for s in SCORES],
    "rloo": [(sum(SCORES[i // 4 * 4 : i // 4 * 4 + 4]) - s) / 3 for i, s in enumerate(SCORES)],
    "remax": [1.0, 0.0] * 4,
    "dr-grpo": [0.5] * 8,
    "sppo": [0.3] * 8,
}


@pytest.mark.parametrize("name", BASELINE)
def test_each_presets_advantage_by_hand(name):
    learner = a_learner(small_policy(), name)
    if learner.credit.critic is not None:
        learner.credit.critic.start_at(0.3)
    found = learner.advantage(a_batch(learner.policy, name))[0]
    assert torch.allclose(found, torch.tensor(SCORES) - torch.tensor(BASELINE[name]), atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo-token", "gmpo", "sapo", "cispo", "dapo"])
def test_grpo_and_its_kin_divide_by_the_groups_deviation(name):
    policy = small_policy()
    found = a_learner(policy, name, rollout__overlong=0).advantage(a_batch(policy, name))[0]
    expected = (torch.tensor(SCORES) - 0.5) / (math.sqrt(1 / 3) + 1e-4)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in PRESETS if PRESETS[n]["objective"]["baseline"] not in ("group", "token-critic")]
)
def test_no_baseline_sees_its_samples_own_reward(name):
    """Flipping one reward moves that sample's advantage by exactly 1, whatever is remembered of earlier batches."""
    found = []
    for flipped in (0.0, 1.0):
        policy = small_policy()
        learner = a_learner(policy, name)
        if learner.credit.critic is not None:
            torch.manual_seed(3)
            torch.nn.init.normal_(learner.credit.critic.head.weight)
        learner.advantage(a_batch(policy, name, scores=[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
        found.append(learner.advantage(a_batch(policy, name, scores=[flipped, *SCORES[1:]]))[0])
    difference = found[1][0] - found[0][0]  # one number, or one for each token
    assert torch.allclose(difference, torch.ones_like(difference), atol=1e-6)


def test_control_a_group_mean_does_see_it():
    policy = small_policy()
    one, zero = (
        a_learner(policy, "dr-grpo").advantage(a_batch(policy, "dr-grpo", scores=[s, *SCORES[1:]]))[0]
        for s in (1.0, 0.0)
    )
    assert math.isclose(float(one[0] - zero[0]), 1 - 1 / 4, abs_tol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_masked_samples_are_in_no_baseline_and_teach_nothing(name):
    """What a masked sample scored changes no other sample's advantage, and no gradient."""
    gradients, advantages = [], []
    for score in (0.0, 1.0):
        policy = small_policy()
        learner = a_learner(policy, name)
        batch = a_batch(policy, name, scores=[SCORES[0], score, *SCORES[2:]], masked=(1,))
        advantage, seen = learner.advantage(batch)[0], gradients_of(learner)
        assert learner.update(batch, advantage, 0)["update/skipped_non_finite"] == 0
        advantages.append(advantage[batch.keep_B])
        gradients.append(torch.cat(seen))
    assert torch.equal(*advantages)
    assert torch.equal(*gradients)


def test_a_rollout_whose_greedy_response_cannot_be_graded_is_masked():
    policy = small_policy()
    batch = a_batch(policy, "remax")
    broken = [
        replace(r, greedy=r.greedy.judged(replace(r.greedy.verdict, outcome="infra_error"))) if b == 3 else r
        for b, r in enumerate(batch.rollouts)
    ]
    assert pack(broken, policy.pad_id).keep_B.tolist() == [b != 3 for b in range(8)]


# -- losses against a plain version, and TRL's ---------------------------------------------------------------------------


def off_policy(policy, batch):
    """log π_old of a neighbour of the policy, so that ratios differ from 1 and some are clipped."""
    noise = torch.randn(batch.behaviour_logp_BT.shape, generator=torch.Generator().manual_seed(5))
    return batch.behaviour_logp_BT + 0.25 * noise


def gradients(policy):
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    for p in policy.model.parameters():
        p.grad = None
    return found


def ours(policy, name, batch, advantage, old_BT, reference_BT=None, **changes):
    """Loss and gradient of the learner's own path, in two micro-batches."""
    learner, tally = a_learner(policy, name, training__micro_tokens=150, **changes), Tally()
    plan = learner._plan(batch, torch.arange(len(batch)), 0, 0)
    minibatch = Share(torch.cat([minibatch.rows for minibatch in plan]), [part for each in plan for part in each])
    assert len(minibatch) > 1
    learner._policy_gradient(batch, advantage, minibatch, old_BT, reference_BT, 1, tally)
    return sum(tally.values["loss/1"]), gradients(policy)


def logps(policy, batch):
    return policy.logps(batch.ids_BL, batch.action_BL, 1.0).logp_BT


def by_hand(policy, name, batch, advantage_B, old_BT, max_tokens):
    """The papers' formulas, response by response and token by token."""
    new_BT, p = logps(policy, batch), PRESETS[name]["objective"] | {"ratio": a_config(name).objective.ratio}
    low, high = p["clip"]
    per_response, tokens = [], []
    for b, t in enumerate(batch.response_len_B.tolist()):
        new, old, a = new_BT[b, :t], old_BT[b, :t], advantage_B[b] if advantage_B.dim() == 1 else advantage_B[b, :t]
        if p["surrogate"] == "plain":
            each = a * new.sum()
        elif p["surrogate"] == "cispo":
            each = (new - old).exp().detach().clamp(max=1 + high) * a * new
        elif p["surrogate"] == "gmpo":  # the root of a product, with the sign of the advantage before it
            r = (new - old).exp()
            each = torch.minimum(r * a, r.clamp(math.exp(-0.4), math.exp(0.4)) * a).abs().prod() ** (1 / t) * a.sign()
        elif p["surrogate"] == "sapo":
            tau = 1.0 if a > 0 else 1.05
            each = a * 4 / tau / (1 + (-tau * ((new - old).exp() - 1)).exp())
        else:
            r = (
                (new - old).exp()
                if p["ratio"] == "token"
                else (new - old).sum().exp()
                if p["ratio"] == "sequence"
                else (new - old).mean().exp()
                if p["ratio"] == "geometric"
                else (new - old).mean().exp().detach() * new.exp() / new.exp().detach()
            )
            each = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
        per_response.append(each)
        tokens.append(t)
    n, average = len(tokens), p["average"]
    if p["ratio"] not in PER_TOKEN:
        loss = -sum(per_response) / n
    elif average == "responses":
        loss = -sum(x.mean() for x in per_response) / n
    elif average == "constant":
        loss = -sum(x.sum() for x in per_response) / (n * max_tokens)
    else:
        loss = -sum(x.sum() for x in per_response) / sum(tokens)
    loss.backward()
    return float(loss.detach()), gradients(policy)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("sppo-")])
def test_each_loss_and_gradient_against_the_papers_formula(name):
    policy = small_policy()
    batch = a_batch(policy, name)
    old_BT = off_policy(policy, batch)
    advantage = a_learner(policy, name).advantage(batch)[0]
    loss, gradient = ours(policy, name, batch, advantage, old_BT, objective__dual_clip=0)
    expected, true = by_hand(policy, name, batch, advantage, old_BT, max_tokens=12)
    assert math.isclose(loss, expected, rel_tol=1e-4, abs_tol=1e-6)
    assert torch.allclose(gradient, true, atol=1e-5)
    assert float(true.abs().max()) > 1e-3


def test_gspo_token_is_gspo_where_a_response_has_one_advantage_and_else_it_is_not():
    policy = small_policy()
    batch = a_batch(policy, "gspo")
    old_BT = off_policy(policy, batch)
    advantage_B = a_learner(policy, "gspo").advantage(batch)[0]
    found = [
        ours(policy, name, batch, advantage_B, old_BT, objective__clip=(0.05, 0.05)) for name in ("gspo", "gspo-token")
    ]
    assert math.isclose(found[0][0], found[1][0], rel_tol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    advantage_BT = advantage_B[:, None] * torch.arange(batch.mask_BT.size(1))  # later tokens deserve more
    each = ours(policy, "gspo-token", batch, advantage_BT, old_BT, objective__clip=(0.05, 0.05))[1]
    new_BT, total = logps(policy, batch), 0.0
    for b, t in enumerate(batch.response_len_B.tolist()):
        s = (new_BT[b, :t] - old_BT[b, :t]).mean().exp().detach()
        open_T = torch.where(advantage_BT[b, :t] > 0, s <= 1.05, s >= 0.95)
        total = total - (open_T * s * advantage_BT[b, :t] * new_BT[b, :t]).mean() / len(batch)  # eq. 17
    total.backward()
    assert torch.allclose(each, gradients(policy), atol=1e-5)


TRL = {
    "grpo": {"loss_type": "grpo"},
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": False},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo-token": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "sapo": {"loss_type": "sapo"},
    "gmpo": {},
}  # fmt: skip
WRITTEN_OUT = {
    "rloo": ("rloo", {"objective__surrogate": "clip"}, {}),
    "bnpo": ("grpo", {"objective__average": "tokens"}, {"loss_type": "bnpo"}),
    "luspo": (
        "gspo", {"objective__ratio": "geometric-token", "objective__average": "constant"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "two-sided": ("grpo", {"objective__dual_clip": 1.3}, {"loss_type": "grpo", "delta": 1.3}),
    "sapo at other temperatures": (
        "sapo", {"objective__gate_temperature": (3.0, 5.0)},
        {"loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 5.0},
    ),
}  # fmt: skip
"""What TRL has a name for and a recipe writes out: (preset, the recipe's keys, TRL's)."""


def trl_trainer(kind, policy, folder, **settings):
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.experimental import gmpo

        home = gmpo if kind == "GMPO" else trl
        arguments = getattr(home, f"{kind}Config")(
            output_dir=str(folder), beta=0.0, max_completion_length=12, num_generations=4, per_device_train_batch_size=8,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True, **settings,
        )  # fmt: skip
        trainer = getattr(home, f"{kind}Trainer")(
            model=policy.model, processing_class=policy.tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["1+1?"] * 8}), args=arguments,
        )  # fmt: skip
    policy.model.eval()
    return trainer


def trl_inputs(policy, batch, advantage_B, old_BT):
    """The batch as TRL packs it: prompts padded on the left, completions on the right."""
    p, t = int(batch.prompt_len_B.max()), int(batch.response_len_B.max())
    prompt, completion = torch.full((len(batch), p), policy.pad_id), torch.full((len(batch), t), policy.pad_id)
    prompt_mask, completion_mask = torch.zeros_like(prompt), torch.zeros_like(completion)
    for b, r in enumerate(batch.rollouts):
        prompt[b, p - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
        prompt_mask[b, p - len(r.prompt_ids) :] = 1
        completion[b, : len(r.response_ids)] = torch.tensor(r.response_ids)
        completion_mask[b, : len(r.response_ids)] = 1
    return {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion, "completion_mask": completion_mask,
        "advantages": advantage_B, "old_per_token_logps": old_BT, "old_logps": torch.where(batch.mask_BT, old_BT, 0.0).sum(1),
        "num_items_in_batch": completion_mask.sum(),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*TRL, *WRITTEN_OUT])
def test_loss_and_gradient_equal_trls(case, tmp_path):
    """The same ids, advantages and old log-probabilities through TRL's own trainer (1.16)."""
    pytest.importorskip("trl")
    name, changes, settings = WRITTEN_OUT.get(case, (case, {}, TRL.get(case, {})))
    policy = small_policy()
    batch = a_batch(policy, name)
    old_BT = off_policy(policy, batch)
    advantage_B = a_learner(policy, name).advantage(batch)[0]
    trainer = trl_trainer({"rloo": "RLOO", "gmpo": "GMPO"}.get(name, "GRPO"), policy, tmp_path, **settings)
    loss = trainer._compute_loss(policy.model, trl_inputs(policy, batch, advantage_B, old_BT))
    loss.backward()
    theirs = gradients(policy)
    our_loss, gradient = ours(policy, name, batch, advantage_B, old_BT, **changes)
    scale = 12 if case == "luspo" else 1  # it sums a response's tokens, where `constant` divides them by max_tokens too
    assert math.isclose(scale * our_loss, float(loss.detach()), rel_tol=1e-4, abs_tol=1e-5)
    assert torch.allclose(scale * gradient, theirs, atol=1e-5 * scale)
    assert float(theirs.abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "corrected"),
    [*((name, False) for name in TRL), *((name, True) for name in ("grpo", "dr-grpo", "cispo", "dapo", "sapo"))],
)
def test_the_kl_to_the_start_equals_trls(name, corrected, tmp_path):
    """`beta`: k3 of each token, averaged as each loss is; times its ratio by TRL's default (the response's for GSPO: here each token's)."""
    pytest.importorskip("trl")
    policy = small_policy()
    batch = a_batch(policy, name)
    old_BT = off_policy(policy, batch)
    with torch.no_grad():
        reference_BT = logps(small_policy(seed=5), batch)
    advantage_B = a_learner(policy, name).advantage(batch)[0]
    kind = "GMPO" if name == "gmpo" else "GRPO"
    trainer = trl_trainer(kind, policy, tmp_path, use_bias_correction_kl=corrected, **TRL[name])
    trainer.beta = 0.3
    inputs = trl_inputs(policy, batch, advantage_B, old_BT) | {"ref_per_token_logps": reference_BT}
    loss = trainer._compute_loss(policy.model, inputs)
    loss.backward()
    theirs = gradients(policy)
    form = "k3-weighted" if corrected else "k3"
    changes = {"objective__kl": 0.3, "objective__kl_form": form, "objective__kl_level": "token"}
    our_loss, gradient = ours(policy, name, batch, advantage_B, old_BT, reference_BT, **changes)
    assert math.isclose(our_loss, float(loss.detach()), rel_tol=1e-4, abs_tol=1e-5)
    assert torch.allclose(gradient, theirs, atol=1e-5)
    without = ours(policy, name, batch, advantage_B, old_BT)[1]
    assert float((gradient - without).abs().max()) > 1e-3


# -- presets and recipes -------------------------------------------------------------------------------------------------


def test_a_preset_fills_what_the_recipe_leaves_open_and_no_more():
    config = small_config(objective__algorithm="grpo", rollout__samples=4)
    assert (config.rollout.samples, config.objective.baseline, config.objective.average) == (4, "group", "responses")
    assert Config.validated(__import__("tomllib").loads(config.to_toml()), "again") == config


def test_another_algorithm_on_the_command_line_replaces_the_recipes_keys_and_keeps_its_responses(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[rollout]\nprompts = 256\nsamples = 1\n[objective]\nratio = "geometric"\nclip = [0.1, 0.1]\n')
    config = Config.load(recipe, {"objective.algorithm": "grpo"})
    assert (config.rollout.prompts, config.rollout.samples, config.objective.ratio) == (32, 8, "token")
    assert config.objective.clip == (0.1, 0.1)  # which both presets leave alike: the recipe's own choice
    centred = Config.load(recipe, {"objective.algorithm": "sppo-centred"}).objective  # differs in its baseline alone
    assert (centred.ratio, centred.clip, centred.baseline) == ("geometric", (0.1, 0.1), "centred")
    assert (
        Config.load(None, {"objective.algorithm": "grpo"}).rollout.prompts == 16
    )  # 128 responses, with a recipe or without
    assert Config.load(recipe, {"objective.algorithm": "remax"}).rollout.prompts == 128  # the greedy ones count
    assert (
        Config.load(recipe, {"objective.algorithm": "sppo"}).objective.ratio == "geometric"
    )  # its own algorithm: nothing to replace
    base = Config.load(recipe, {"rollout.prompts": 64})
    assert base.as_algorithm("rloo", {"training.lr": 0.1}).rollout.prompts == 16
    back = tmp_path / "g.toml"
    back.write_text(config.to_toml())
    assert Config.load(back, {"objective.algorithm": "sppo"}).rollout.prompts == 256


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective.algorithm": "gppo"}, "did you mean 'ppo'"),
        ({"objective.baseline": "group"}, "set rollout.samples to 2 or more"),
        ({"objective.baseline": "token-critic"}, "set ratio = 'token'"),
        ({"objective.average": "constant"}, "set ratio = 'token'"),
        ({"rollout.resample": 2}, "set rollout.samples to 2 or more"),
        ({"objective": 3}, "objective"),
        ({"objective": 3, "objective.algorithm": "grpo"}, "objective"),
        ({"objective.algorithm": ["grpo"]}, "objective.algorithm"),
        ({"rollout.prompts": "many", "objective.algorithm": "grpo"}, "rollout.prompts"),
        ({"rollout.samples": "two", "objective.algorithm": "grpo"}, "rollout.samples"),
        ({"objective.algorithm": "remax", "rollout.samples": 2, "rollout.resample": 1}, "leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_sentence(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Config.load(None, changes)


def test_ppos_critic_must_read_the_policys_tokens():
    critic = small_critic()
    critic.tokenizer.add_tokens(["<other>"])
    with pytest.raises(RecipeError, match="must have the policy's own tokenizer"):
        Learner(small_policy(), critic, None, a_config("ppo"))


def test_the_token_critics_values_do_not_see_their_own_token():
    critic = small_critic()
    torch.nn.init.normal_(critic.head.weight)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    changed = ids.clone()
    changed[0, 4] = 20  # the second response token
    actions = torch.tensor([[False] * 3 + [True] * 3])
    with torch.no_grad():
        a, b = (critic(x, actions)[0] for x in (ids, changed))
        prompt = critic.prompt_logits([[5, 6, 7]])[0]
    assert torch.allclose(a[:2], b[:2], atol=1e-6)
    assert abs(float(a[2] - b[2])) > 1e-4
    assert torch.allclose(a[0], prompt, atol=1e-5)  # before the first token: the prompt-only value


# -- what DAPO throws away, and what was seen before ---------------------------------------------------------------------


def test_flat_groups_are_sorted_out():
    policy = small_policy()
    rollouts = judged(small_rollouts(policy, 3, samples=2), [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    mixed, flat = _sorted_out(rollouts)
    assert [[r.verdict.score for r in g] for g in mixed] == [[0.0, 1.0]]
    assert [[r.verdict.score for r in g] for g in flat] == [[1.0, 1.0], [0.0, 0.0]]


def test_ungradable_samples_that_resampling_throws_away_are_counted_and_said(tmp_path):
    """A grader that fails on half of the prompts: DAPO replaces those groups, and must not look healthy."""

    class HalfBroken:
        def judge(self, rollouts):
            bad = Verdict(0.0, "infra_error", {"reason": "the grader is down"})
            return [
                bad
                if sum(map(ord, r.task.id)) % 2
                else Verdict(r.sample % 2, "correct" if r.sample % 2 else "wrong", {})
                for r in rollouts
            ]

        def check(self, task):
            return None

        def close(self):
            pass

    notes = []
    observer = Silent()
    observer.note = notes.append
    config = small_config(
        objective__algorithm="dapo",
        rollout__samples=2,
        rollout__prompts=8,
        training__steps=1,
        run__out=str(tmp_path / "r"),
    )
    job = Run.new(config, observer, Parts(reward=HalfBroken()))
    train(job)
    job.close()
    metrics = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["rollout/thrown_away_masked"] > 0
    assert job.state.masked >= metrics["rollout/thrown_away_masked"] + metrics["rollout/masked"]
    assert any("could not be graded" in note and "the grader is down" in note for note in notes)


def test_a_narrow_clip_does_not_take_the_engines_rounding_for_movement():
    """GSPO's clip is 3e-4: an engine a thousandth away must not serve as `old`, or its rounding alone would clip."""
    policy = small_policy()
    batch, learner = a_batch(policy, "gspo", scores=SCORES), a_learner(policy, "gspo")
    batch = replace(batch, behaviour_logp_BT=batch.behaviour_logp_BT + 1e-3 * batch.mask_BT)
    metrics = learner.update(batch, learner.advantage(batch)[0], 0)
    assert metrics["engine/serves_as_old"] == 0.0
    wide = a_learner(small_policy(), "gspo", objective__clip=(0.2, 0.2))
    assert wide.update(batch, wide.advantage(batch)[0], 0)["engine/serves_as_old"] == 1.0


def test_a_prompts_samples_stay_in_one_minibatch_and_noise_needs_two_of_them():
    policy = small_policy()
    learner = a_learner(policy, "grpo", training__minibatches=2, training__measure_noise=True)
    batch = a_batch(policy, "grpo", scores=SCORES)
    plan = learner._plan(batch, torch.arange(len(batch)), 0, 0)
    groups = [set(batch.group_B[torch.cat(minibatch)].tolist()) for minibatch in plan]
    assert len(groups) == 2
    assert not groups[0] & groups[1]
    assert "update/grad_variance" in learner.update(batch, learner.advantage(batch)[0], 0)
    few = a_learner(
        small_policy(), "grpo", training__minibatches=4, training__measure_noise=True
    )  # four of two prompts
    assert [len(torch.cat(minibatch)) for minibatch in few._plan(batch, torch.arange(len(batch)), 0, 0)] == [2, 2, 2, 2]
    assert "update/grad_variance" not in few.update(
        batch, few.advantage(batch)[0], 0
    )  # halves of one prompt are not independent
    once = a_learner(small_policy(), "grpo", training__minibatches=1, training__epochs=2, training__measure_noise=True)
    assert "update/grad_variance" not in once.update(
        batch, once.advantage(batch)[0], 0
    )  # the same rows twice tell nothing
