"""Every page on a real run in a real browser: what a person does with it, on a laptop and on a phone, while a run trains, and from a file.

What a click or a key brings about comes later than the click: it is waited for (`expect`), never read at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from sppo.cli.main import main
from sppo.report.reader import open_runs
from sppo.report.single import write

from .conftest import made_run

SCROLL = """async () => {
    for (let y = 0; y < document.body.scrollHeight; y += 200) { scrollTo(0, y); await new Promise(r => setTimeout(r, 30)); }
    scrollTo(0, 0);
}"""


def until(tab, expression: str, seconds: float = 60.0) -> None:
    """Wait for what a script says (Playwright's own way needs `eval`, which the pages forbid)."""
    end = time.monotonic() + seconds
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.1)


def drawn(tab, at_least: int = 1) -> None:
    """Wait for that many figures with curves in them."""
    tab.evaluate(SCROLL)
    until(tab, f"document.querySelectorAll('[data-drawn] .main-svg').length >= {at_least}")


@pytest.fixture(scope="module")
def site(run, serve) -> str:
    return serve(run).rstrip("/")


def test_the_overview_says_how_it_went(site, tab):
    tab.goto(site)
    sentence = tab.locator(".sentence").inner_text()
    assert "It finished after 6 steps" in sentence
    assert tab.locator(".tile.is-accuracy .value").inner_text().endswith("%")
    assert tab.locator(".tile.is-step .value").inner_text() == "6"
    assert float(tab.locator(".tile.is-entropy .value").inner_text()) > 0
    assert re.fullmatch(r"[+-]0\.\d{3}", tab.locator(".tile.is-advantage .value").inner_text())
    assert tab.locator(".tile.is-pass").count() == 0  # one response a problem says nothing of it
    assert tab.locator(".tile.is-alerts .value").inner_text() == "0"
    drawn(tab, 4)
    assert not tab.problems


@pytest.mark.parametrize(("page", "figures"), [("critic", 4), ("health", 10)])
def test_figures(site, tab, page, figures):
    tab.goto(f"{site}/{page}")
    drawn(tab, figures)
    assert tab.locator("h1").inner_text().lower() == page
    assert not tab.problems


def test_the_critic_page_leads_to_the_hardest_prompts(site, tab):
    tab.goto(f"{site}/critic")
    tab.locator(".extremes a").first.click()
    expect(tab.locator("h1")).to_have_text(re.compile("^Rollout "))


def test_rollouts_are_filtered_and_opened(site, run, tab):
    tab.goto(f"{site}/rollouts")
    assert tab.locator("#total").inner_text() == "360"
    assert tab.locator("tr[data-row]").count() == 50
    assert tab.locator("tr[data-row] a").first.inner_text() == "5:0"
    tab.select_option("select[name=outcome]", "wrong")
    tab.fill("input[name=first]", "2")
    tab.fill("input[name=last]", "3")
    tab.fill("input[name=longest]", "15")
    tab.select_option("select[name=order]", "advantage")
    tab.click("form.filter button")
    import pyarrow.parquet as pq

    rows = [r for s in (2, 3) for r in pq.read_table(run / f"rollouts/step-{s:06d}.parquet").to_pylist()]
    want = [r for r in rows if r["outcome"] == "wrong" and r["tokens"] <= 15]
    assert want
    expect(tab.locator("#total")).to_have_text(str(len(want)))
    shown = [float(t) for t in tab.locator("tr[data-row] td:nth-child(4)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == pytest.approx(max(r["advantage"] for r in want), abs=0.006)
    tab.locator("tr[data-row]").first.click()
    best = max(want, key=lambda r: r["advantage"])
    expect(tab.locator("h1")).to_have_text(re.compile("^Rollout "))
    assert tab.locator("pre.text").first.inner_text() == best["prompt"]
    tab.go_back()
    expect(tab.locator("#total")).to_have_text(str(len(want)))
    tab.fill("input[name=first]", "many")
    tab.click("form.filter button")
    expect(tab.locator(".problem")).to_contain_text("is not a usable number")
    tab.goto(f"{site}/rollouts?task=no-such-task")
    assert "No rollout matches" in tab.locator("main").inner_text()
    assert not tab.problems


def test_pages_of_rollouts_hold_each_once(site, tab):
    seen: list[str] = []
    tab.goto(f"{site}/rollouts")
    while True:
        seen += tab.locator("tr[data-row] td:first-child").all_inner_texts()
        if not tab.locator("a[rel=next]").count():
            break
        tab.click("a[rel=next]")
        expect(tab.locator("tr[data-row] td:first-child").first).not_to_have_text(seen[-50])
    assert seen == [f"{s}:{r}" for s in reversed(range(6)) for r in range(60)]


def test_one_rollout_whole(site, run, tab):
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "rollouts/step-000004.parquet").to_pylist()
    row = next(i for i, r in enumerate(rows) if any(r["log_ratios"]))
    r = rows[row]
    tab.goto(f"{site}/rollouts/4/{row}")
    assert tab.locator(".t").count() == len(r["response_ids"])
    text = "".join(tab.locator(".t").all_text_contents())
    assert text.removesuffix("<eos>") == r["response"]
    title = tab.locator(".t").first.get_attribute("title")
    assert title.startswith(f"p {2.718281828 ** r['logps'][0]:.3g}, ratio {2.718281828 ** r['log_ratios'][0]:.4f}")
    facts = tab.locator(".facts").inner_text()
    assert f"{r['value']:.1%}" in facts
    assert f"{r['advantage']:+.3f}" in facts
    assert ("not clipped" in facts) == (r["clipped"] == 0)
    assert json.loads(r["evidence"])["gold"] in tab.locator("table.evidence").last.inner_text()
    assert json.loads(r["task"])["columns"]["answer"] in tab.locator("table.evidence").first.inner_text()
    before = tab.locator(".t").first.evaluate("e => getComputedStyle(e).backgroundColor")
    tab.locator("input[value=r]").check()
    expect(tab.locator(".tokens.by-r")).to_have_count(1)
    tab.locator("input[value=n]").check()
    assert before != "rgba(0, 0, 0, 0)"
    expect(tab.locator(".t").first).to_have_css("background-color", "rgba(0, 0, 0, 0)")
    tab.goto(f"{site}/rollouts/4/999")
    assert "has no rollout 999" in tab.locator("main").inner_text()


def test_by_keyboard_alone(site, tab):
    tab.goto(site)
    tab.keyboard.press("r")
    tab.wait_for_url("**/rollouts")
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    expect(tab.locator("tr.marked td").first).to_have_text("5:1")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/rollouts/5/1")
    tab.keyboard.press("j")
    tab.wait_for_url("**/rollouts/5/2")
    tab.keyboard.press("k")
    tab.wait_for_url("**/rollouts/5/1")
    tab.keyboard.press("h")
    tab.wait_for_url("**/health")
    tab.keyboard.press("?")
    expect(tab.locator("dialog#keys")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("dialog#keys")).to_be_hidden()
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.keyboard.press("t")
    expect(tab.locator("body")).not_to_have_css("background-color", dark)
    tab.keyboard.press("r")
    tab.wait_for_url("**/rollouts")
    tab.keyboard.press("/")
    expect(tab.locator("#find")).to_be_focused()


@pytest.mark.parametrize("page", ["", "rollouts", "rollouts/3/1", "critic", "health"])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_on_a_phone_nothing_is_wider_than_the_screen(site, browser, page, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(f"{site}/{page}")
    tab.evaluate(SCROLL)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    context.close()


def test_a_page_lives_while_the_run_trains(serve, tab, tmp_path):
    out = tmp_path / "live"
    keys = {
        "policy.model": "tiny:hidden=32,layers=2,heads=2", "critic.model": "tiny:hidden=32,layers=1,heads=2", "task.train": "chain:steps=1-2",
        "rollout.prompts": "32", "rollout.max_tokens": "12", "training.steps": "100000", "evaluation.n": "16", "evaluation.every": "10",
        "run.checkpoint_every": "50", "run.threads": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "sppo.cli.main",
        "train",
        "--quiet",
        "--out",
        str(out),
        *(x for k, v in keys.items() for x in (f"--{k}", v)),
    ]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").exists():
            assert training.poll() is None
            time.sleep(0.1)
        tab.goto(serve(out))
        first = int(tab.locator(".tile.is-step .value").inner_text().replace(",", ""))
        assert tab.locator(".dot").count() == 1
        assert "left" in tab.locator(".tile.is-step").inner_text()
        until(tab, f"parseInt(document.querySelector('.is-step .value').textContent.replace(',', '')) > {first + 3}")
        drawn(tab)
        before = tab.evaluate("figures.find(f => f.id === 'reward').traces.at(-1).x.length")
        until(tab, f"figures.find(f => f.id === 'reward').traces.at(-1).x.length > {before}")
        training.send_signal(signal.SIGINT)
        training.wait(60)
        until(
            tab,
            "!document.querySelector('.dot') && document.querySelector('.sentence').textContent.includes('interrupted')",
        )
    finally:
        training.kill()
        training.wait()
    assert not tab.problems


def test_several_runs_are_overlaid(run, serve, tab, tmp_path_factory):
    other = made_run(tmp_path_factory.mktemp("browser") / "second", **{"seed": 2, "training.steps": 3})
    tab.goto(serve(run, other))
    assert tab.locator(".run-summary").count() == 2
    drawn(tab)
    names = tab.evaluate("figures.find(f => f.id === 'reward').traces.map(t => t.name)")
    assert names == ["first", "second"]
    tab.keyboard.press("r")
    tab.wait_for_url("**/rollouts")
    tab.select_option("select[name=run]", "1")
    tab.wait_for_url("**/rollouts?run=1")
    expect(tab.locator("#total")).to_have_text("180")
    tab.locator("tr[data-row] a").first.click()
    expect(tab.locator("h1")).to_have_text(re.compile("^Rollout 2:0"))


def test_an_alert_leads_to_its_own_runs_rollouts(run, serve, tab, tmp_path):
    fooled = tmp_path / "fooled"
    shutil.copytree(run, fooled)
    alert = {
        "step": 2, "monitor": "reference", "what": "paid whatever", "since": 1, "why": "3 of 16", "advice": "read them", "action": "warn",
        "evidence": ["2:7", "1:3"],
    }  # fmt: skip
    (fooled / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    site = serve(run, fooled).rstrip("/")
    tab.goto(site)
    assert tab.locator(".doubt").count() == 1
    assert "raised at step 2, probably since step 1" in tab.locator(".alert").inner_text()
    tab.locator(".alert a").first.click()
    tab.wait_for_url("**/rollouts/2/7?run=1")
    expect(tab.locator("main")).to_contain_text("An alert points at this response")
    tab.goto(f"{site}/rollouts/2/7")
    assert "An alert points" not in tab.locator("main").inner_text()
    tab.goto(f"{site}/health?run=1")
    assert tab.locator(".alert").count() == 1
    page, card = write(open_runs([str(fooled)])[0], tmp_path / "report")
    tab.goto(page.as_uri())
    tab.locator(".alert a").first.click()
    expect(tab.locator("#r-2-7[open] .t").first).to_be_visible()
    assert "Do not believe" in card.read_text()


def test_a_run_that_goes_away_takes_nothing_with_it(run, serve, tab, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(run, gone)
    site = serve(run, gone).rstrip("/")
    tab.goto(site)
    shutil.rmtree(gone)
    for page in ("", "rollouts?run=1", "critic?run=1", "health?run=1", "rollouts/1/1", "rollouts"):
        answer = tab.goto(f"{site}/{page}")
        assert answer.status == 200, page
    tab.goto(site)
    assert "directory is gone" in tab.locator("main").inner_text()


def test_the_report_needs_no_network(run, browser, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    tab = context.new_page()
    problems, asked = [], []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(Path(said["report"]).as_uri())
    assert "It finished after 6 steps" in tab.locator(".sentence").inner_text()
    drawn(tab, 14)
    tab.locator("details.one summary").first.click()
    expect(tab.locator("details.one[open] .t").first).to_be_visible()
    tab.keyboard.press("c")
    tab.wait_for_url("**#critic")
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert not problems
    context.close()
    card = Path(said["card"]).read_text()
    assert "held-out accuracy" in card
    assert "sppo audit verify" in card


def test_from_elsewhere_a_token_is_asked_for(run, serve, browser):
    address = serve(run, options=("--host", "0.0.0.0"))
    base, token = address.split("?token=")
    port = base.rstrip("/").rpartition(":")[2]
    here = f"http://127.0.0.1:{port}/"
    context = browser.new_context()
    tab = context.new_page()
    assert tab.goto(here).status == 401
    assert "needs the token" in tab.inner_text("body")
    assert tab.goto(f"{here}?token=wrong").status == 401
    assert tab.goto(f"{here}rollouts?token={token}&first=2").status == 200
    assert tab.url == f"{here}rollouts?first=2"
    assert tab.goto(here).status == 200
    assert tab.evaluate("document.cookie") == ""
    context.close()


def test_on_loopback_another_name_is_refused(site):
    """DNS rebinding: a page of elsewhere that has its name point here gets nothing."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(site, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    refused.value.close()


def test_what_cannot_be_served_is_said(tmp_path, run, capsys):
    assert main(["view", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["view", str(run), "--port", "1", "--host", "203.0.113.7"]) == 2
    assert "choose another --port or --host" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["report", str(run), "--out", str(blocked / "x")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert os.path.exists(run / "recipe.toml")
