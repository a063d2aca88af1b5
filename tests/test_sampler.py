"""The rows of each step: every row once per epoch, the same after a resume and on more processes of one total batch."""

import pytest

from slzo.data.sampler import StepBatchSampler

pytestmark = pytest.mark.fast

CLASSES = {"classes": [0] * 40 + [1] * 7 + [2] * 3}


def sampler(done=0, **options):
    return StepBatchSampler(**{"num_rows": 50, "batch_size": 8, "seed": 3, **options}, steps_done=lambda: done)


def test_every_row_comes_once_per_epoch():
    drawn = list(sampler())
    assert sorted(row for batch in drawn for row in batch) == list(range(50))
    assert len(drawn) == 7


@pytest.mark.parametrize("options", [{}, CLASSES])
@pytest.mark.parametrize("done", [0, 3, 7, 10])
def test_a_pass_goes_on_from_the_present_step_across_epochs(options, done):
    whole = [batch for step in (0, 7, 14) for batch in sampler(step, **options)]
    resumed = sampler(done, **options)
    assert list(resumed) == whole[done : done + 7]
    assert len(resumed) == 7
    assert [resumed.rows_of_step(step) for step in (12, 0, 20)] == [whole[step] for step in (12, 0, 20)]


def test_each_pass_asks_for_the_present_step():
    done = 0
    one = StepBatchSampler(50, 8, 3, steps_done=lambda: done)
    first = list(one)
    assert list(one) == first
    done = 2
    assert list(one)[:5] == first[2:]


def test_seed_and_epoch_change_the_order():
    first = list(sampler())
    assert list(sampler(7)) != first
    assert list(sampler(seed=4)) != first


@pytest.mark.parametrize("options", [{}, CLASSES])
def test_processes_share_the_rows_of_one_large_batch(options):
    whole = sampler(**options)
    parts = [sampler(batch_size=4, rank=rank, world_size=2, **options) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_a_rest_too_small_for_every_process_is_left_out():
    for rank in (0, 1):
        part = sampler(num_rows=33, rank=rank, world_size=2)
        assert len(list(part)) == len(part) == 2
