"""The list of mutants is sound: each still applies to the code as it is, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutants import FAST, MUTANTS

ROOT = Path(__file__).parents[2]
COVERED = (
    "experimental/predicted.py", "experimental/search.py", "learning/batch.py", "learning/credit/hybrid.py",
    "learning/credit/optimal_baseline.py", "learning/credit/prompt.py", "learning/credit/protocol.py",
    "learning/credit/samples.py", "learning/credit/token.py", "learning/credit/trained.py", "learning/earned.py",
    "learning/learner.py", "learning/optimizer.py", "rollout/canary.py", "rollout/scheduler.py", "run/accuracy.py",
    "run/curriculum.py", "run/sample.py", "tasks/epochs.py", "types.py",
)  # fmt: skip


def test_there_are_enough_with_names_of_their_own_for_every_module():
    assert len(MUTANTS) >= 60
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    objective = {f"objective/{p.name}" for p in (ROOT / "src/sppo/objective").glob("*.py")} - {"objective/__init__.py"}
    assert {m.file for m in MUTANTS} >= objective | set(COVERED)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_applies_to_the_code_as_it_is(mutant):
    text = (ROOT / "src/sppo" / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"found {text.count(mutant.old)} times in {mutant.file}: {mutant.old!r}"
    assert mutant.old != mutant.new
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    for name in (*mutant.tests, *FAST):
        assert (ROOT / name.partition("::")[0]).exists(), name
