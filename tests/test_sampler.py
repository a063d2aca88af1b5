"""The rows of each step: every row once per epoch, the same after a resume and on more processes of one total batch."""

import pytest

from slzo.data.sampler import StepBatchSampler, divide_by_tokens

pytestmark = pytest.mark.fast


def sampler(done=0, **options):
    return StepBatchSampler(
        **{"rows": range(50), "num_tokens": [1] * 50, "batch_size": 8, "seed": 3, **options}, steps_done=lambda: done
    )


def test_every_row_comes_once_per_epoch():
    drawn = list(sampler())
    assert sorted(row for batch in drawn for row in batch) == list(range(50))
    assert len(drawn) == 7


@pytest.mark.parametrize("done", [0, 3, 7, 10])
def test_a_pass_goes_on_from_the_present_step_across_epochs(done):
    whole = [batch for step in (0, 7, 14) for batch in sampler(step)]
    resumed = sampler(done)
    assert list(resumed) == whole[done : done + 7]
    assert len(resumed) == 7
    assert [resumed.rows_of_step(step) for step in (12, 0, 20)] == [whole[step] for step in (12, 0, 20)]


def test_each_pass_asks_for_the_present_step():
    done = 0
    one = StepBatchSampler(range(50), [1] * 50, 8, 3, steps_done=lambda: done)
    first = list(one)
    assert list(one) == first
    done = 2
    assert list(one)[:5] == first[2:]


def test_seed_and_epoch_change_the_order():
    first = list(sampler())
    assert list(sampler(7)) != first
    assert list(sampler(seed=4)) != first


def test_processes_share_the_rows_of_one_large_batch():
    whole = sampler()
    parts = [sampler(batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_processes_have_about_as_many_tokens():
    num_tokens = [5 + (7 * row) % 50 for row in range(50)]
    whole = sampler(batch_size=16)
    parts = [list(sampler(rank=rank, world_size=2, num_tokens=num_tokens)) for rank in (0, 1)]
    for batch, *own in zip(whole, *parts, strict=True):
        assert sorted(own[0] + own[1]) == sorted(batch)
        assert all(rows == [row for row in batch if row in rows] for rows in own)  # in the order of the batch
    sums = [[sum(num_tokens[row] for row in rows) for rows in own[:-1]] for own in parts]
    assert all(max(pair) <= 1.05 * min(pair) for pair in zip(*sums, strict=True))


def test_each_part_has_rows_and_none_has_too_many():
    assert divide_by_tokens([3, 1, 2], [1, 9, 1, 1], 2) == [[1], [3, 2]]
    assert [len(part) for part in divide_by_tokens(list(range(9)), [100] + [1] * 8, 3)] == [3, 3, 3]
    for number in range(4, 12):
        assert all(divide_by_tokens(list(range(number)), list(range(number)), 4))


def test_a_rest_too_small_for_every_process_is_left_out():
    for rank in (0, 1):
        part = sampler(rows=range(33), num_tokens=[1] * 33, rank=rank, world_size=2)
        assert len(list(part)) == len(part) == 2
