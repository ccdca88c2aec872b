"""A run as files to keep or send: one HTML file that needs no network, and a model card in Markdown."""

from __future__ import annotations

import json
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..files import write_atomic
from . import panels
from .live import plotly_script
from .pages import STATIC, environment, rollout_view, visible
from .progress import clock
from .reader import RunReader
from .rollouts import Filter
from .summary import RECENT, recent_mean, summarise, watched

NAMES = {
    "eval/right_by_wrong_steps": "right answers by a wrong step, of those whose steps can be judged",
    "eval/steps_judged_share": "right answers whose steps can be judged",
    "eval/mean_tokens": "tokens per response",
    "eval/entropy": "entropy, nats per token",
}
IN_TRAINING = {
    "advantage/mean": "mean advantage, in training",
    "critic/ece": "critic: calibration error (ECE)",
    "critic/brier": "critic: Brier score",
}
CHOSEN = 6
"""Rollouts of each kind in the file."""
KINDS = (
    ("Surprises: the critic was sure and wrong", {"surprised": True, "order": "surprise"}),
    ("Right", {"outcome": "correct"}),
    ("Wrong", {"outcome": "wrong"}),
    ("Longest", {"order": "-tokens"}),
)


def html(run: RunReader) -> str:
    """The whole report."""
    figures = {"overview": panels.overview([run]), "critic": panels.critic(run), "health": panels.health([run])}
    scripts = {"plotly": plotly_script().decode(), "js": (STATIC / "app.js").read_text()}
    return environment().get_template("report.html").render(
        page="overview", live=False, runs=[run], run=run, chosen=0, summaries=[{**summarise(run), "index": 0}], pages=figures,
        figures=[f for page in figures.values() for f in page], extremes=panels.extremes(run), chosen_rollouts=_chosen(run),
        facts=_facts(run), recipe=run.config.to_toml(), version=__version__, date=date.today().isoformat(),
        css=Markup((STATIC / "style.css").read_text()),
        **{name: Markup(text.replace("</script", "<\\/script")) for name, text in scripts.items()},
    )  # fmt: skip


def _chosen(run: RunReader) -> list[dict[str, Any]]:
    steps = run.rollouts.steps()
    groups: list[dict[str, Any]] = []
    ids = dict.fromkeys(e for a in summarise(run)["alerts"] for e in a["evidence"])
    places = [tuple(map(int, e.split(":"))) for e in ids if re.fullmatch(r"\d{1,9}:\d{1,9}", e)]
    if cited := [f for place in places if (f := run.rollouts.one(*place)) is not None]:
        groups.append({"title": "Cited by alerts", "cited": True, "rollouts": [rollout_view(run, f) for f in cited]})
    for title, want in KINDS:
        _, rows = run.rollouts.find(Filter(first=steps[-1] - RECENT + 1 if steps else None, **want), 0, CHOSEN)
        found = [f for row in rows if (f := run.rollouts.one(row["step"], row["row"])) is not None]
        if found:
            groups.append({"title": title, "cited": False, "rollouts": [rollout_view(run, f) for f in found]})
    return groups


def _facts(run: RunReader) -> list[tuple[str, str]]:
    c, s = run.config, run.summary()
    facts = [
        ("policy", c.policy.model), ("algorithm", c.objective.algorithm), ("problems", c.task.train),
        ("held-out problems", c.task.eval or "the held-out share of these"), ("judged by", c.reward.use),
        ("prompts × samples per step", f"{c.rollout.prompts} × {c.rollout.samples}"), ("seed", str(c.seed)),
        ("recipe (sha256)", str(s.get("recipe_sha256", c.sha256))[:16]),
    ]  # fmt: skip
    if c.critic_reads:
        facts.insert(1, ("critic", c.critic.model))
    if s:
        facts += [
            ("generated tokens", f"{s['generated_tokens']:,}"), ("training time, supervised start included", clock(s["seconds"])),
            ("peak memory", f"{s['peak_rss_bytes'] / 2**30:.2f} GiB"),
            ("masked", f"{s['masked']} samples"), ("weights (sha256)", str(s["policy_sha256"])[:16]),
        ]  # fmt: skip
    return facts


def card(run: RunReader) -> str:
    """The model card: what was trained, on what, how well it does, what was checked and what is unknown."""
    c, s = run.config, run.summary()
    summary = summarise(run)
    metrics = run.metrics()
    now: dict[str, Any] = next((m for m in reversed(metrics) if m.get("eval/accuracy") is not None), {})
    rows = [("held-out accuracy", _share(now, "eval/accuracy", "eval/low", "eval/high"))]
    start = run.start()
    rows.append(("… before training", _share(start, "accuracy", "low", "high")))
    measured = [
        k
        for k in sorted(now)
        if k.startswith("eval/") and k not in ("eval/accuracy", "eval/low", "eval/high", "eval/pass@1")
    ]
    rows += [(NAMES.get(k, k.removeprefix("eval/").replace("_", " ")), f"{now[k]:.3f}") for k in measured]
    rows += [(name, f"{m:.3f}") for key, name in IN_TRAINING.items() if (m := recent_mean(metrics, key)) is not None]
    none = "Nothing." if watched(run) else "They were off, or the run is older than they are."
    quarantined = int(sum(m.get("monitor/quarantined", 0) for m in metrics))
    path = shlex.quote(visible(run.path.resolve().name if str(run.path) == "." else run.path))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [sppo, reinforcement-learning, reasoning]",
        *([f"base_model: {json.dumps(c.policy.model)}"] if _is_hub_name(c.policy.model) else []), "---", "",
        f"# {_cell(run.name)}", "",
        f"`{c.policy.model}`, trained with `{c.objective.algorithm}` (sppo {__version__}) to solve `{c.task.train}`. "
        f"{summary['sentence']} {summary['doubt']}".rstrip(), "",
        "## What was measured", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), "",
        "## How it was trained", "", "| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in _facts(run)), "",
        "## What the monitors raised", "",
        *([f"- since step {a['since']}: {_cell(a['what'])} ({_cell(a['why'])}{'; ' + a['now'] if a['now'] else ''})" for a in summary["alerts"]] or [none]), "",
        "## Limits", "",
        f"The accuracy holds for problems like `{c.task.eval or c.task.train}`, judged by `{c.reward.use}`; nothing was measured on others. "
        f"One seed ({c.seed}) was run."
        + (f" {s['masked']} samples were masked and trained nothing, {quarantined} of them by the monitors." if s.get("masked") else ""), "",
        "## Check it", "", "```", f"sppo audit verify {path}", f"sppo audit replay {path}", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def write(run: RunReader, folder: Path) -> tuple[Path, Path]:
    """report.html and model-card.md in a folder. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page, text = folder / "report.html", folder / "model-card.md"
    for path, content in ((page, html(run)), (text, card(run))):
        write_atomic(path, content.encode("utf-8", "replace").decode())
    return page, text


def _share(m: dict[str, Any], value: str, low: str, high: str) -> str:
    if m.get(value) is None:
        return "not measured"
    return f"{m[value]:.3f}" + (f" (95% interval {m[low]:.3f} to {m[high]:.3f})" if m.get(low) is not None else "")


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _cell(text: str) -> str:
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
