"""`sppo eval`: accuracy, pass@k and 95% intervals of a model (a folder, a hub name or a run) on one or more tasks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._shared import Loaded, add_columns_option, columns_for, emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("eval", help="measure a model on tasks", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder, a hub name or a run directory (its newest checkpoint)"
    )
    parser.add_argument(
        "--tasks", required=True, metavar="SPEC[,SPEC]", help="e.g. chain:steps=6,gym:chain_sum or problems.jsonl"
    )
    parser.add_argument("--n", type=int, default=256, help="problems per task [256]")
    parser.add_argument("--samples", type=int, default=1, help="responses per problem [1]")
    parser.add_argument(
        "--reward", help="the reward that judges responses; default: the run's, else 'gym' for gym tasks, else 'answer'"
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's, else 1")
    parser.add_argument("--top-k", type=int, help="draw among the K likeliest tokens; default: the run's, else all")
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw among the likeliest tokens that together have this probability; default: the run's, else 1",
    )
    parser.add_argument("--max-tokens", type=int, help="response limit; default: the run's, else 256")
    parser.add_argument("--instruction", help="text added after every question; default: the run's")
    add_columns_option(parser)
    parser.add_argument("--batch", type=int, help="sequences decoded together")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write every response to a .jsonl file, or as a list to a .json one: task, problem, prompt, response, score, outcome, evidence",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate on each task in turn."""
    from ..rewards.loading import load_reward
    from ..rollout.local import LocalEngine
    from ..spec import split_specs
    from ..tasks.base import with_instruction

    if args.n < 1 or args.samples < 1:
        raise UserError("--n and --samples must be at least 1")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"--out: {args.out} cannot be written; name one in a folder that is there")
    specs = split_specs(args.tasks)
    if not specs:
        raise UserError("--tasks names no task")
    sources = _sources(specs, args)
    loaded = Loaded(args.model, with_critic=True)
    if loaded.recipe is not None and args.instruction is None:
        sources = {s: with_instruction(source, loaded.recipe.task.instruction) for s, source in sources.items()}
    _warn_of_training_rows(specs, loaded)
    rewards = {s: load_reward(args.reward or _default_reward(sources[s][0], loaded)) for s in specs}
    sampling = loaded.sampling(
        temperature=args.temperature, max_tokens=args.max_tokens, batch=args.batch, top_k=args.top_k, top_p=args.top_p
    )
    engine = LocalEngine(loaded.policy)
    if engine.stated:
        print(engine.stated, file=sys.stderr)
    results, rows = [], list[dict[str, Any]]()
    for spec in specs:
        result, responses = _measured(spec, sources[spec], rewards[spec], engine, loaded, sampling, args)
        rewards[spec].close()
        results.append(result)
        rows += responses
    out = {
        "model": loaded.name, "temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "seed": args.seed, "tasks": results,
    }  # fmt: skip
    said = [_lines(r, sampling.temperature) for r in results]
    if args.out:
        _write(Path(args.out), rows)
        out["out"] = args.out
        said.append(f"every response: {args.out}")
    emit(out, args.json, "\n".join(said))
    return 0


def _sources(specs: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The problems of every task, loaded before the model: a typo in the third task must not cost the first two."""
    from ..spec import is_records
    from ..tasks.loading import load_tasks

    columns = columns_for(args)
    return {
        s: load_tasks(
            s,
            instruction=args.instruction or "",
            default_split=None if is_records(s) else "held-out",
            columns=columns if is_records(s) else None,
        )
        for s in specs
    }


def _warn_of_training_rows(specs: list[str], loaded: Loaded) -> None:
    from ..spec import is_records, located

    for spec in specs:
        if loaded.recipe is not None and is_records(spec) and located(spec, None) == loaded.recipe.task.train:
            print(
                f"warning: the run was trained on {spec} (all but a tenth of it): this is not a held-out accuracy; "
                f"for that: --tasks records:path={spec},split=held-out",
                file=sys.stderr,
            )


def _measured(
    spec: str, source: Any, reward: Any, engine: Any, loaded: Loaded, sampling: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one task, and its responses as rows for `--out`."""
    from ..evaluation.evaluate import evaluate, held_out_tasks
    from ..evaluation.step_quality import step_checker

    tasks = held_out_tasks(source, args.n)
    usable = [t for t in tasks if len(ids := loaded.policy.prompt_ids(t)) > 0 and loaded.fits(ids, sampling.max_tokens)]
    if not usable:
        raise UserError(
            f"{spec}: no prompt fits into the model's {loaded.policy.context} positions with --max-tokens {sampling.max_tokens}"
        )
    result = evaluate(
        engine, loaded.policy, reward, usable, sampling, samples=args.samples, seed=args.seed,
        checker=step_checker(spec, usable[0], reward), critic=loaded.prompt_critic(usable),
        keep_cut=loaded.recipe is not None and loaded.recipe.rollout.truncated == "keep", environment=loaded.environment(),
    )  # fmt: skip
    figures = {"task": spec, **result.as_dict(), "passed_over": len(tasks) - len(usable)}
    return figures, [_row(spec, r) for r in result.rollouts]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from ..files import write_atomic

    lines = [json.dumps(row, default=str) for row in rows]
    listed = path.name.endswith(".json")
    write_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n" if listed else "".join(f"{line}\n" for line in lines))


def _row(spec: str, r: Any) -> dict[str, Any]:
    """One response as a line of `--out`."""
    v = r.verdict
    return {
        "task": spec, "id": r.task.id, "sample": r.sample, "prompt": r.task.prompt, "response": r.text, "tokens": len(r.response_ids),
        "finish": r.finish, "score": v.score, "correct": v.correct, "outcome": v.outcome, "masked": v.masked, "evidence": dict(v.evidence),
        **({"messages": list(r.messages)} if r.messages else {}),
    }  # fmt: skip


def _default_reward(example: Any, loaded: Loaded) -> str:
    """The run's own reward where it can grade such a task, else the one that fits the task."""
    from ..rewards.loading import fitting_reward, load_reward
    from ..spec import GIVEN

    own = loaded.recipe.reward.use if loaded.recipe is not None else None
    if own == GIVEN:
        raise UserError("this run's reward was given in Python; name one with --reward")
    if own is not None:
        reward = load_reward(own)
        gradable = reward.check(example) is None
        reward.close()
        if gradable:
            return own
    return fitting_reward(example)


def _lines(r: dict[str, Any], temperature: float) -> str:
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    passes = "  ".join(f"{k} {v:.3f}" for k, v in r["pass_at_k"].items() if k != "pass@1")
    entropy = "" if r["entropy"] is None else f", entropy {r['entropy']:.3f} nats per token"
    notes = [f"{r['masked']} could not be graded"] if r["masked"] else []
    notes += [f"{r['passed_over']} prompts too long"] if r["passed_over"] else []
    lost = f", {r['overruled']:.0%} although the reward would have paid them" if r["overruled"] else ""
    notes += [f"{r['truncated']:.0%} cut at --max-tokens{lost}"] if r["truncated"] else []
    if r["accuracy"] is None:
        return f"{r['task']}\n  none of {r['masked']} responses could be graded: {r['outcomes']}"
    return (
        f"{r['task']}\n  accuracy {r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]  {passes}\n"
        f"  {r['n']} problems × {r['samples']}, {how}, {r['mean_tokens']:.0f} tokens each{entropy}"
        + (f" ({', '.join(notes)})" if notes else "")
        + _steps(r["measures"])
        + "".join(_calibration(who, found) for who, found in r["calibration"].items())
    )


def _calibration(who: str, c: dict[str, Any]) -> str:
    """The calibration of a predictor of success, and the accuracy when it abstains where it doubts."""
    of = (
        "the critic's prediction"
        if who == "critic"
        else f"the model's stated confidence (in {c['stated']:.0%} of responses)"
    )
    kept = ", ".join(
        f"{value:.3f} of the surest {float(share):.0%}" for share, value in c["selective_accuracy"].items()
    )
    auc = "" if c["auc"] is None else f", AUC {c['auc']:.2f}"
    return f"\n  {of}: ECE {c['ece']:.3f}, Brier {c['brier']:.3f}{auc}; right: {c['accuracy']:.3f} of all, {kept}"


def _steps(measures: dict[str, float]) -> str:
    if (wrong := measures.get("right_by_wrong_steps")) is None:
        return ""
    return f"\n  {wrong:.1%} of the right answers by a wrong step (of the {measures['steps_judged_share']:.0%} whose steps can be judged)"
