# fmt: off
"""The kept list of mutants: faults that could be made in what computes gradients, and the tests that must find each of them.

A mutant is one edit: in `file`, below src/sppo, the text `old`, found there exactly once, becomes `new`. Where code has moved, its mutant moves
with it; `test_mutants.py` finds those that no longer apply. `tests` run first. A mutant that survives has a reason in `equivalent`, or it is a
test that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE = "tests/exact/test_reference.py"
GRADIENT = REFERENCE + "::test_every_updates_gradient_is_the_plain_one"
ADVANTAGES = REFERENCE + "::test_advantages_are_the_plain_ones"
CRITIC = REFERENCE + "::test_the_critics_gradient_is_the_plain_one"
LESSONS = REFERENCE + "::test_lessons_add_their_own_gradient_and_no_more"
PLAN = REFERENCE + "::test_every_epoch_trains_on_every_row_once_and_keeps_a_prompts_samples_together"
GATE = "tests/learning/test_hybrid.py::test_the_gate_by_hand"
NEYMAN = REFERENCE + "::test_a_curriculums_weights_are_the_plain_ones"
LOSS = "tests/exact/test_loss_gradient.py"
TRAPS = "tests/exact/test_traps.py"
KL = "tests/exact/test_kl.py"
ENTROPY = "tests/exact/test_entropy.py"
SURROGATES = "tests/exact/test_surrogates.py"
CORRECTION = "tests/exact/test_correction.py"
VALUE = "tests/learning/test_value.py"
DAPO = "tests/learning/test_dapo.py"
EARNED = "tests/learning/test_earned.py"
LINE = EARNED + "::test_right_and_wrong_means_by_hand"
SHAPED = EARNED + "::test_no_baseline_of_a_shaped_reward_sees_its_samples_own"
PREDICTS = EARNED + "::test_whatever_predicts_sees_all_that_was_judged"
BESIDE = EARNED + "::test_rows_beside_train_no_policy"
ALL_JUDGED = EARNED + "::test_the_critic_learns_from_all_that_was_judged"
OPTIM = "tests/learning/test_optimizer.py"
RANKS = "tests/distributed/test_gradients.py::test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process"
BASE_RATE = "tests/run/test_base_rate.py"
TERMS = "tests/learning/test_terms.py"
LOOP = TERMS + "::test_kl_and_bonus_in_the_learners_loss_are_those_of_a_loop"
BATCH = "tests/learning/test_batch.py"
SCHEDULER = "tests/rollout/test_scheduler.py"
PLAY = "tests/rollout/test_play.py"
DEMONSTRATIONS = "tests/learning/test_demonstrations.py"
TYPES = "tests/test_types.py"
ADVANTAGE = "tests/objective/test_advantage.py"
DIAGNOSTICS = "tests/objective/test_diagnostics.py"
OPTIMAL = "tests/learning/test_optimal_baseline.py"
HYBRID = "tests/learning/test_hybrid.py"
PEERS = "tests/learning/test_peers.py"
UPDATE = "tests/learning/test_update.py"
CURRICULUM = "tests/run/test_curriculum.py"
SEARCH = "tests/experimental/test_mcts.py::test_outcomes_go_all_the_way_up_and_puct_follows_them"
WIRES = "tests/exact/test_wires.py"

FAST = (
    WIRES, LOSS, SURROGATES, CORRECTION, KL, ENTROPY, VALUE, DAPO, OPTIM, TERMS, TYPES, BATCH, ADVANTAGE, DIAGNOSTICS, OPTIMAL, EARNED, TRAPS, UPDATE,
    CURRICULUM, HYBRID, SCHEDULER, SEARCH, PEERS, BASE_RATE, REFERENCE,
)
"""What runs against every mutant, quick files first, after the tests that it names."""
SLOW = "resumes or trls or fingerprint or eight_bit or passed_at_once or weighted_leaves or episodes"
"""Tests that are not for this: whole runs, other trainers, what no mutant touches."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""
    """Why nobody could tell it from the original, where that is so."""


MUTANTS: list[Mutant] = []


def of(file: str, *tests: str):
    """Add mutants of one file, which these tests should find."""

    def add(name: str, old: str, new: str, *other: str, equivalent: str = "") -> None:
        MUTANTS.append(Mutant(name, file, old, new, other or tests, equivalent))

    return add


# -- objective/advantage.py ------------------------------------------------------------------------------------------------

m = of("objective/advantage.py", ADVANTAGE, ADVANTAGES)
m("a baseline's weight is ignored", "weight * torch.sigmoid(", "torch.sigmoid(", ADVANTAGES)
m("a masked sample is in its group's sums", "torch.where(keep_B, wide(x_B), torch.zeros_like(wide(x_B)))", "wide(x_B)")
m("a masked sample is counted in its group", "index_add_(0, group_B, keep_B.to(x_B.dtype))", "index_add_(0, group_B, torch.ones_like(x_B))")
m("a sample is in its own leave-one-out mean", "(sum_B - own_B) / (count_B", "sum_B / (count_B")
m("leave-one-out divides by all", "(count_B - keep_B.to(count_B.dtype)).clamp(min=1)", "count_B.clamp(min=1)")
m("a stratum needs one problem more", ">= STRATUM", "> STRATUM")
m("what was missed is of all strata", "leave_one_out_mean(rest_B, mask_B, stratum_B)", "leave_one_out_mean(rest_B, mask_B)")
m("odds are shifted the other way", "math.exp(shift)", "math.exp(-shift)", OPTIMAL)
m("a group's deviation divides by N", "(count_B - 1).clamp(min=1)", "count_B.clamp(min=1)")
m("whitening leaves the mean", "(wide(advantage) - kept.mean())", "wide(advantage)")
m("whitening leaves the deviation", "/ (kept.std() + 1e-8)", "/ 1.0")
m("GAE without lambda", "decay * running_B", "running_B")
m("GAE pays at the first token", "delta_BT[rows[some_B], length_B[some_B] - 1]", "delta_BT[rows[some_B], 0]")
m("GAE bootstraps beyond the response", "torch.where(inside_BT, wide(value_BT), torch.zeros_like(wide(value_BT)))", "wide(value_BT).nan_to_num()")

m("the over-long penalty begins at once", "(wide(length_B) - (max_tokens - cache)) / cache", "wide(length_B) / max_tokens", DAPO)
m("the over-long penalty is of the paper's scores", ".clamp(0, 1) / 2", ".clamp(0, 1)", DAPO)
m("the over-long penalty is a reward for short ones", "/ cache).clamp(0, 1)", "/ cache).clamp(-1, 1)", DAPO)
m("rewards of tokens are paid at the end", "delta_BT + wide(reward), delta_BT)", "delta_BT, delta_BT)", ADVANTAGE, TERMS)

# -- objective/diagnostics.py ----------------------------------------------------------------------------------------------

m = of("objective/diagnostics.py", DIAGNOSTICS)
m("ESS without the square", "torch.logsumexp(2 * log_weight_B, 0)", "torch.logsumexp(log_weight_B, 0)")
m("explained variance of the values", "(wide(reward_B) - wide(value_B)).var()", "wide(value_B).var()")
m("the ceiling keeps the noise", " - within / samples, 0.0)", ", 0.0)")
m("calibration errors cancel", "gap.abs().sum()", "gap.sum().abs()")
m("ties are won", "count_G.cumsum(0) - (count_G - 1) / 2", "count_G.cumsum(0)")

# -- objective/kl.py -------------------------------------------------------------------------------------------------------

m = of("objective/kl.py", KL, GRADIENT)
m("k2 is twice itself", "0.5 * x.square()", "x.square()")
m("k3 of the other policy", "bounded_exp(-x, less=1.0) + x", "bounded_exp(x, less=1.0) - x")
m("k3 is not weighted", "bounded_exp(log_weight.detach()), x.detach()", "torch.ones_like(log_weight), x.detach()")
m("a weighted k3 has k3's gradient", "held * (x - held))", "-torch.expm1(-held) * (x - held))")
m("the KL is a reward", "return weight * log_ratio(", "return -weight * log_ratio(")
m("the KL in the reward has a gradient", "logp_BT.detach(), ref_logp_BT", "logp_BT, ref_logp_BT")

# -- objective/loss.py -----------------------------------------------------------------------------------------------------

m = of("objective/loss.py", GRADIENT)
m("sequence ratios are averaged over tokens", "not in PER_TOKEN:\n        return sequences", "not in PER_TOKEN:\n        return tokens")
m("responses' means are averaged over tokens", '"responses": sequences, "constant"', '"responses": tokens, "constant"')
m("constant is the tokens there are", "sequences * max_tokens", "tokens")
m("anchor = reference is ignored", 'o.anchor == "reference"', 'o.anchor == ""')
m("the anchor is the engine's", "anchor_bT = x.old_bT", "anchor_bT = x.behaviour_bT")
m("dual clip is ignored", "o.dual_clip or None", "None")
m("clip is symmetric", "surrogate(log_r, advantage, o.clip,", "surrogate(log_r, advantage, (o.clip[0], o.clip[0]),")
m("the mismatch weight is not truncated", "return log_weight.clamp(max=most)", "return log_weight.clamp(max=30.0)")
m("what is beyond the cap is cut to it, not masked", "torch.where(log_weight > most, -torch.inf, log_weight)", "torch.where(log_weight > most, most, log_weight)", CORRECTION, GRADIENT)
m("what is beyond the cap is masked, not cut to it", 'engine_correction_beyond == "truncate"', 'engine_correction_beyond == ""', CORRECTION, GRADIENT)
m("what is within the cap is masked", "torch.where(log_weight > most, -torch.inf", "torch.where(log_weight < most, -torch.inf", CORRECTION, GRADIENT)
m("the mismatch weight is squared", "weight = correction.exp()\n", "weight = correction.exp().square()\n")
m("the mismatch weight is upside down", "log_ratio(old_bT, behaviour_bT, mask_bT, kind", "log_ratio(behaviour_bT, old_bT, mask_bT, kind")
m("the mismatch weight is the mean token's", "behaviour_bT, mask_bT, kind, o.kappa)", 'behaviour_bT, mask_bT, "token" if kind == "token" else "geometric", 1.0)')
m("the mismatch weight is always the response's", 'kind = "token" if o.engine_correction_level == "token" else whole', "kind = whole", CORRECTION, GRADIENT)
m("the mismatch weight is always the token's", 'kind = "token" if o.engine_correction_level == "token" else whole', 'kind = "token"', CORRECTION, GRADIENT)
m("the mean token's weight of GSPO-token is the whole response's", '"geometric-token": "geometric"}', '"geometric-token": "sequence"}')
m("token weights move a response's ratio", "logp_bT = fixed_bT + correction.exp() * (logp_bT - fixed_bT)", "logp_bT = correction.exp() * logp_bT", CORRECTION, GRADIENT)
m("token weights of responses are not applied", "fixed_bT + correction.exp() * (logp_bT", "fixed_bT + 1 * (logp_bT", CORRECTION, GRADIENT)
m("token weights of responses count twice", "if correction is not None and (correction.dim() == 1 or o.ratio in PER_TOKEN):\n        weight = correction.exp()", "if correction is not None:\n        weight = correction.exp() if correction.dim() == 1 or o.ratio in PER_TOKEN else response_means(correction.exp(), mask_bT).sum(1)", CORRECTION, GRADIENT)
m("responses are not averaged first", 'if o.average == "responses":\n        value = response_means(value, mask_bT)', 'if o.average == "":\n        value = response_means(value, mask_bT)')
m("token terms of responses are not averaged first", 'if o.average == "responses":\n        value = response_means(value, x.mask_bT)', 'if o.average == "":\n        value = response_means(value, x.mask_bT)', LOOP, GRADIENT)
m("the KL loss is dropped", "if x.weight_b is None else kl * x.weight_b).sum() / sequences", "if x.weight_b is None else kl * x.weight_b).sum() * 0", LOOP, GRADIENT)
m("the KL loss is a mean of means", "kl * x.weight_b).sum() / sequences", "kl * x.weight_b).mean()", LOOP, GRADIENT)
m("the KL loss ignores the curriculum", "else kl * x.weight_b", "else kl * 1", LOOP, GRADIENT)
m("the KL loss of tokens is dropped", "loss + o.kl * token_mean(", "loss + 0 * token_mean(", LOOP, GRADIENT)
m("the KL loss of tokens is of responses", '"token" if o.kl_of_tokens else "sequence"', '"sequence"', LOOP, GRADIENT)
m("token terms ignore the curriculum", "term_bT * x.weight_b[:, None]", "term_bT * 1", LOOP, GRADIENT)
m("token terms are sums whatever the ratio", "x.mask_bT, kind, o.kappa)", 'x.mask_bT, "sequence" if kind != "token" else kind, o.kappa)', LOOP, GRADIENT)
m("the entropy bonus is a malus", "loss - o.entropy_bonus", "loss + o.entropy_bonus", LOOP, GRADIENT)
m("the entropy bonus has no control variate", "weight_bT * (now_bT + entropy_bT)", "weight_bT * now_bT", LOOP, GRADIENT)
m("the entropy bonus is of the policy that sampled", "(now_bT - wide(x.behaviour_bT)).clamp", "(0 * now_bT).clamp", LOOP, GRADIENT)
m("the loss is three quarters of itself", "loss = -normalised_sum(value,", "loss = -0.75 * normalised_sum(value,")
m("a KL form is ignored", "estimator(d, o.kl_form)", 'estimator(d, "k2")', LOOP, GRADIENT)

# -- objective/ratio.py ----------------------------------------------------------------------------------------------------

m = of("objective/ratio.py", LOSS, GRADIENT)
m("kappa is ignored", "KAPPA.get(ratio, kappa)", "KAPPA.get(ratio, 0.5)")
m("every ratio is geometric", "length_B**exponent", "length_B")
m("padding is in the ratio", "torch.where(inside_BT, difference_BT, torch.zeros_like(difference_BT))", "difference_BT.nan_to_num(nan=0.1)")

m("GSPO-token's value is each token's own", "ratio_B.detach()[:, None] + (difference_BT", "difference_BT.detach() + (difference_BT", SURROGATES, GRADIENT)
m("GSPO-token's gradient is the response's mean", "ratio_B.detach()[:, None] + (difference_BT - difference_BT.detach())", "ratio_B[:, None] + 0 * difference_BT", SURROGATES, GRADIENT)
m("GSPO-token's ratio is a sum", '"geometric-token": 1.0}', '"geometric-token": 0.0}', SURROGATES, GRADIENT)

# -- objective/surrogate.py ------------------------------------------------------------------------------------------------

m = of("objective/surrogate.py", LOSS, GRADIENT)
m("the upper bound is the lower one", "log_ratio > math.log1p(high)", "log_ratio > math.log1p(low)")
m("log(1 - e) is -log(1 + e)", "return math.log1p(-low) if", "return -math.log1p(low) if")
m("what should fall is clipped above", "above = positive & (", "above = (")
m("what should rise is clipped below", "below = negative & (", "below = (")
m("the dual clip cuts good responses", "runaway = negative & (", "runaway = (")
m("a clipped element keeps its gradient", "torch.where(clipped, bound, bounded_exp(safe))", "torch.where(clipped, bound + (log_ratio - log_ratio.detach()), bounded_exp(safe))")
m("CISPO's weight has a gradient", "log_ratio = log_ratio.detach()", "log_ratio = log_ratio * 1", GRADIENT)
m("CISPO's weight has no lower bound", "log_ratio.clamp(min=_log_low(low), max=", "log_ratio.clamp(max=", GRADIENT)
m("REINFORCE forgets the advantage", "value = advantage.to(logp.dtype) * logp", "value = advantage.to(logp.dtype).sign() * logp", GRADIENT)
m("a response's mean is over the width", "mask_BT.sum(1, keepdim=True).clamp(min=1).to(value_BT.dtype)", "mask_BT.size(1)", GRADIENT)
m("an empty batch divides by zero", "max(float(denominator), 1.0)", "float(denominator)", TRAPS)
m("masked elements are multiplied by zero", "torch.where(mask.bool(), value, torch.zeros_like(value))", "value * mask", TRAPS)
m("huge ratios overflow", "torch.where(x > CEILING,", "torch.where(x > 1e9,", KL)
m("a huge ratio has no gradient", "* (1 + x - CEILING)", "* (1 + 0 * x)", KL)

m("GMPO's mean is a sum", "response_means(held_BT, mask_BT).sum(1", "held_BT.sum(1", SURROGATES, GRADIENT)
m("GMPO's tokens are not clipped", "response_means(held_BT, mask_BT)", "response_means(log_ratio_BT, mask_BT)", SURROGATES, GRADIENT)
m("GMPO clips the mean, not its tokens", "bounded_exp(mean_B1) * advantage", "bounded_exp(mean_B1.clamp(_log_low(low), math.log1p(high))) * advantage", SURROGATES, GRADIENT)
m("GMPO takes padding into its mean", "held_BT = torch.where(mask_BT, held_BT, torch.zeros_like(held_BT))", "held_BT = held_BT + 0.1 * (~mask_BT)", SURROGATES, GRADIENT)
m("SAPO has one temperature", "torch.where(advantage > 0, positive, negative)", "torch.where(advantage > 0, positive, positive)", SURROGATES, GRADIENT)
m("SAPO's slope on policy is tau's", "4 / tau * gate * advantage", "4 * gate * advantage", SURROGATES, GRADIENT)
m("SAPO's gate is of the log ratio", "torch.expm1(log_ratio.clamp(max=CEILING))", "log_ratio.clamp(max=CEILING)", SURROGATES, GRADIENT)

# -- objective/value.py ----------------------------------------------------------------------------------------------------

m = of("objective/value.py", VALUE)
m("the value is not clipped", "if not clip:", "if True:")
m("a clipped value has the smaller error", "torch.maximum(error", "torch.minimum(error")
m("a value is clipped around its target", "held = old + (value - old).clamp", "held = target + (value - target).clamp")

# -- learning/earned.py ----------------------------------------------------------------------------------------------------

m = of("learning/earned.py", LINE, EARNED)
m("what is earned is one number for all", "return alpha + beta * chance", "return alpha + 0 * chance")
m("what is earned is fitted to R", "d_B = reward_B.double() - c_B", "d_B = reward_B.double()")
m("right and wrong responses earn the same besides", "(w * cd - c * d) / spread", "(w * cd) / spread")
m("what was earned is never forgotten", "MEMORY * past + float(x_B.sum())", "past + float(x_B.sum())")
m("what was earned is forgotten at once", "MEMORY * past + float(x_B.sum())", "float(x_B.sum())")
m("what was earned is not weighted", "weight_B.double()", "weight_B.double() ** 0", OPTIMAL)
m("what was earned knows no prior", "w + 2 * doubt, c + doubt, cc + doubt", "w + 1e-3 * doubt, c + 0.5e-3 * doubt, cc + 0.5e-3 * doubt")

# -- learning/credit/token.py --------------------------------------------------------------------------------------------

m = of("learning/credit/token.py", CRITIC)
m("the token critic learns shaped rewards", "gae(batch.correct_B, value_BT,", "gae(reward_B, value_BT,", CRITIC)
m("the token critic's target lacks the value", "mask_BT, decay)) + value_BT\n", "mask_BT, decay))\n", CRITIC)
m("the token critic's target leaves [0, 1]", "if linear else target_BT.clamp(0, 1), value_BT", "if linear else target_BT, value_BT", CRITIC, equivalent="a lambda-return is a convex combination of values and correctness, all within [0, 1]: the clamp is for rounding alone")
m("a KL without a value is discounted", "decay if linear else 1.0)", "decay)", TERMS)
m("a KL is not in the value's target", "(advantage_BT if linear else gae(", "(gae(reward_B, value_BT, mask_BT, decay) if linear else gae(", TERMS)
m("the token critic's mean is over the whole batch", "int(batch.response_len_B[rows].sum())", "int(batch.response_len_B.sum())", CRITIC)
m("the token critic learns padding", "torch.where(batch.mask_BT[part, :width].to(logit.device), loss_bT, 0.0).sum()", "loss_bT.sum()", CRITIC)
m("PPO's critic learns by cross-entropy", "            if self.model.linear:\n", "            if False:\n", VALUE)
m("PPO's values are clipped around the last update", "squared_error(logit, target, old,", "squared_error(logit, target, logit.detach(),", VALUE)
m("the value clip does not arrive", "self.config.objective.value_clip)", "0.0)", VALUE)

# -- learning/credit/prompt.py -------------------------------------------------------------------------------------------

m = of("learning/credit/prompt.py", CRITIC)
m("the critic learns shaped rewards", "target_b = batch.correct_B[rows]", "target_b = batch.reward_B[rows]", CRITIC)
m("the critic's loss is a mean of means", "/ len(rows)\n", "/ len(part)\n", CRITIC)
m("the control's weight does not arrive", "critic_advantage(paid_B, logit_B, o.baseline_weight)", "critic_advantage(paid_B, logit_B)", ADVANTAGES)
m("an optimal baseline knows the present batch", "            advantage_B = reward_B - self.optimal.baseline(chance_B)\n            metrics[\"critic/shift\"] = self.optimal.shift\n            self.optimal.learn(batch, chance_B, reward_B)", "            self.optimal.learn(batch, chance_B, reward_B)\n            advantage_B = reward_B - self.optimal.baseline(chance_B)\n            metrics[\"critic/shift\"] = self.optimal.shift", OPTIMAL)
m("an optimal baseline takes a reward for a chance", "chance_B = batch.correct_B - self._less(batch.correct_B,", "chance_B = reward_B - self._less(reward_B,", OPTIMAL)

# -- learning/credit/trained.py ------------------------------------------------------------------------------------------

m = of("learning/credit/trained.py", WIRES)
m("a baseline knows its own batch's rewards", "        left_B = reward_B - weight * self.earned.beyond(value_B)\n        known_B = batch.graded_B & reward_B.isfinite()\n        self.earned.learn(batch.correct_B[known_B], reward_B[known_B], torch.ones(int(known_B.sum())))\n", "        known_B = batch.graded_B & reward_B.isfinite()\n        self.earned.learn(batch.correct_B[known_B], reward_B[known_B], torch.ones(int(known_B.sum())))\n        left_B = reward_B - weight * self.earned.beyond(value_B)\n", WIRES)
m("what a shaped reward earns is ignored", "left_B = reward_B - weight * self.earned.beyond(value_B)", "left_B = reward_B", WIRES)
m("what a shaped reward earns is not the control's weight", "left_B = reward_B - weight * self", "left_B = reward_B - self", WIRES)
m("what is masked earns", "known_B = batch.graded_B & reward_B.isfinite()\n        self.earned", "known_B = reward_B.isfinite()\n        self.earned", WIRES)
m("what was thrown away earns nothing", "known_B = batch.graded_B &", "known_B = batch.keep_B &", PREDICTS)
m("the running explained variance is the last step's", "EV_MEMORY * previous + (1 - EV_MEMORY) * ev", "ev", WIRES)
m("a critic's quality includes what is masked", "batch.correct_B[batch.graded_B], value_B[batch.graded_B]", "batch.correct_B, value_B", WIRES)

# -- learning/credit/protocol.py, learning/credit/samples.py -------------------------------------------------------------

m = of("learning/credit/protocol.py", ADVANTAGES)
m("whitening is forgotten", 'return whitened(advantage, keep) if scale == "batch" else advantage', "return advantage", ADVANTAGES)
m("whitening includes what is masked", "batch.keep_B[:, None] & batch.mask_BT", "batch.mask_BT", ADVANTAGES)
m = of("learning/credit/samples.py", ADVANTAGES)
m("others are the whole batch", "leave_one_out_mean(reward_B, keep_B, batch.group_B)", "leave_one_out_mean(reward_B, keep_B)", ADVANTAGES)

# -- learning/credit/optimal_baseline.py ------------------------------------------------------------------------------------------

m = of("learning/credit/optimal_baseline.py", OPTIMAL)
m("stakes are paired with the wrong chance", "((1 - right_B, chance_B), (right_B, 1 - chance_B))", "((1 - right_B, 1 - chance_B), (right_B, chance_B))")
m("a score is divided by its length once", "2 * self.power", "self.power")
m("the shift is upside down", "math.log(right / wrong)", "math.log(wrong / right)")
m("a curriculum's weight is not squared", "batch.weight_B.square()", "batch.weight_B", WIRES, OPTIMAL)
m("what is masked has a stake", "batch.graded_B & square_B.isfinite()", "square_B.isfinite()")
m("a cut is part of the policy", "batch.behaviour_logp_BT + batch.kept_BT", "batch.behaviour_logp_BT", WIRES, OPTIMAL)
m("nothing is doubted", "square + self._doubt / 2 for", "square for")
m("what shaping pays is not in the optimal baseline", "right_B + self.earned.beyond(right_B, doubt)", "right_B", OPTIMAL)
m("what is earned is weighed by the critic's chance", "self.earned.beyond(right_B, doubt)", "self.earned.beyond(chance_B, doubt)", OPTIMAL)
m("stakes are never forgotten", "self.paired[k] = MEMORY * self.paired[k] +", "self.paired[k] = self.paired[k] +")

# -- learning/credit/hybrid.py ----------------------------------------------------------------------------------------------------

m = of("learning/credit/hybrid.py", HYBRID)
m("above and below b are one", "k = 2 * place + (gap > 0)", "k = 2 * place", GATE)
m("the gate opens beyond 1", "min(1.0, max(0.0, self.cross[k] / self.square[k]))", "max(0.0, self.cross[k] / self.square[k])", WIRES, HYBRID)
m("the gate opens backwards", "max(0.0, self.cross[k] / self.square[k])", "self.cross[k] / self.square[k]", GATE)
m("stakes do not count", "+= weight * rest * gap", "+= rest * gap", GATE)
m("the gate never forgets", "([MEMORY * x for x in sums] for sums in (self.cross, self.square))", "([x for x in sums] for sums in (self.cross, self.square))", GATE)
m("credit sees its own token", "out_BT[b, start:] =", "out_BT[b, start - 1 :] =")
m("a stretch's stake is of all before it", "until_BT[b, end] - until_BT[b, start]", "until_BT[b, end]", GATE)
m("one response is enough to believe", "(self.number[place][bad] + DOUBT)", "(self.number[place][bad] + 1e-9)", WIRES, HYBRID)
m("the last step counts, not the worst", "worst = min(worst, score)", "worst = score", WIRES, HYBRID)

# -- learning/learner.py ---------------------------------------------------------------------------------------------------

m = of("learning/learner.py", GRADIENT)
m("the KL in the reward is of the cut distribution", "batch.behaviour_logp_BT + batch.kept_BT, ref_BT", "batch.behaviour_logp_BT, ref_BT", ADVANTAGES)
m("a token's KL falls on the whole response", "if self.credit.charges_tokens:", "if False:", ADVANTAGES)
m("the response's KL is charged to nobody", "reward_B - cost_BT.sum(1)", "reward_B", ADVANTAGES)
m("`old` is taken anew each epoch", "            rows = torch.cat([minibatch.rows, beside[number]])\n            self._policy_gradient(", "            rows = torch.cat([minibatch.rows, beside[number]])\n            if number and number % len(plans[0]) == 0:\n                self._fill_old(old_BT, batch, plans[0])\n            self._policy_gradient(")
m("`old` is the present policy", "            if number == 0:\n                self._settle_first(", "            if self.ratio_checked or number == 0:\n                self._settle_first(")
m("masked samples are in the sequence denominator", "sequences, tokens = float(len(rows)),", "sequences, tokens = float(len(batch) * len(rows) / batch.keep_B.sum()),")
m("the token denominator is of all minibatches", "float(batch.response_len_B[rows].sum())", "float(batch.response_len_B.sum())")
m("the KL's denominator is the micro-batch's", "o, sequences=sequences,", "o, sequences=float(len(part)),")
m("the loss is a mean of means", "divisor=divisor)", "divisor=divisor * len(part) / len(rows))")
m("the curriculum's weight does not reach the advantage", "if batch.weight_B is not None:\n            advantage =", "if batch.weight_B is None:\n            advantage = advantage\n        elif False:\n            advantage =", ADVANTAGES)
m("the curriculum's weight does not reach the KL", "None if batch.weight_B is None else of(batch.weight_B),", "None,")
m("the mismatch weight forgets the cut", "                of(batch.behaviour_logp_BT),\n", "                of(batch.behaviour_logp_BT) + of(batch.kept_BT),\n")
m("the temperature is 1", "self.config.rollout.temperature", "1.0")
m("the engine's `old` forgets the cut", "old_BT[rest] = engine_BT[rest]", "old_BT[rest] = batch.behaviour_logp_BT[rest]")
m("a cut keeps the engine from serving", "engine_BT = batch.behaviour_logp_BT + batch.kept_BT\n", "engine_BT = batch.behaviour_logp_BT\n", UPDATE)
m("the engine always serves", "tally.served = off <= min(NEGLIGIBLE, OF_CLIP * min(o.clip))", "tally.served = True")
m("a lesson is learnt with the weight of all", "/ (lessons.most / updates)", "/ len(rows)", LESSONS)
m("a long lesson weighs more", "torch.tensor(lessons.weights) / batch.response_len_B", "torch.tensor(lessons.weights) / 1", LESSONS)
m("each update learns all lessons", "rows = torch.arange(number, len(batch), updates)", "rows = torch.arange(0, len(batch))", LESSONS)
m("a prompt's samples are split", "if units.max() + 1 < count:", "if True:", PLAN)
m("every epoch has the same order", "        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + epoch)\n        count =", "        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009)\n        count =", PLAN)
m("every step has the same order", "        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + epoch)\n        count =", "        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003) * 1_009 + epoch)\n        count =", PLAN)
m("masked samples are trained on", "kept = batch.keep_B.nonzero()[:, 0]", "kept = torch.arange(len(batch))")
m("the critic learns at the policy's rate", "self._teach_critic(batch, rows, critic_lr, tally)", "self._teach_critic(batch, rows, lr, tally)", WIRES)
m("the rate has no schedule", "learning_rate(peak, step, t.steps,", "learning_rate(peak, 0, t.steps,", WIRES)
m("the gap's limit is never measured", "self.gap_limit = noise_limit(gap, SAMPLED, self.policy.dtype)", "pass", TRAPS)
m("the gap's limit follows every step", "if self.gap_limit is None and gap is not None and not self.lag:", "if gap is not None and not self.lag:", WIRES)
m("a resumed run measures the gap's limit anew", 'self.gap_limit = state.get("gap_limit")', "self.gap_limit = None", TRAPS)
m("flat groups stay in DAPO's denominator", "if not self._leaves_flat_groups_out():", "if True:", DAPO)
m("a critic's flat groups are left out", "self.config.rollout.resample > 0 and self.config.critic_reads is None", "self.config.rollout.resample > 0", DAPO)
m("a step of flat groups still pushes", "return kept, torch.zeros_like(advantage_B), left_out", "return kept, torch.ones_like(advantage_B), left_out", DAPO)
m("the critic never learns from what was thrown away", "rows = torch.cat([minibatch.rows, beside[number]])", "rows = minibatch.rows", ALL_JUDGED)
m("groups that were thrown away are split", "rows[torch.isin(unit, part)] for part in order.tensor_split(count)", "part for part in rows.tensor_split(count)", WIRES)
m("a random model is fine", "if not gap <= tolerance:", "if gap > 1e9:", TRAPS)
m("the critic learns from the whole batch each time", "learnt = self.credit.learn(batch, rows, lr)", "learnt = self.credit.learn(batch, torch.arange(len(batch)), lr)", CRITIC)

# -- learning/shaping.py --------------------------------------------------------------------------------------------

m = of("learning/shaping.py", DAPO)
m("the over-long penalty is a reward", "reward_B = batch.reward_B - penalty_B", "reward_B = batch.reward_B + penalty_B")
m("ReMax's greedy response pays no penalty", "batch.greedy_B - overlong_penalty(length_B", "batch.greedy_B - 0 * overlong_penalty(length_B")

# -- learning/agreement.py -----------------------------------------------------------------------------------------------

m = of("learning/agreement.py", TRAPS)
m("an engine far away is fine", "if gap is not None and not gap <= limit:", "if gap is not None and not gap <= 1e9 * limit:", TRAPS)
m("the recipe's limit of the gap is ignored", "if given else (measured", "if False else (measured", UPDATE, TRAPS)
m("a minibatch of other weights is fine", "if drift > DRIFT:", "if False:", UPDATE, TRAPS)

# -- learning/batch.py -----------------------------------------------------------------------------------------------------

m = of("learning/batch.py", GRADIENT)
m("nothing is masked", "torch.tensor([not v.masked for v in verdicts])", "torch.tensor([True for v in verdicts])")
m("a greedy response without a verdict is a baseline", "keep_B &= torch.tensor([not v.masked for v in greedy])", "pass", PEERS)
m("correctness is the score", "torch.tensor([v.correct for v in verdicts])", "torch.tensor([v.score for v in verdicts])", CRITIC)
m("a curriculum's weights are dropped", "if any(r.task.weight != 1.0 for r in rollouts) else None", "if not rollouts else None", ADVANTAGES)
m("every response is a prompt's only one", "b > 0 and r.sample == 0", "b > 0", ADVANTAGES)
m("what a cut left is forgotten", "if r.kept:", "if not r:")
m("a token after the response is its own", "< self.response_len_B[:, None]", "<= self.response_len_B[:, None]")
m("micro-batches ignore padding", "length * (end + 1 - start)", "tokens + length", TRAPS, UPDATE)

m("a group is flat by what was masked", "self.group_B[self.keep_B], self.reward_B[self.keep_B].float()", "self.group_B, self.reward_B.float()", DAPO)
m("no group is ever flat", "~(low_G < high_G)[", "(low_G > high_G + 1e9)[", DAPO)
m("a group without a grade is mixed", "~(low_G < high_G)[", "(low_G == high_G)[", WIRES)
m("what was thrown away trains the policy", "batch.keep_B & ~trains_B, batch.keep_B & trains_B", "batch.keep_B & ~trains_B, batch.keep_B", BESIDE)
m("what was thrown away teaches what is masked", "batch.keep_B & ~trains_B, batch", "~trains_B, batch", BESIDE)
m("only what trains the policy is graded", "return self.keep_B if self.beside_B is None else self.keep_B | self.beside_B", "return self.keep_B", BESIDE)

m("what was observed is an action", "            action_BL[b, start:end] = True\n", "            action_BL[b, r.turns[0][0] : end] = True\n", BATCH)
m("what follows the last turn is read", "        length = r.turns[-1][1]\n", "        length = len(r.ids)\n", BATCH)
m("a missing log-probability passes", "if actions != action_BL.sum(1).tolist():", "if False:", BATCH)
m("the prompt ends where the response does", "self.action_BL.int().argmax(1)", "self.length_B - self.response_len_B", BATCH)

# -- types.py --------------------------------------------------------------------------------------------------------------

m = of("types.py", TYPES)
m("a response is its first turn", "for start, end in self.turns for i in self.ids[start:end]", "for start, end in self.turns[:1] for i in self.ids[start:end]")
m("the policy wrote all that follows its prompt", "out[start:end] = [True] * (end - start)", "out[start:] = [True] * (len(out) - start)")
m("another answer keeps the first one's verdict", '"kept": (), "verdict": None}', '"kept": ()}')

# -- rollout/scheduler.py --------------------------------------------------------------------------------------------------

m = of("rollout/scheduler.py", SCHEDULER)
m("a hole keeps what finished", "self.slots.copy(mover, [hole], self.length(self.live[mover]))", "pass")
m("a mover loses its last column", "self.slots.copy(mover, [hole], self.length(self.live[mover]))", "self.slots.copy(mover, [hole], self.length(self.live[mover]) - 1)")
m("who moved is not written down", "            self.live[hole] = self.live[mover]\n", "")
m("a finished sequence moves up", "if b not in left]", "]")
m("the longest prompts come first", "(len(self.keys[i]), self.keys[i]), reverse=True)", "(len(self.keys[i]), self.keys[i]))")
m("equal prompts are apart", "(len(self.keys[i]), self.keys[i])", "len(self.keys[i])")
m("a pass for every free slot", "free * REFILL < self.count", "not free")
m("a pass reads any number of tokens", "if out and tokens > PREFILL:", "if False:")
m("a prompt is counted each time it is sampled", "0 if key in out else len(key)", "len(key)")

# -- several turns ---------------------------------------------------------------------------------------------------------

m = of("rollout/trajectory.py", PLAY)
m("a turn begins where the last one ended", "self.turns.append((len(self.ids),", "self.turns.append((self.turns[-1][1] if self.turns else len(self.ids),")
m("what an environment says is not read", "self.ids = [*self.ids, *policy.continuation_ids(observed.messages, self.ids[-1])]", "pass")
m("every turn may be as long as all", "self.room = max_tokens - len(self.logps)", "self.room = max_tokens")
m("a context that is full is written on in", "self.room = min(self.room, context - len(self.ids))", "pass")

m = of("rollout/play.py", PLAY)
m("every turn draws the same numbers", '("turn", len(track.turns)) if track.turns else ()', "")
m("who hangs is closed all the same", "            self._hung.add(number)\n", "            pass\n")

m = of("learning/sft.py", DEMONSTRATIONS)
m("what a tool gave is learnt", "action_BL[b, start:end] = True", "action_BL[b, turns[0][0] : end] = True")

# -- learning/optimizer.py, run/accuracy.py, rollout/canary.py ----------------------------------------------------------------------------

m = of("learning/optimizer.py", OPTIM)
m("micro-batches add up in bfloat16", "        self._set_aside()\n        before_backward(", "        before_backward(")
m("only the last micro-batch counts", "master.grad.add_(grad)  #", "master.grad.copy_(grad)  #")
m = of("run/accuracy.py", BASE_RATE)
m("the critic starts from the held-out problems", "c.critic.start_at(base_rate(c, state, result.accuracy))", "c.critic.start_at(result.accuracy)")
m("the critic starts at the evaluation's temperature", "tasks, c.sampling, seed=(c.config.seed,", "tasks, Sampling.of(c.config.rollout, c.config.evaluation.temperature), seed=(c.config.seed,")
m("the critic's start consumes problems", "    c.curriculum.load_state_dict(before)\n    rollouts = collect(", "    rollouts = collect(")
m("the critic starts from what was masked", "if r.verdict and not r.verdict.masked]\n    return sum(graded)", "if r.verdict]\n    return sum(graded)")
m = of("rollout/canary.py", WIRES)
m("the limit of noise is twice what it should be", "return max(TIMES * measured", "return max(2 * TIMES * measured")
m("the limit of noise has no floor", "max(TIMES * measured, explained[dtype] / 2)", "TIMES * measured")
m("the canary's limit is never measured", "self.limit = noise_limit(gap, PROBED, policy.dtype)", "pass", WIRES)
m("the canary's limit follows every look", "        if self.limit is None:\n            self.limit = noise", "        if True:\n            self.limit = noise", WIRES)

# -- learning/optimizer.py, learning/learner.py, distributed/ on several ranks ------------------------------------------------------------

m = of("learning/optimizer.py", f"{RANKS}[3-1-updates-of-few-rows]")
m("each rank steps with its own gradient", "        self.mesh.add_up([m.grad for m in whole if m.grad is not None])\n", "")
m("a rank without rows has no gradient", "            if some and master.grad is None:", "            if False:")
m("divided weights that are together stay so after a step", "        at_rest(self.of)  # the next pass must see the new weights\n", "", f"{RANKS}[2-2-ppo-epochs]")
m("each rank clips by its own part's norm", "self.mesh.sum(_square(parts)) / copies", "_square(parts)", f"{RANKS}[2-2-sppo]")
m = of("learning/learner.py", f"{RANKS}[2-2-ppo-epochs]")
m("`old` of a later epoch is another rank's", "        self.mesh.fill(old_BT, plan[0].mine, plan[0].rows)\n", "")
m("the reference's numbers stay with the rank that computed them", "        at_rest(policy.scorer)\n        return self.mesh.sum(out_BT)", "        at_rest(policy.scorer)\n        return out_BT", f"{RANKS}[2-1-remax-kl-reward]")
m = of("distributed/fsdp.py", f"{RANKS}[2-2-sppo]")
m("the gradient of divided weights is the ranks' mean", "part.set_gradient_divide_factor(1.0)", "part.set_gradient_divide_factor(float(mesh.size))")
m("only the last micro-batch's gradient of divided weights counts", "module.set_requires_gradient_sync(last)", "module.set_requires_gradient_sync(True)", equivalent="they are added up over ranks after every micro-batch, which costs time alone")
m = of("distributed/ranks.py", f"{RANKS}[3-1-updates-of-few-rows]")
m("ranks share rows", "ordered[rank :: self.size]", "ordered[rank :: self.size - 1]")

# -- tasks/epochs.py, run/curriculum.py, experimental/predicted.py ----------------------------------------------------

m = of("tasks/epochs.py", CURRICULUM)
m("every epoch comes in the same order", "(self.seed << 32) + epoch", "self.seed << 32", WIRES)
m = of("experimental/predicted.py", CURRICULUM)
m("what was chosen is not divided out", "weight_M.mean() / weight_M if self.section.corrected", "np.ones_like(weight_M) if self.section.corrected")
m("the weight is upside down", "weight_M.mean() / weight_M", "weight_M / weight_M.mean()")
m("variance for deviation", "np.sqrt(value_M * (1 - value_M))", "value_M * (1 - value_M)", NEYMAN)
m("no floor", "np.sqrt(value_M * (1 - value_M)) + self.section.floor", "np.sqrt(value_M * (1 - value_M))", NEYMAN)
m("the marks never move", "(np.arange(n) + uniform)", "(np.arange(n) + 0.5)")
m = of("run/curriculum.py", CURRICULUM)
m("the mean clears a stage", "self.accuracy[1] < self.section.clear", "self.accuracy[0] < self.section.clear")
m("nothing is rehearsed", "round(n * self.section.rehearse) if self.stage else 0", "0")
m("a bound belongs to the next stage", "task.difficulty > bound", "task.difficulty >= bound")
m("a streak is one longer", "if streak >= self.after", "if streak > self.after")
m("rest is one epoch longer", "if epoch < self.seen[name][2]", "if epoch <= self.seen[name][2]")
m("masked answers count against a stage", "and r.verdict and not r.verdict.masked:\n                yield", "and r.verdict:\n                yield")

# -- run/sample.py ----------------------------------------------------------------------------------------------------

m = of("run/sample.py", WIRES)
m("no group is flat", "if len(scores) > 1 else flat", "if len(scores) > 0 else flat")
m("what is masked makes a group mixed", "for x in group if x.verdict and not x.verdict.masked}", "for x in group if x.verdict}")
m("the greedy response is of another prompt", "greedy[i // samples]", "greedy[-1 - i // samples]", WIRES)
m("the greedy response is sampled", "replace(c.sampling, temperature=0.0)", "c.sampling", WIRES)
m("what is thrown away costs nothing", "Sampled(rollouts, sum(len(x.response_ids) for group in thrown_away for x in group), thrown_away)", "Sampled(rollouts, 0, thrown_away)", WIRES, PEERS)
m("a flat group stays", "rollouts = [x for group in mixed for x in group] + fresh", "rollouts = [x for group in [*mixed, *flat] for x in group] + fresh", WIRES, PEERS)

# -- experimental/search.py, experimental/mcts.py -----------------------------------------------------------------------------------

m = of("experimental/search.py", SEARCH)
m("every lesson weighs the same", "max(0.0, 1 - v / self.section.enough)", "1.0", WIRES)
m("the lessons' weight is ignored", "self.section.weight * max(", "max(", WIRES)
m("a lesson is not judged again", "if f is not None and f.solved and i not in no", "if f is not None and i not in no", WIRES)
m("few lessons weigh as much as many", "[w for _, w in taught], self.section.batch)", "[w for _, w in taught], len(taught))", WIRES, SEARCH)
m("a prefix is worth its best step", "[min((score for score, place", "[max((score for score, place", WIRES, SEARCH)
m("an unfinished response has an outcome", 'outcome = verdict.correct if rollout.finish == "stop" else', "outcome = verdict.correct if True else", WIRES)
m("what was solved is hard", "if r.task.id not in solved}", "if True}", WIRES, SEARCH)
m("the critic's hope is ignored", "if v < self.section.below]", "if v < 2]", WIRES, SEARCH)
m = of("experimental/mcts.py", SEARCH)
m("Q forgets the prefix's value", "/ (1 + self.visits)", "/ max(1, self.visits)")
m("an outcome goes up one node", "    for node in nodes:\n        node.visits", "    for node in nodes[-1:]:\n        node.visits")
m("PUCT ignores its prior", "scale * hope / (1 + c.visits)", "scale / (1 + c.visits)", WIRES)
