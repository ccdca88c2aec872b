"""Tools and environments given in Python, as TRL's GRPOTrainer takes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sppo import SPPOConfig, SPPOTrainer
from sppo.errors import RecipeError
from sppo.models.tiny import character_tokenizer

ROWS = [{"prompt": f"{a}+{b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]


def settings(out: Path, **more) -> SPPOConfig:
    recipe = {
        "training.critic_lr": 1e-3,
        "evaluation.n": 4,
        "monitors.action": "off",
        "rollout.truncated": "keep",
        "run.threads": 1,
    }
    return SPPOConfig(
        output_dir=str(out),
        max_steps=2,
        prompts_per_step=8,
        max_completion_length=24,
        disable_progress=True,
        recipe=recipe | more,
    )


class GuessingGame:
    """As TRL has environments; what it knows comes with `reset`."""

    def reset(self, **kwargs) -> str | None:
        self.secret = int(kwargs["answer"])
        self.tries = 0
        return f" ({len(kwargs['prompt'])})"

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The number to try.

        Returns:
            Whether it is too low, too high or right.
        """
        self.tries += 1
        return "right" if number == self.secret else "too low" if number < self.secret else "too high"

    def get_reward(self) -> float:
        return 1.0 / (1 + self.tries)


def test_an_environment_class_of_trls_runs_unchanged_and_pays_by_itself(tmp_path):
    trainer = SPPOTrainer(
        model="tiny:hidden=32,layers=1,heads=2",
        train_dataset=ROWS,
        environment_factory=GuessingGame,
        args=settings(tmp_path / "run"),
    )
    summary = trainer.train()
    assert summary["steps"] == 2
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pylist()
    assert all(
        row["score"] == 1.0 and json.loads(row["environment"])["reward"] == 1.0 for row in rows
    )  # it never guesses
    tokenizer = character_tokenizer()
    assert {tokenizer.decode(row["prompt_ids"])[3:] for row in rows} == {"? (4)"}  # what reset says is added
    assert [json.loads(row["messages"])[0]["role"] for row in rows] == ["assistant"] * len(rows)


def test_reward_functions_read_the_environments(tmp_path):
    seen = []

    def reward_func(environments, **kwargs):
        seen.extend(environments)
        return [float(e.secret is not None) for e in environments]

    trainer = SPPOTrainer(
        model="tiny:hidden=32,layers=1,heads=2", reward_funcs=reward_func, train_dataset=ROWS, environment_factory=GuessingGame,
        args=settings(tmp_path / "run"),
    )  # fmt: skip
    trainer.train()
    assert len(seen) > 16
    assert all(isinstance(e, GuessingGame) for e in seen)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["reward/mean"] for m in metrics] == [1.0, 1.0]
    assert metrics[0]["turns/mean"] >= 1


def multiply(a: int, b: int) -> int:
    """Multiply.

    Args:
        a: One.
        b: Another.
    """
    return a * b


def test_functions_are_tools(tmp_path):
    def reward_func(completions, **kwargs):
        return [float(random.Random(str(c)).random() > 0.5) for c in completions]

    trainer = SPPOTrainer(
        model="tiny:hidden=32,layers=1,heads=2",
        reward_funcs=reward_func,
        train_dataset=ROWS,
        tools=[multiply],
        args=settings(tmp_path / "run"),
    )
    assert trainer.train()["steps"] == 2
    assert trainer.config.environment.use == "given in Python"
    again = SPPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, resume_from_checkpoint=True, disable_progress=True
    )
    trainer = SPPOTrainer(
        model="tiny:hidden=32,layers=1,heads=2",
        reward_funcs=reward_func,
        train_dataset=ROWS,
        tools=[multiply],
        args=again,
    )
    assert trainer.train()["steps"] == 3


def test_what_cannot_pay_is_refused(tmp_path):
    class Poor:
        def look(self) -> str:
            """Look."""
            return "nothing"

    with pytest.raises(RecipeError, match="no get_reward"):
        SPPOTrainer(model="tiny", train_dataset=ROWS, environment_factory=Poor, args=settings(tmp_path / "run"))
    with pytest.raises(RecipeError, match="reward_funcs is missing"):
        SPPOTrainer(model="tiny", train_dataset=ROWS, args=settings(tmp_path / "run"))
