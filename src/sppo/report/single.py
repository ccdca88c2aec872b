"""A run as files to keep or send: one HTML file that needs no network, and a model card in Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..audit.chain import HEAD
from ..files import read_json_or_nothing, write_atomic
from ..recipe.recipe import POLICY
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
        ("steps", f"{len(run.metrics())} of {c.training.steps}"),
        ("prompts × samples per step", f"{c.rollout.prompts} × {c.rollout.samples}"), ("seed", str(c.seed)),
        ("recipe (sha256)", str(s.get("recipe_sha256", c.sha256))[:16]),
    ]  # fmt: skip
    if c.adapter is not None:
        held = f" on weights in {c.policy.quantize}" if c.policy.quantize else ""
        facts.insert(
            1, ("adapter", f"rank {c.adapter.rank}, alpha {c.adapter.alpha}, {_listed(c.adapter.targets)}{held}")
        )
    if c.critic_reads:
        own = "a second adapter on the policy's weights" if c.critic.model == POLICY else c.critic.model
        facts.insert(1 + (c.adapter is not None), ("critic", own))
    if s:
        facts += [
            ("generated tokens", f"{s['generated_tokens']:,}"), ("training time, supervised start included", clock(s["seconds"])),
            ("peak memory", f"{s['peak_rss_bytes'] / 2**30:.2f} GiB"),
            ("masked", f"{s['masked']} samples"), ("weights (sha256)", str(s["policy_sha256"])[:16]),
        ]  # fmt: skip
    return facts


def header(fields: Mapping[str, Any]) -> list[str]:
    """The YAML at the top of a model card, by which a hub finds the model."""
    given = {"pipeline_tag": "text-generation", "tags": ["sppo", "reinforcement-learning", "reasoning"], **fields}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in given.items()), "---", ""]


def is_hub_name(model: str) -> bool:
    """Whether a model's name is one of a hub, and not of a folder."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def card(run: RunReader, fields: Mapping[str, Any] | None = None, use: str = "") -> str:
    """The model card: what was trained, on what, how well it does, what was checked and what is unknown.

    `fields` are those of the YAML header, by default what the recipe tells; `use` is Markdown that says how to load it."""
    c, s = run.config, run.summary()
    if fields is None:
        base = {"base_model": c.policy.model} if is_hub_name(c.policy.model) else {}
        fields = {"library_name": "transformers" if c.adapter is None else "peft", **base}
    summary = summarise(run)
    metrics = run.metrics()
    now: dict[str, Any] = next((m for m in reversed(metrics) if m.get("eval/accuracy") is not None), {})
    later = f", after step {now['step'] + 1}" if now and now["step"] + 1 != len(metrics) else ""
    rows = [(f"held-out accuracy{later}", _share(now, "eval/accuracy", "eval/low", "eval/high"))]
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
    here = not use and str(run.path) != "."  # a card that goes elsewhere tells no path of this machine
    path = shlex.quote(visible(run.path if here else run.path.resolve().name))
    head = read_json_or_nothing(run.path / HEAD).get("sha256", "")
    lines = [
        *header(fields),
        f"# {_cell(run.name)}", "",
        f"`{c.policy.model}`, trained with `{c.objective.algorithm}` (sppo {__version__}) to solve `{c.task.train}`. "
        f"{summary['sentence']} {summary['doubt']}".rstrip(), "",
        *([use, ""] if use else []),
        "## What was measured", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), "",
        "## How it was trained", "", "| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in _facts(run)), "",
        "## What the monitors raised", "",
        *([f"- since step {a['since']}: {_cell(a['what'])} ({_cell(a['why'])}{'; ' + a['now'] if a['now'] else ''})" for a in summary["alerts"]] or [none]), "",
        "## Limits", "",
        f"The accuracy holds for problems like `{c.task.eval or c.task.train}`, judged by `{c.reward.use}`; nothing was measured on others. "
        f"One seed ({c.seed}) was run."
        + (f" {s['masked']} samples were masked and trained nothing, {quarantined} of them by the monitors." if s.get("masked") else ""), "",
        "## Check it", "", "With the run's directory; the record of these steps is as it was where its head is the same:", "",
        "```", f"sppo audit verify {path}" + (f" --head {head}" if head else ""), f"sppo audit replay {path}", "```", "",
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


def _listed(targets: str | Sequence[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _cell(text: str) -> str:
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
