import pytest

from slzo.data.sampler import EpochBatchSampler


def batches(**options):
    done = options.pop("done", 0)
    return list(EpochBatchSampler(**{"num_rows": 50, "batch_size": 8, "seed": 3, **options}, batches_done=lambda: done))


@pytest.mark.parametrize("lengths", [None, [i % 7 for i in range(50)]])
def test_every_row_comes_once_per_epoch(lengths):
    drawn = batches(lengths=lengths)
    assert sorted(row for batch in drawn for row in batch) == list(range(50))
    assert len(drawn) == 7


@pytest.mark.parametrize("lengths", [None, [i % 7 for i in range(50)]])
def test_a_resumed_epoch_goes_on_where_it_stopped(lengths):
    assert batches(lengths=lengths, done=3) == batches(lengths=lengths)[3:]
    assert batches(lengths=lengths, done=7 + 3) == batches(lengths=lengths, done=7)[3:]


def test_a_pass_begins_where_the_run_stands():
    done = 0
    sampler = EpochBatchSampler(50, 8, 3, batches_done=lambda: done)
    first = list(sampler)
    assert list(sampler) == first
    done = 7
    assert len(list(sampler)) == len(sampler) == 7
    done = 13
    assert len(list(sampler)) == 1


def test_seed_and_epoch_change_the_order():
    first = batches()
    assert batches(done=7) != first
    assert batches(seed=4) != first
    assert batches() == first


@pytest.mark.parametrize("lengths", [None, [i % 7 for i in range(50)]])
def test_processes_share_the_rows_of_one_large_batch(lengths):
    whole = batches(batch_size=8, lengths=lengths)
    parts = [batches(batch_size=4, rank=rank, world_size=2, lengths=lengths) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_a_rest_too_small_for_every_process_is_left_out():
    drawn = [batches(num_rows=33, batch_size=8, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(part) for part in drawn] == [2, 2]


def test_buckets_hold_rows_of_similar_length():
    lengths = [(i * 37) % 100 for i in range(400)]

    def spread(drawn):
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in drawn) / len(drawn)

    plain = EpochBatchSampler(400, 8, 0)
    bucketed = EpochBatchSampler(400, 8, 0, lengths=lengths)
    assert spread(bucketed) < spread(plain) / 3
    assert [sum(lengths[i] for i in b) for b in bucketed] != sorted(sum(lengths[i] for i in b) for b in bucketed)
