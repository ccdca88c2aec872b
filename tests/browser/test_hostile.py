"""What a model writes is text, whatever it holds: markup, scripts, control characters, right-to-left overrides, a line of a megabyte."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sppo.report.pages import script_json, shortened, visible
from sppo.report.reader import open_runs
from sppo.report.single import write

ATTACKS = {
    "script": "<script>window.hacked = 1; alert(1)</script>",
    "image": '"><img src=x onerror="window.hacked = 1">',
    "end": "</pre></table></script><svg onload=window.hacked=1>",
    "template": "{{ 7 * 7 }} {% for x in y %} ${7*7} {{ ''.__class__ }}",
    "control": "a\x1b[31mred\x07\x00\x9b\x7fz\r\n\tindented",
    "bidi": "user = \u202enimda\u202c \u2066x\u2069 \u200b\u200e end",
    "rtl": "שלום עולם 2+2=4 مرحبا",
    "surrogates": "bad: \ufffd\ufffe fine",
    "handler": "javascript:window.hacked=1//' onmouseover='window.hacked=1",
    "long": "9" * 1_000_000,
    "lines": "\n" * 5000 + "end",
}


@pytest.fixture(scope="module")
def hostile(run, tmp_path_factory) -> Path:
    """A real run whose second step was written by an enemy, with a tokenizer that can say anything."""
    out = tmp_path_factory.mktemp("hostile") / "<b onmouseover=alert(1)>run"
    shutil.copytree(run, out)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for folder in (out / "checkpoints").glob("*/policy"):
        tokenizer.save(str(folder / "tokenizer.json"))
    path = out / "rollouts/step-000001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()[: len(ATTACKS)]
    for row, text in zip(rows, ATTACKS.values(), strict=True):
        ids = tokenizer.encode(text[:20_000], add_special_tokens=False).ids
        row |= {
            "prompt": text, "prompt_ids": ids, "response": text, "response_ids": ids,
            "logps": [-0.5] * len(ids), "log_ratios": [0.1] * len(ids), "tokens": len(ids),
            "task_id": text[:300], "evidence": json.dumps({text[:300]: text, "nested": [{"x": text[:300]}], "steps": [{"text": text[:99]}]}),
        }  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    alert = {
        "step": 1, "monitor": "x", "what": ATTACKS["script"], "since": 1, "why": ATTACKS["image"], "advice": ATTACKS["bidi"], "action": "warn",
        "evidence": ['1:0"><script>window.hacked=1</script>'],
    }  # fmt: skip
    (out / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    return out


@pytest.fixture(scope="module")
def site(hostile, serve) -> str:
    return serve(hostile).rstrip("/")


def harmless(tab) -> None:
    assert tab.evaluate("window.hacked") is None
    assert (
        tab.locator("main script, main img, main svg:not(.main-svg):not(.main-svg *), main b[onmouseover]").count() == 0
    )
    assert not [p for p in tab.problems if "dialog" in p]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_rollout_is_shown_as_text(site, tab, name):
    row = list(ATTACKS).index(name)
    tab.goto(f"{site}/rollouts/1/{row}", timeout=20_000)
    assert tab.locator("h1").inner_text().startswith(f"Rollout 1:{row}")
    prompt = tab.locator("pre.text").first.text_content()
    assert prompt == visible(ATTACKS[name][:20_000])
    tokens = "".join(tab.locator(".t").all_text_contents())
    by_character = "".join(
        visible(c) for c in ATTACKS[name][:1000].replace("\ufffe", "\ufffd")
    )  # as the tokenizer decodes it
    assert tokens.replace("⏎\n", "\n").startswith(by_character)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    harmless(tab)


def test_lists_and_figures_bear_it(site, tab):
    for page in ("", "rollouts?first=1&last=1", "critic", "health"):
        tab.goto(f"{site}/{page}")
        tab.wait_for_timeout(300)
        harmless(tab)
    tab.goto(f"{site}/rollouts?first=1&last=1")
    assert tab.locator("tr[data-row]").count() == len(ATTACKS)
    assert shortened(ATTACKS["script"], 110) in tab.locator("main").inner_text()
    tab.goto(site)
    assert ATTACKS["script"] in tab.locator(".alert").inner_text()


def test_an_address_is_text_too(site, tab):
    for query in (
        "task=%3Cscript%3Ewindow.hacked=1%3C/script%3E",
        "first=%22%3E%3Cimg%20src=x%20onerror=window.hacked=1%3E",
        "run=99999&start=-5",
        "order=x",
    ):
        tab.goto(f"{site}/rollouts?{query}")
        assert tab.locator("h1").inner_text() == "Rollouts"
        harmless(tab)


def test_the_text_itself_is_one_click_away(site):
    row = list(ATTACKS).index("long")
    with urllib.request.urlopen(f"{site}/rollouts/1/{row}/text") as answer:
        assert answer.read().decode() == ATTACKS["long"]
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_report_bears_it(hostile, tab, tmp_path):
    page, card = write(open_runs([str(hostile)])[0], tmp_path)
    tab.goto(page.as_uri(), timeout=30_000)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    tab.wait_for_timeout(300)
    harmless(tab)
    assert "<script" not in card.read_text().replace("`", "")


def test_visible_text():
    assert visible("a\x1bb\x7f\x00") == "a␛b␡␀"
    assert visible("x\u202ey\u200b") == "x⟨U+202E⟩y⟨U+200B⟩"
    assert visible("one\r\ntwo\tthree") == "one\ntwo\tthree"
    assert visible("lone \ud800") == "lone ?"
    assert "</script" not in script_json({"x": "</script><!--\u2028"})
    assert json.loads(str(script_json({"x": "</script>", "y": float("nan")}))) == {"x": "</script>", "y": None}
