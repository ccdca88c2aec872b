"""Who gets a slot when, who moves up, and that none of it shows in what is sampled."""

from __future__ import annotations

import random

import pytest
import torch

from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.scheduler import PREFILL, REFILL, Scheduler
from sppo.rollout.sequences import Forced

from .test_local import plain

VOCABULARY = 50


class Columns:
    """Slots that hold token ids in place of keys and values."""

    def __init__(self, count: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.moves: list[tuple[int, int]] = []

    def copy(self, source, targets, columns):
        for target in targets:
            self.held[target] = self.held[source][:columns]
            self.moves.append((source, target))


def a_scheduler(prompts, lengths, count):
    """Of responses that are known beforehand, each so long."""
    responses = [[(7 * i + t) % VOCABULARY for t in range(n)] for i, n in enumerate(lengths)]
    return Scheduler(prompts, Forced(responses), Columns(count), count), responses


def step(scheduler):
    """One pass: what is read is written into its slots, and every scheduled row gets its token. Returns the prompts that were admitted."""
    admitted, slots = scheduler.schedule(), scheduler.slots
    read = [key for key, same in admitted.items() for _ in same]
    for b, key in enumerate(read):
        slots.held[scheduler.first + b] = list(key)
    if not admitted:
        for b, i in enumerate(scheduler.live):
            slots.held[b].append(scheduler.responses.ids[i][-1])
    for b, i in enumerate(scheduler.live):  # the newest token of those that are not scheduled now was never computed
        whole = [*scheduler.keys[i], *scheduler.responses.ids[i]]
        assert slots.held[b] == whole[: len(whole) - (b < scheduler.first)]
    scheduler.take(torch.zeros(len(scheduler.rows), VOCABULARY))
    return read


# -- admission -------------------------------------------------------------------------------------------------------


def test_the_shortest_prompts_are_admitted_first_and_equal_ones_together():
    prompts = [[3, 3, 3], [2, 2], [1], [3, 3, 3], [1], [2, 4], [2, 2]]
    scheduler, _ = a_scheduler(prompts, [9] * 7, 7)
    assert step(scheduler) == [(1,), (1,), (2, 2), (2, 2), (2, 4), (3, 3, 3), (3, 3, 3)]
    assert sorted(scheduler.live) == list(range(7))


def test_no_more_are_admitted_than_there_are_slots():
    prompts = [[1], [2, 2], [3, 3, 3], [1]]
    scheduler, _ = a_scheduler(prompts, [2, 5, 5, 2], 3)
    assert step(scheduler) == [(1,), (1,), (2, 2)]
    assert not scheduler.goes_on((2, 2))
    assert scheduler.goes_on((3, 3, 3))
    assert step(scheduler) == []  # all slots are taken; the two short ones end here
    assert scheduler.finished == 2
    assert step(scheduler) == [(3, 3, 3)]


def test_waiting_prompts_wait_until_a_sixteenth_of_the_slots_is_free():
    count = 2 * REFILL
    lengths = [2] + [3] + [9] * (count - 2) + [9, 9]
    scheduler, _ = a_scheduler([[1]] * count + [[1, 1]] * 2, lengths, count)
    assert len(step(scheduler)) == count
    assert step(scheduler) == []  # the first one ends: one slot of 32 is not worth a pass
    assert step(scheduler) == []  # the second one ends
    assert step(scheduler) == [(1, 1), (1, 1)]


def test_a_pass_reads_about_as_many_prompt_tokens_as_fit_and_at_least_one_prompt():
    long = [[k] * (PREFILL // 2) for k in (1, 2, 3)]
    scheduler, _ = a_scheduler([*long, long[0]], [9] * 4, 4)
    assert [key[0] for key in step(scheduler)] == [1, 1, 2]  # a prompt that is sampled twice is read once
    assert [key[0] for key in step(scheduler)] == [3]
    scheduler, _ = a_scheduler([[1] * (PREFILL + 1), [2] * (PREFILL + 1)], [9] * 2, 2)
    assert [key[0] for key in step(scheduler)] == [1]


# -- compaction ------------------------------------------------------------------------------------------------------


def test_the_last_sequences_move_into_the_slots_of_finished_ones():
    scheduler, _ = a_scheduler([[1]] * 5, [2, 9, 2, 9, 9], 5)
    step(scheduler)
    assert scheduler.live == [4, 3, 2, 1, 0]  # those that waited, from the end
    step(scheduler)  # the responses 0 and 2 end, in slots 4 and 2
    assert scheduler.live == [4, 3, 1]
    assert scheduler.slots.moves == [(3, 2)]


def test_nothing_moves_where_the_last_ones_finish():
    scheduler, _ = a_scheduler([[1]] * 4, [2, 2, 9, 9], 4)
    step(scheduler)
    step(scheduler)
    assert scheduler.live == [3, 2]
    assert scheduler.slots.moves == []


@pytest.mark.parametrize("seed", range(40))
def test_a_slot_always_holds_the_tokens_of_its_own_sequence(seed):
    """Whatever the prompts, the lengths and the number of slots (`step` looks at every slot before every token)."""
    rng = random.Random(seed)
    number = rng.randrange(1, 60)
    prompts = [[rng.randrange(3)] * rng.randrange(1, 4) for _ in range(number)]
    scheduler, responses = a_scheduler(
        prompts, [rng.randrange(1, 12) for _ in range(number)], rng.randrange(1, number + 1)
    )
    while scheduler.unfinished:
        step(scheduler)
        assert len(scheduler.live) == len(set(scheduler.live)) <= scheduler.count
    assert scheduler.responses.ids == responses
    assert scheduler.finished == number


# -- in the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("compiled", [True, False])
def test_in_whatever_order_responses_finish_they_are_what_the_plain_loop_draws(policy, seed, compiled):
    rng = random.Random(seed)
    prompts = [[1 + rng.randrange(20) for _ in range(rng.randrange(1, 9))] for _ in range(9)]
    prompts = [rng.choice(prompts) for _ in range(30)]  # some of them several times
    limits, seeds = [rng.randrange(1, 24) for _ in prompts], [rng.randrange(2**32) for _ in prompts]
    engine = LocalEngine(policy)
    engine.compiled = engine.compiled and compiled
    mine = engine.generate(prompts, seeds, Sampling(24, 1.0, rng.randrange(1, 31)), limits=limits)
    theirs = plain(policy).generate(prompts, seeds, Sampling(24), limits=limits)
    assert [(s.ids, s.finish) for s in mine] == [(s.ids, s.finish) for s in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=2e-5)
