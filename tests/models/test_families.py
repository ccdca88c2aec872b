"""`make families` for one model of each kind: trained by the real loop, saved, loaded in its own class, resumed."""

from __future__ import annotations

import pytest

from ..test_benchmarks import BENCHMARKS, script


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 2, 3", "Gemma 3", "Mamba 2", "Falcon-H1"])
def test_a_family_trains_saves_loads_and_resumes(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    row = script("families").check(name, tmp_path)
    assert row["gap"] < 1e-4
    assert row["head"] in ("direct", "scaled", "capped")


@pytest.mark.slow
def test_what_fails_is_named(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    families = script("families")
    kind, sizes = families.TABLE["Llama 2, 3"]
    monkeypatch.setitem(families.TABLE, "none", (kind, sizes | {"vocab_size": 9}))  # a tokenizer of another model
    assert families.report(["none"])["failed"] == ["none"]
    assert "FAILED" in capsys.readouterr().out


def test_the_page_has_a_row_for_every_family():
    page = (BENCHMARKS.parent / "docs" / "families.md").read_text()
    assert [name for name in script("architectures").TABLE if f"| {name} |" not in page] == []
