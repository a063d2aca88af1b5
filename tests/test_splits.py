"""Training, dev and test rows: drawn by seed, disjoint, and divided where there are few."""

from collections import Counter
from itertools import product

import pytest

from slzo.data.splits import check_shared_ids, divide, draw_splits, least_rows, split_off_test
from slzo.datamodule import TaskDataModule
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError

pytestmark = pytest.mark.fast

# made with sha256sum of "1:r0", "1:r1", ... and "test:id:t0", ...: the lowest digests come first
TRAIN_OF_SEED_1 = ["r6", "r11", "r15", "r10"]
DEV_OF_SEED_1 = ["r5", "r19"]
TEST = ["t1", "t3", "t6"]
CHOICES = [((" a", " b"), "a:1"), ((" a", " c"), "b:2")]


def pool(name, size):
    return [Example(f"{name}{i}", f"{name} prompt {i}", (" a", " b"), (0,)) for i in range(size)]


def ids(examples):
    return [example.id for example in examples]


def draw(train, test, num_train=1, num_dev=1, num_test=1, seed=0):
    return draw_splits(train, test, num_train=num_train, num_dev=num_dev, num_test=num_test, seed=seed)


def test_the_draw_is_the_documented_one():
    splits = draw(pool("r", 20), pool("t", 9), 4, 2, 3, seed=1)
    assert list(map(ids, (splits.train, splits.dev, splits.test))) == [TRAIN_OF_SEED_1, DEV_OF_SEED_1, TEST]
    assert splits.notes == ()


def test_the_seed_changes_train_and_dev_and_the_order_of_the_file_nothing():
    train, test = pool("r", 100), pool("t", 60)
    first, second = (draw(train, test, 50, 20, 30, seed) for seed in (1, 2))
    assert first.train != second.train
    assert first.dev != second.dev
    assert first.test == second.test
    turned = draw(train[::-1], test[::-1], 50, 20, 30, seed=1)
    assert (turned.train, turned.dev, turned.test) == (first.train, first.dev, first.test[::-1])
    more_dev = draw(train, test, 50, 40, 60, seed=1)
    assert more_dev.train == first.train
    assert more_dev.dev[:20] == first.dev


def test_one_id_with_other_candidates_in_another_split_is_refused():
    one, other = (Example("7", "A film", candidates, (0,), place=place) for candidates, place in CHOICES)
    check_shared_ids("data.x", "change it", [one], [one])
    with pytest.raises(SlzoError, match=r"^data\.x: b:2 has id '7', as does a:1; change it$"):
        check_shared_ids("data.x", "change it", [one], [other])


def test_rows_of_a_dev_file_are_drawn_by_the_seed_too():
    train, dev = pool("r", 20), pool("d", 20)
    drawn = [
        draw_splits(train, pool("t", 9), num_train=4, num_dev=6, num_test=3, seed=seed, dev_pool=dev) for seed in (1, 2)
    ]
    assert ids(drawn[0].train) == TRAIN_OF_SEED_1
    assert len(drawn[0].dev) == 6
    assert set(ids(drawn[0].dev)) != set(ids(drawn[1].dev))


def test_no_row_is_in_two_splits():
    train, test = pool("r", 90), pool("t", 40)
    train += [
        Example(f"other{i}", f"r prompt {i}", (" a", " b"), (0,)) for i in range(10)
    ]  # prompts that are there already
    train += [Example(f"t{i}", f"new prompt {i}", (" a", " b"), (0,)) for i in range(7)]  # ids of test rows
    train += [Example(f"new{i}", f"t prompt {i}", (" a", " b"), (0,)) for i in range(5)]  # prompts of test rows
    splits = draw(train, test, 60, 30, 10)
    for key in (lambda e: e.id, lambda e: e.prompt):
        seen = Counter(key(example) for part in (splits.train, splits.dev, splits.test) for example in part)
        assert max(seen.values()) == 1
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (60, 30, 10)
    assert splits.notes == (
        "Left out 12 training rows also found in the test split.",
        "Left out 10 training rows with a repeated prompt.",
    )


def test_one_prompt_with_other_candidates_is_another_row():
    """Such as questions on one passage (ReCoRD)."""
    rows = [Example(f"r{i}", "the same passage", (f" a{i}", f" b{i}"), (0,)) for i in range(12)]
    splits = draw(rows[:9], rows[9:], 6, 3, 3)
    assert (len(splits.train), len(splits.dev), len(splits.test), splits.notes) == (6, 3, 3, ())
    train, test, notes = split_off_test(rows, None, 1)
    assert (len(train), len(test), notes) == (10, 2, ())


@pytest.mark.parametrize(
    ("size", "num_train", "num_dev", "expected"),
    [
        (1500, 1000, 500, (1000, 500)),
        (554, 1000, 500, (370, 184)),  # WSC
        (400, 1000, 100, (320, 80)),  # COPA
        (250, 1000, 100, (200, 50)),  # CB
        (192, 1000, 30, (162, 30)),
        (300, 100, 500, (100, 200)),
        (90, 100, 500, (60, 30)),
        (2, 1000, 500, (2, 0)),
        (1, 1, 500, (1, 0)),
        (10, 20, 0, (10, 0)),
    ],
)
def test_small_pools_are_divided(size, num_train, num_dev, expected):
    assert divide(size, num_train, num_dev) == expected


def test_training_never_starves():
    for size, num_train, num_dev in product(range(1, 80), (1, 5, 40, 1000), (0, 1, 30, 500)):
        train, dev = divide(size, num_train, num_dev)
        assert 1 <= train <= num_train
        assert 0 <= dev <= num_dev
        assert train + dev <= size
        assert train == num_train or (3 * dev <= size and train + dev == size)


@pytest.mark.parametrize(
    ("num_train", "num_dev", "least"), [(1000, 500, 3), (1000, 1, 3), (1, 500, 2), (1, 1, 2), (1000, 0, 1)]
)
def test_no_split_that_is_asked_for_is_empty(num_train, num_dev, least):
    assert least_rows(num_train, num_dev) == least
    for size in range(least, 60):
        train, dev = divide(size, num_train, num_dev)
        assert train >= 1
        assert dev >= min(1, num_dev)


def test_too_few_rows_are_refused():
    with pytest.raises(
        SlzoError, match=r"^data.num_dev 500: .* at least 3 rows with different prompts, and there are 2;"
    ):
        draw(pool("r", 2), pool("t", 2), 1000, 500, 2)
    assert len(draw(pool("r", 2), pool("t", 2), 5, 0, 2).train) == 2


def test_held_out_rows_leave_enough_for_the_others():
    repeated = [Example(f"x{number}", f"p {number % 4}", ()) for number in range(60)]
    train, test, notes = split_off_test(repeated, None, least=3)
    assert len(test) == 1
    assert len({example.prompt for example in train}) == 3
    assert notes == ("Left out 14 rows with the prompt of a held-out row.",)
    with pytest.raises(SlzoError, match=r"^data.task.train_file: .* at least 5 rows with different .*, and it has 4"):
        split_off_test(repeated, None, least=4)


def test_rows_that_a_later_command_holds_out_were_not_trained_on():
    rows = pool("r", 100)
    train, few, _ = split_off_test(rows, 4)
    again, more, _ = split_off_test(rows, None)
    assert train == again
    assert (len(few), len(more), len(train)) == (4, 20, 80)
    assert set(ids(few)) <= set(ids(more))
    assert not set(ids(train)) & set(ids(more))


def test_notes_say_what_was_taken():
    splits = draw(pool("r", 554), pool("t", 70), 1000, 500, 1000)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (370, 184, 70)
    assert splits.notes == (
        "The test split has 70 rows: took all; 1000 were requested.",
        "The training split has 554 usable rows: took 370 of 1000 training examples and 184 of 500 dev examples.",
    )


def test_test_rows_of_one_group_stay_together():
    rows = [Example(f"{g}-{a}", f"{g} {a}", (), (0,), group=str(g)) for g in range(30) for a in range(1 + g % 5)]
    whole = Counter(example.group for example in rows)
    splits = draw(None, rows, 1, 0, 40)
    assert 36 <= len(splits.test) <= 40
    assert all(count == whole[group] for group, count in Counter(e.group for e in splits.test).items())
    assert [e.id for e in rows if e in set(splits.test)] == ids(splits.test)
    assert len({example.group for example in draw(None, rows, 1, 0, 1).test}) == 1


def test_without_training_rows_and_without_a_limit():
    rows = pool("t", 5)
    splits = draw(None, rows, 10, 10, num_test=None)
    assert (splits.train, splits.dev, splits.test, splits.notes) == ((), (), tuple(rows), ())


@pytest.mark.parametrize(
    ("option", "value"), [("num_train", -1), ("num_train", 0), ("num_dev", -1), ("num_test", -1), ("num_test", 0)]
)
def test_numbers_out_of_range(option, value):
    with pytest.raises(SlzoError, match=f"^data.{option} {value}: must be "):
        TaskDataModule("sst2", **{option: value})


def test_training_rows_that_are_all_test_rows():
    with pytest.raises(SlzoError, match="none of the 5 training rows can be used"):
        draw(pool("t", 5), pool("t", 5))
