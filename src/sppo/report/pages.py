"""Templates and their data. A model's output is shown as text, never as markup."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..environments.base import shown
from ..rewards.segments import split_steps
from .progress import clock
from .reader import MOST, RunReader
from .rollouts import SURPRISED

STATIC = Path(__file__).parent / "static"
MOST_TOKENS, MOST_TEXT = 4000, 100_000
"""Limits on the tokens and characters of one response on a page; a link (or `sppo audit show`) gives all of it."""
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: object) -> str:
    """Control characters and those that turn, hide or join text are written out: `␛`, `⟨U+202E⟩`.

    Line ends and tabs stay.
    """

    def shown(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"

    return _INVISIBLE.sub(shown, str(text).replace("\r\n", "\n").encode("utf-8", "replace").decode())


def shortened(text: object, most: int = 160) -> str:
    """The beginning of a text on one line."""
    line = " ".join(visible(str(text)[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def script_json(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), default=str).replace("NaN", "null").replace("Infinity", "null")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def number(value: float | None, form: str = "{:.3f}") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def environment() -> Environment:
    """Jinja with everything escaped, and a mistyped name an error."""
    env = Environment(
        loader=PackageLoader("sppo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "quoted": lambda path: shlex.quote(visible(path)),
        "visible": visible,
        "shortened": shortened,
        "script_json": script_json,
        "number": number,
        "clock": clock,
    }
    env.globals |= {"SURPRISED": SURPRISED}
    return env


def rollout_view(run: RunReader, found: dict[str, Any]) -> dict[str, Any]:
    """One rollout for display: its tokens with probability and ratio, grouped into steps; its verdict's evidence as
    rows."""
    try:
        evidence = json.loads(found["evidence"] or "{}")
        rows = _rows(evidence)
    except (ValueError, AttributeError, RecursionError):
        evidence, rows = {}, [("evidence", str(found["evidence"])[:MOST_TEXT])]
    ids = found["response_ids"][:MOST_TOKENS]
    pieces, logps, ratios = run.pieces(ids), found["logps"], found["log_ratios"]
    ends = _step_ends(found["response"], evidence)
    tokens, at, step = [], 0, 0
    for i, piece in enumerate(pieces):
        chance = math.exp(min(float(logps[i]), 0.0))
        log_ratio = float(ratios[i]) if ratios else 0.0
        tokens.append({"text": visible(piece).replace("\n", "⏎\n"), "p": chance, "log_ratio": log_ratio, "step": step})
        at += len(piece)
        while step < len(ends) and at >= ends[step]:
            step += 1
    scores = dict(enumerate(_step_scores(evidence)))
    steps = [
        {"number": n + 1, "score": scores.get(n), "tokens": [t for t in tokens if t["step"] == n]}
        for n in range(step + 1)
    ]
    conversation = _conversation(found, tokens)
    value, correct = found["value"], found["correct"]
    surprised = value is not None and not found["masked"] and abs(correct - value) >= SURPRISED
    return {
        **found, "steps": [s for s in steps if s["tokens"]], "conversation": conversation, "evidence_rows": rows, "surprised": surprised,
        "shown_tokens": len(ids), "total_tokens": len(found["response_ids"]), "sequence_logp": sum(found["logps"]),
        "sequence_ratio": sum(ratios) if ratios else None, "ratio": math.exp(min(sum(ratios), 700.0)) if ratios else None,
        "read": run.rendered(found["prompt_ids"][:MOST_TEXT]), "prompt_tokens": len(found["prompt_ids"]),
        "columns": _columns(found["task"]), "cited": _cited(run, found), "has_ratio": bool(ratios) and any(ratios),
    }  # fmt: skip


def _conversation(found: dict[str, Any], tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A trajectory of several turns as messages in order: the policy's with their tokens and calls, the others with their text."""
    try:
        messages = [m for m in json.loads(found["messages"] or "[]") if isinstance(m, dict)]
        lengths = [end - start for start, end in found["turns"] or []]
    except (ValueError, TypeError, RecursionError):
        return []
    shown, at, turn = list[dict[str, Any]](), 0, 0
    for m in messages:
        if m.get("role") == "assistant" and turn < len(lengths):
            mine = tokens[at : at + lengths[turn]]
            at, turn = at + lengths[turn], turn + 1
            shown.append({"who": "policy", "turn": turn, "tokens": mine, "calls": _calls(m)})
        else:
            who = f"{m.get('name') or 'tool'} gave" if m.get("role") == "tool" else str(m.get("role"))
            shown.append({"who": who[:100], "text": str(m.get("content"))[:MOST_TEXT]})
    return shown


def _calls(message: dict[str, Any]) -> list[str]:
    """The calls of a turn in a line each."""
    out = list[str]()
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            out.append(str(call.get("error") or shown(function))[:MOST_TEXT])
    return out


def _columns(task: str | None) -> list[tuple[str, str]]:
    """The columns that the row gave to the rewards: its reference answer, its tests and others."""
    try:
        columns = json.loads(task or "{}").get("columns", {})
        return _rows(columns) if isinstance(columns, dict) else []
    except (ValueError, AttributeError, RecursionError):
        return []


WHY_HERE = {
    "reference": "Judged as an answer to other problems with other references, it is right for those too.",
    "hidden": "It passes the visible tests and fails a hidden one.",
    "second": "The second verifier rejects it.",
}


def _cited(run: RunReader, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Alerts that point at this rollout."""
    name = f"{found['step']}:{found['row']}"
    alerts = [a for a in run.alerts() if isinstance(a.get("evidence"), list) and name in a["evidence"]]
    return [
        {
            "what": a.get("what", "?"),
            "monitor": a.get("monitor", "?"),
            "why_here": WHY_HERE.get(str(a.get("monitor")), ""),
        }
        for a in alerts
    ]


def _step_ends(text: str, evidence: dict[str, Any]) -> list[int]:
    """Where steps end, in characters: as the reward that scored them reports, else at lines, semicolons or sentences."""
    found = _scored_steps(evidence)
    try:
        ends = [int(s["end"]) for s in found] or [end for _, end in split_steps(text[:MOST_TEXT])]
    except (KeyError, TypeError, ValueError, OverflowError):
        ends = []
    return [end + 1 for end in ends[:-1]]


def _step_scores(evidence: dict[str, Any]) -> list[float | None]:
    scores = [s.get("score") if isinstance(s, dict) else None for s in _scored_steps(evidence)]
    return [s if isinstance(s, (int, float)) and -MOST < s < MOST else None for s in scores]


def _scored_steps(evidence: dict[str, Any]) -> list[Any]:
    inside = evidence.get("parts")
    parts = [evidence, *(p for p in (inside if isinstance(inside, list) else []) if isinstance(p, dict))]
    return next(
        (
            p["steps"]
            for p in parts
            if isinstance(p.get("steps"), list) and p["steps"] and isinstance(p["steps"][0], dict)
        ),
        [],
    )


def _rows(evidence: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested evidence as (what, text), flat."""
    rows: list[tuple[str, str]] = []
    for key, value in evidence.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _rows(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            for i, v in enumerate(value[:50]):
                rows += _rows(v, f"{name}[{i}].") if isinstance(v, dict) else [(f"{name}[{i}]", str(v))]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, text[:MOST_TEXT]))
    return rows
