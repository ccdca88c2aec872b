"""`sppo solve`: answer one question, and print how confident critic and model are."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import UserError
from ._shared import Loaded, conversation, emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("solve", help="answer one question", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run directory, a checkpoint, a model folder or a hub name")
    parser.add_argument(
        "question",
        metavar="QUESTION",
        help='the question, or chat messages as JSON: [{"role": "user", "content": "…"}, …]',
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the question")
    parser.add_argument(
        "--samples", type=int, default=1, help="responses; with several, how often each answer came up [1]"
    )
    parser.add_argument("--temperature", type=float, help="default: greedy for one sample, the run's for several")
    parser.add_argument("--max-tokens", type=int, help="response limit; default: the run's, else 256")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample, and ask the critic."""
    from collections import Counter

    from ..rewards.confidence import stated_confidence
    from ..rewards.extract import extract_answer
    from ..rollout.collect import sampled
    from ..rollout.local import LocalEngine
    from ..tasks.base import ListSource, with_instruction
    from ..types import Task

    if args.samples < 1:
        raise UserError("--samples must be at least 1")
    messages = _asked(args.question, args.system)
    loaded = Loaded(args.model, with_critic=True)
    instruction = loaded.recipe.task.instruction if loaded.recipe else ""
    task = with_instruction(ListSource([Task("question", messages)]), instruction)[0]
    temperature = args.temperature if args.temperature is not None else (0.0 if args.samples == 1 else None)
    sampling = loaded.sampling(max_tokens=args.max_tokens, temperature=temperature)
    ids = loaded.policy.prompt_ids(task)
    if not loaded.fits(ids, sampling.max_tokens):
        raise UserError(
            f"the question has {len(ids)} tokens; with --max-tokens {sampling.max_tokens} it does not fit into the model's {loaded.policy.context} positions"
        )
    tracks = sampled(
        LocalEngine(loaded.policy), loaded.policy, [task], sampling, samples=args.samples, seed=(args.seed, "solve"), environment=loaded.environment()
    )  # fmt: skip
    for track in tracks:
        if track.failure is not None:
            raise UserError(str(track.failure.evidence["reason"]))
    responses = [track.text for track in tracks]
    answers = Counter(extract_answer(text) for text in responses)
    chance = None
    if loaded.critic is not None:
        limit = loaded.critic.context
        if limit is not None and len(loaded.critic.prompt_ids(task)) > limit:
            raise UserError(f"the question is longer than the critic can read ({limit} tokens)")
        chance = float(loaded.critic.chances([task])[0])
    answer, count = answers.most_common(1)[0]
    stated = [q for text in responses if extract_answer(text) == answer and (q := stated_confidence(text)) is not None]
    confidence = sum(stated) / len(stated) if stated else None
    result = {
        "question": args.question, "system": args.system, "answer": answer, "agreement": count / args.samples, "responses": responses,
        "finish": [track.finish for track in tracks], "predicted_chance": chance,
        "stated_confidence": confidence,
    }  # fmt: skip
    agreement = f" ({count} of {args.samples} samples)" if args.samples > 1 else ""
    said = (
        f"predicted chance of success: {chance:.0%}"
        if chance is not None
        else "no critic beside this model, so no predicted chance"
    )
    if confidence is not None:
        said += f"\nconfidence that the model states: {confidence:.0%}"
    cut = "  (cut at the limit)" if tracks[0].finish == "length" else ""
    if tracks[0].tools:
        result["messages"] = [track.messages for track in tracks]
    shown = conversation(tracks[0].messages) if len(tracks[0].messages) > 1 else responses[0]
    emit(result, args.json, f"{shown}{cut}\n\nanswer: {answer}{agreement}\n{said}")
    return 0


def _asked(question: str, system: str | None) -> list[dict[str, str]]:
    """The question and the system message as chat messages.

    Raises UserError for an empty question, or one that is not text or chat.
    """
    for name, text in (("the question", question), ("--system", system or "")):
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            raise UserError(f"{name} is not text: it holds bytes that are not UTF-8")
    if not question.strip():
        raise UserError("the question is empty")
    messages = _messages(question) or [{"role": "user", "content": question}]
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise UserError("--system: the messages begin with a system message already")
    return [{"role": "system", "content": system}, *messages]


def _messages(text: str) -> list[dict[str, str]] | None:
    """Chat messages that a question is written as, or None for a question in words.

    Raises UserError where a message cannot be read.
    """
    from ..tasks.records import task_from

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found)):
        return None
    task = task_from({"prompt": found}, "the question")
    assert not isinstance(task.prompt, str)
    return task.prompt
