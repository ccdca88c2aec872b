"""A rubric, answered by a model, for what no program can check: a synthesis, a plan, an explanation.

    judge:url=http://127.0.0.1:8000/v1,model=Qwen3-8B     any server that speaks OpenAI's protocol; its key is in OPENAI_API_KEY
    judge:model=models/smollm2-135m                       a model in this process: is yes or no likelier?
    answer and judge:…                                    the judge is asked only where the answer is right

A row's `rubric` is a list of criteria, answered yes or no: {"criterion": "It names a source", "weight": 2}. The score is the sum of the
weights that are answered yes by the sum of those above 0, within [0, 1]; a criterion with a weight below 0 costs. `description`, `title` and `points`
are read as published rubrics have them.

The response is quoted as data. Answers are kept by content, so the same question is asked once, and `audit replay` judges the same. A question that
cannot be answered masks the sample.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError, RecipeError
from ..files import first_line
from ..types import Rollout, Task, Verdict
from .judge_trial import agreement, injections
from .rubric import Question, conversation_text, parsed, rubric_or_why, verdict_of


def build(
    model: str = "", url: str = "", labels: str = "", in_flight: int = 8, retries: int = 4, timeout: float = 60.0
) -> JudgeReward:
    """The reward for `reward.use = "judge:…"`. Raises RecipeError, ModelError."""
    if not model:
        raise RecipeError(
            "reward judge: name the model: judge:model=FOLDER, or judge:url=http://HOST:PORT/v1,model=NAME"
        )
    if min(in_flight, timeout) <= 0 or retries < 0:
        raise RecipeError("reward judge: in_flight and timeout must be above 0, retries at least 0")
    judge: Judge = Remote(url, model, in_flight, retries, timeout) if url else Local(model)
    return JudgeReward(judge, labels)


class Judge(Protocol):
    """What answers questions."""

    name: str

    def answers(self, questions: Sequence[Question]) -> list[bool | str]:
        """Yes or no for each, or why there is none."""


class JudgeReward:
    """See the module."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""
    dear = True
    """In a conjunction or a gate it is asked only where the first part is right."""

    def __init__(self, judge: Judge, labels: str = "") -> None:
        self.answers, self.labels = Kept(judge), labels

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """A sample is masked where its row has no rubric, or one of its questions no answer."""
        rubrics = [rubric_or_why(r.task) for r in rollouts]
        questions = [
            Question(r.task.text, conversation_text(r), c.text)
            for r, rubric in zip(rollouts, rubrics, strict=True)
            if not isinstance(rubric, str)
            for c in rubric
        ]
        found = iter(self.answers(questions))
        return [
            Verdict(0.0, "invalid_task", {"reason": rubric})
            if isinstance(rubric, str)
            else verdict_of(rubric, [next(found) for _ in rubric])
            for rubric in rubrics
        ]

    def check(self, task: Task) -> str | None:
        """Why a row has no rubric that can be read, or None."""
        found = rubric_or_why(task)
        return found if isinstance(found, str) else None

    def keep(self, path: Path) -> None:
        """Keep answers in a file, and take those that are there. Raises DataError for one that is damaged."""
        self.answers.keep(path)

    def begin(self, tasks: Sequence[Task], note: Callable[[str], None]) -> None:
        """Say before training what the judge is worth: which injections it pays, and how it agrees with people."""
        note(injections(self.answers, tasks))
        if self.labels:
            note(agreement(self.answers, Path(self.labels)))

    def close(self) -> None:
        """Nothing is held open."""


class Kept:
    """A judge's answers by content; those that are none are asked for again."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, judge.name
        self._known: dict[str, bool] = {}
        self._path: Path | None = None
        self._lock = threading.Lock()

    def __call__(self, questions: Sequence[Question]) -> list[bool | str]:
        keys = [self._key(q) for q in questions]
        with self._lock:
            fresh = {key: q for key, q in zip(keys, questions, strict=True) if key not in self._known}
        said = dict(zip(fresh, self.judge.answers(list(fresh.values())), strict=True)) if fresh else {}
        with self._lock:
            new = {key: answer for key, answer in said.items() if isinstance(answer, bool)}
            self._known |= new
            if self._path is not None and new:
                with self._path.open("a") as file:
                    file.writelines(
                        json.dumps({"question": key, "answer": answer}) + "\n" for key, answer in new.items()
                    )
            return [self._known[key] if key in self._known else said[key] for key in keys]

    def keep(self, path: Path) -> None:
        """See `JudgeReward`."""
        self._path = path
        if not path.exists():
            return
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[str(entry["question"])] = bool(entry["answer"])
            except (ValueError, KeyError, TypeError):
                if number < len(path.read_text().splitlines()):  # a last line may have been cut off by a kill
                    raise DataError(
                        f"{path}:{number} is no answer of a judge; move the file away to ask again"
                    ) from None

    def _key(self, question: Question) -> str:
        return hashlib.sha256(f"{self.name}\0{question.text}".encode("utf-8", "replace")).hexdigest()


class Remote:
    """A judge behind OpenAI's protocol. Raises RecipeError without the client."""

    def __init__(self, url: str, model: str, in_flight: int, retries: int, timeout: float) -> None:
        if importlib.util.find_spec("openai") is None:
            raise RecipeError("reward judge: url= needs OpenAI's client: pip install 'sppo[judge]'")
        self.name, self.in_flight, self._model = f"{url} {model}", in_flight, model
        self._options = {
            "base_url": url,
            "api_key": os.environ.get("OPENAI_API_KEY", "none"),
            "max_retries": retries,
            "timeout": timeout,
        }

    def answers(self, questions: Sequence[Question]) -> list[bool | str]:
        """See `Judge`."""
        from openai import OpenAI

        with OpenAI(**self._options) as client, ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(partial(self._answer, client), questions))

    def _answer(self, client: Any, question: Question) -> bool | str:
        from openai import OpenAIError

        try:
            made = client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": question.text}],
                temperature=0.0,
                max_tokens=256,
                seed=0,
            )
            said = made.choices[0].message.content or ""
        except (OpenAIError, ValueError, IndexError, AttributeError, TypeError) as error:
            return f"the judge did not answer: {type(error).__name__}: {first_line(error)[:200]}"
        return parsed(said)


class Local:
    """A causal language model in this process: the likelier of yes and no."""

    def __init__(self, model: str) -> None:
        from ..models.loading import pick_device
        from ..models.policy import Policy

        self.policy, _ = Policy.load(model, dtype="auto", device=pick_device(), seed=0)
        self.name = f"{model} {self.policy.fingerprint()}"

    def answers(self, questions: Sequence[Question]) -> list[bool | str]:
        """See `Judge`."""
        yes, no = (self.policy.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("yes", "no"))
        return [self._answer(question, yes, no) for question in questions]

    def _answer(self, question: Question, yes: list[int], no: list[int]) -> bool | str:
        prompt = self.policy.prompt_ids(Task("judge", [{"role": "user", "content": question.text}]))
        if self.policy.context is not None and len(prompt) + max(len(yes), len(no)) > self.policy.context:
            return f"the judge reads {self.policy.context} tokens, and the question has {len(prompt)}"
        said_yes, said_no = self.policy.given_logps([prompt, prompt], [yes, no])
        return sum(said_yes) > sum(said_no)
