"""KL estimators between policy and reference, of whole responses or token by token, and what each one's gradient really is.

With d_t = log π_θ(y_t | s_t) − log π_ref(y_t | s_t), s_t the prompt and what was written before token t, ℓ_ref = Σ_t d_t, and y ~ π_θ
(arXiv 2512.21852, 2510.01555; Schulman's k1, k2, k3). Whole responses, x = ℓ_ref:

    name           value                 as a reward term (detached)        as a loss term: expected gradient
    k1             x                     exact: ∇KL(π_θ‖π_ref)              0  (E[∇ log π] = 0): useless, so not offered
    k2             ½ x²                  biased                             exact: ∇KL(π_θ‖π_ref)
    k3             e^{−x} − 1 + x        biased                             ∇KL(π_ref‖π_θ): the *other* direction
    k3-weighted    r·k3, r = π_θ/π_old   –                                  exact: ∇KL(π_θ‖π_ref), off policy too (r·x·∇ log π: below)

Token by token, x = d_t, summed over a response:

    k1             as a reward for each token, each token charged with those from it on: exact, with less variance than ℓ_ref,
                   since what was paid before a token does not depend on it
    k2             Σ_s d(s) ∇KL(π_θ(·|s)‖π_ref(·|s)), d(s) the chance that π_θ writes the prefix s, held fixed: what a token does to the
                   prefixes after it is left out, so it is not ∇KL(π_θ‖π_ref)
    k3             Σ_s d(s) ∇KL(π_ref(·|s)‖π_θ(·|s)): the other direction, on the policy's prefixes and not on the reference's (GRPO's term,
                   arXiv 2402.03300 eq. 3, 4, which divides by the response's length: below)
    k3-weighted    as k2, and in later updates too, with d(s) the chance that π_old writes s (DeepSeek-V3.2, arXiv 2512.02556; TRL's)

All of this holds on policy: in a step's first update, where nothing is cut (top-p and its kind). Later updates and cuts sample from another
distribution, and only k3-weighted has an importance weight for the former. A response's mean in place of its sum (`average = "responses"`,
GRPO's own, and ratios that divide by length) weighs each token by 1/T, which is known at the end only and depends on the token: the expectation
is then no KL's gradient, not even over fixed prefixes. tests/exact/test_kl.py enumerates every row.

A recipe's `kl_form` is `reward` (k1, detached, inside the reward) or one of those in the loss; `kl_level` says of what the latter are. The KL
inside the reward shapes the advantage, and never a target that is a chance of success.
"""

from __future__ import annotations

from torch import Tensor

from .ratio import log_ratio
from .surrogate import bounded_exp


def estimator(x: Tensor, form: str) -> Tensor:
    """`k1`, `k2` or `k3` of log ratios x = log π_θ − log π_ref, element by element. Raises ValueError for another form.

    Past e^30 k3's exponential goes on as its tangent: finite, and the gradient's sign is that of x everywhere.
    """
    if form == "k1":
        return x
    if form == "k2":
        return 0.5 * x.square()
    if form == "k3":
        return bounded_exp(-x, less=1.0) + x
    raise ValueError(f"unknown KL estimator {form!r}: k1, k2 or k3")


def weighted_k3(x: Tensor, log_weight: Tensor) -> Tensor:
    """r·k3 of log ratios x, element by element, where r = e^log_weight moves with the policy as x does.

    ∇(r·k3) = r·(k3 + 1 − e^{−x})·∇ log π = r·x·∇ log π. The gradient is written so, and not left to the two factors, whose tangents past e^30
    would not cancel.
    """
    weight, held = bounded_exp(log_weight.detach()), x.detach()
    return weight * (estimator(held, "k3") + held * (x - held))


def kl_cost(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, weight: float) -> Tensor:
    """β·k1 of each token, for the *sampling* policy's log-probabilities, detached: what the reward is less. [B, T] × 3 → [B, T]."""
    return weight * log_ratio(logp_BT.detach(), ref_logp_BT, mask_BT, "token")
