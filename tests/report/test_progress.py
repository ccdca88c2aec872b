"""What a user sees of a step that takes long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sppo.report import progress
from sppo.report.progress import ProgressDisplay


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def shown(monkeypatch):
    """A display of plain lines, its clock, and its lines so far."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    display = ProgressDisplay()
    display.console, display.live = Console(file=io.StringIO(), width=200), False
    return display, clock, lambda: display.console.file.getvalue().splitlines()


STEP = {"reward/mean": 0.5, "rollout/mean_tokens": 10, "tokens_per_second": 100.0}


def test_a_long_step_says_now_and_then_how_far_it_is(shown):
    display, clock, lines = shown
    display.stage("train", 5)
    for done in range(0, 101, 10):
        display.within("sampling", done, 100)
        clock.now += 10
    assert lines() == ["train 0/5  sampling 60 of 100, about 0:40 left"]


def test_the_time_left_counts_the_parts_to_come_by_the_last_step(shown):
    display, clock, _ = shown
    display.stage("train", 5)
    for what, seconds in (("sampling", 40), ("judging", 10), ("updating", 20)):
        display.within(what, 0, 8)
        assert "left" not in display.whereabouts()  # the first time nobody knows
        clock.now += seconds
    display.step(1, STEP)
    display.within("sampling", 0, 8)
    assert display.whereabouts() == "sampling 0 of 8, about 1:10 left"
    clock.now += 10
    display.within("sampling", 4, 8)
    assert display.whereabouts() == "sampling 4 of 8, about 0:40 left"
    display.within("judging", 0, 8)
    assert display.whereabouts() == "judging 8, about 0:30 left"


def test_who_stops_a_run_is_told_what_it_waits_for(shown):
    display, clock, lines = shown
    display.stage("train", 20, 11)
    display.within("updating", 0, 8)
    clock.now += 12
    display.within("updating", 3, 8)
    display.end_soon()
    assert (
        lines()[-1]
        == "warning: finishing step 12: updating 3 of 8, about 0:20 left, then saves (press Ctrl-C again to stop at once)"
    )
    clock.now += 12
    display.within("updating", 6, 8)
    assert lines()[-1] == "train 11/20  updating 6 of 8, about 0:08 left"


def test_a_terminal_that_is_gone_is_written_to_no_more(shown):
    display, _, lines = shown
    display.stage("train", 5)
    terminal = display.console.file
    terminal.close()  # writing to it would raise from now on
    display.hang_up()
    display.within("sampling", 1, 2)
    display.note("warning: something")
    display.step(1, STEP)
    display.end_soon()
    assert lines()  # they went where nobody looks


def test_on_a_terminal_it_stands_beside_the_bar():
    display = ProgressDisplay()
    display.console, display.live = Console(file=io.StringIO(), width=120, force_terminal=True), True
    display.stage("train", 5)
    display.within("sampling", 1, 2)
    display.stop()
    assert "sampling 1 of 2" in display.console.file.getvalue()
