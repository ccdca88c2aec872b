"""The tree of errors: each says whose mistake it is, and what to do about it.

    SPPOError
    ├── UserError                exit 2: one clear sentence that names the file, key or row, and the mend
    │   ├── RecipeError          a recipe or a command line that cannot be obeyed
    │   ├── DataError            a row, a file or a dataset
    │   ├── ModelError           a model folder, a tokenizer, a chat template
    │   ├── RewardError          a reward of the user's that raised, or returned what a reward may not return
    │   └── SandboxUnavailable   programs cannot be run safely on this machine
    └── RunFailure               exit 1: the run itself went wrong; what it had is saved
        ├── NonFinite            a loss or gradient was not a number, again and again
        ├── OutOfMemory          memory ran out during a step
        ├── StaleWeights         the engine does not hold the learner's weights
        ├── EngineMismatch       engine and learner disagree about the probability of the same tokens
        └── WorkerLost           a process of a cluster died or hangs; a run replaces it and goes on, while it may

A response that cannot be graded is none of these: it is data (`Verdict.outcome`), masked and counted.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "EngineMismatch",
    "ModelError",
    "NonFinite",
    "OutOfMemory",
    "RecipeError",
    "RewardError",
    "RunFailure",
    "SPPOError",
    "SandboxUnavailable",
    "StaleWeights",
    "UserError",
    "WorkerLost",
]


class SPPOError(Exception):
    """Every error that sppo raises on purpose."""


class UserError(SPPOError):
    """The user's to mend: printed as one sentence, exit code 2, no traceback."""


class RecipeError(UserError):
    """A recipe or an option that cannot be obeyed."""


class DataError(UserError):
    """A dataset, a file or a row that cannot be used."""


class ModelError(UserError):
    """A model folder, tokenizer or chat template that cannot be used."""


class RewardError(UserError):
    """A reward function that raised, or returned a wrong count, type or value."""


class SandboxUnavailable(UserError):
    """The sandbox cannot start here; the sentence names the cause and the mend. Never a silent fallback."""


class RunFailure(SPPOError):
    """The run failed; what it had until then is saved. Exit code 1."""


class NonFinite(RunFailure):
    """Losses or gradients were not finite several updates in a row."""


class OutOfMemory(RunFailure):
    """Memory ran out; the sentence says what takes most, what to turn, and how to go on."""


class StaleWeights(RunFailure):
    """After a sync the engine's weights are not the learner's."""


class EngineMismatch(RunFailure):
    """The engine's log-probabilities and the learner's differ too much to learn from."""


class WorkerLost(RunFailure):
    """A worker of a cluster died, or shows no sign of life."""
