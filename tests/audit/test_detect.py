"""The sequential tests, by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sppo.audit.detect import Cusum, Level, Rate


def test_cusum_by_hand():
    test = Cusum(0.1, 0.5, level=3.0)
    up, down = math.log(5), math.log(0.5 / 0.9)
    assert not test.feed(0, 0, 4)
    assert test.sum == 0.0
    assert not test.feed(1, 2, 4)
    assert test.sum == pytest.approx(2 * up + 2 * down)
    assert test.since == 1
    assert test.feed(2, 3, 4)
    assert test.sum == pytest.approx(5 * up + 3 * down)
    assert test.since == 1


def test_cusum_is_quiet_where_nothing_changes_and_soon_where_it_does():
    """Wald: a level of 8 is crossed by chance about once in e^8 = 3,000 observations or more; a real rise in a few steps."""
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(200):
        test = Cusum(0.02, 0.2)
        false += any(test.feed(s, int(rng.binomial(10, 0.02)), 10) for s in range(100))
    assert false <= 8  # of 200 runs of 1,000 observations
    delays = []
    for _ in range(100):
        test = Cusum(0.02, 0.2)
        delays.append(next(s for s in range(100) if test.feed(s, int(rng.binomial(10, 0.25)), 10)))
    assert np.mean(delays) < 6


def test_a_rate_learns_what_is_usual():
    rate = Rate(0.2, learn=5)
    assert not any(rate.feed(s, 30, 100) for s in range(5))
    seen = 151 / 502
    assert rate.usual == pytest.approx(seen + math.sqrt(seen * (1 - seen) / 500))
    assert not any(rate.feed(s, 30, 100) for s in range(5, 50))
    assert any(rate.feed(s, 55, 100) for s in range(50, 55))
    assert 48 <= rate.since <= 52


def test_a_rate_that_is_bad_from_the_beginning_is_not_taken_for_usual():
    rate = Rate(0.15, learn=5, most=0.1)
    assert any(rate.feed(s, 40, 100) for s in range(20))


def test_states_come_back():
    rate, level = Rate(0.2, learn=2), Level(learn=2)
    for s in range(5):
        rate.feed(s, s, 10)
        level.feed(float(s))
    again, level2 = Rate(0.2, learn=2), Level(learn=2)
    again.load(rate.state_dict())
    level2.load(level.state_dict())
    assert [again.feed(9, 6, 10), again.state_dict()] == [rate.feed(9, 6, 10), rate.state_dict()]
    assert (level2.feed(9.0), level2.now) == (level.feed(9.0), level.now)


def test_impossible_rates_are_refused():
    with pytest.raises(ValueError, match="usual < bad"):
        Cusum(0.3, 0.2)
