from collections import Counter

import pytest

from slzo.data.splits import divide, draw_splits, least_rows, part_test
from slzo.utils.errors import SlzoError
from slzo.tasks.base import Example

# Made with sha256sum of "1:r0", "1:r1", ... and "test:id:t0", ...: the lowest digests come first.
TRAIN_OF_SEED_1 = ["r6", "r11", "r15", "r10"]
DEV_OF_SEED_1 = ["r5", "r19"]
TEST = ["t1", "t3", "t6"]


def pool(name: str, size: int) -> list[Example]:
    return [Example(f"{name}{i}", f"{name} prompt {i}", (" a", " b"), (0,)) for i in range(size)]


def ids(examples: tuple[Example, ...]) -> list[str]:
    return [example.id for example in examples]


def test_draw_is_the_documented_one() -> None:
    splits = draw_splits(pool("r", 20), pool("t", 9), num_train=4, num_dev=2, num_test=3, seed=1)
    assert ids(splits.train) == TRAIN_OF_SEED_1
    assert ids(splits.dev) == DEV_OF_SEED_1
    assert ids(splits.test) == TEST
    assert splits.notes == ()


def test_seed_changes_train_and_dev_but_not_test_and_file_order_changes_nothing() -> None:
    numbers = {"num_train": 50, "num_dev": 20, "num_test": 30}
    first = draw_splits(pool("r", 100), pool("t", 60), seed=1, **numbers)
    second = draw_splits(pool("r", 100), pool("t", 60), seed=2, **numbers)
    assert first.train != second.train
    assert first.dev != second.dev
    assert first.test == second.test
    turned = draw_splits(pool("r", 100)[::-1], pool("t", 60)[::-1], seed=1, **numbers)
    assert (turned.train, turned.dev, turned.test) == (first.train, first.dev, first.test[::-1])
    more_dev = draw_splits(pool("r", 100), pool("t", 60), num_train=50, num_dev=40, num_test=60, seed=1)
    assert more_dev.train == first.train
    assert more_dev.dev[:20] == first.dev


def test_no_row_is_in_two_splits() -> None:
    train, test = pool("r", 90), pool("t", 40)
    train += [Example(f"other{i}", f"r prompt {i}", (), (0,)) for i in range(10)]  # prompts that are there already
    train += [Example(f"t{i}", f"new prompt {i}", (), (0,)) for i in range(7)]  # ids of test rows
    train += [Example(f"new{i}", f"t prompt {i}", (), (0,)) for i in range(5)]  # prompts of test rows
    splits = draw_splits(train, test, num_train=60, num_dev=30, num_test=10, seed=0)
    for key in (lambda e: e.id, lambda e: e.prompt):
        seen = Counter(key(example) for part in (splits.train, splits.dev, splits.test) for example in part)
        assert max(seen.values()) == 1
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (60, 30, 10)
    assert splits.notes == (
        "Left out 12 training rows that are also in the test split.",
        "Left out 10 training rows whose prompt is there twice.",
    )


@pytest.mark.parametrize(
    ("size", "num_train", "num_dev", "expected"),
    [
        (1500, 1000, 500, (1000, 500)),
        (554, 1000, 500, (370, 184)),  # WSC
        (400, 1000, 100, (364, 36)),  # COPA
        (250, 1000, 100, (228, 22)),  # CB
        (300, 100, 500, (100, 200)),
        (90, 100, 500, (60, 30)),
        (2, 1000, 500, (2, 0)),
        (1, 1, 500, (1, 0)),
        (10, 20, 0, (10, 0)),
    ],
)
def test_small_pools_are_divided(size: int, num_train: int, num_dev: int, expected: tuple[int, int]) -> None:
    assert divide(size, num_train, num_dev) == expected


def test_training_never_starves() -> None:
    for size in range(1, 80):
        for num_train in (1, 5, 40, 1000):
            for num_dev in (0, 1, 30, 500):
                train, dev = divide(size, num_train, num_dev)
                assert 1 <= train <= num_train
                assert 0 <= dev <= num_dev
                assert train + dev <= size
                assert train == num_train or (3 * dev <= size and train + dev == size)


def test_no_split_that_is_asked_for_is_empty() -> None:
    for num_train, num_dev, least in ((1000, 500, 3), (1000, 1, 3), (1, 500, 2), (1, 1, 2), (1000, 0, 1)):
        assert least_rows(num_train, num_dev) == least
        for size in range(least, 60):
            train, dev = divide(size, num_train, num_dev)
            assert train >= 1
            assert dev >= min(1, num_dev)
    with pytest.raises(
        SlzoError, match=r"^data.num_dev 500: .* takes at least 3 with different prompts, and there are 2;"
    ):
        draw_splits(pool("r", 2), pool("t", 2), num_train=1000, num_dev=500, num_test=2, seed=0)
    assert len(draw_splits(pool("r", 2), pool("t", 2), num_train=5, num_dev=0, num_test=2, seed=0).train) == 2


def test_held_out_rows_leave_enough_for_the_others() -> None:
    repeated = [Example(f"x{number}", f"p {number % 4}", ()) for number in range(60)]
    train, test, notes = part_test(repeated, None, least=3)
    assert len(test) == 1
    assert len({example.prompt for example in train}) == 3
    assert notes == ("Left out 14 rows with the prompts of held-out ones.",)
    with pytest.raises(
        SlzoError, match=r"^data.task.train_file: .* at least 5 rows with different prompts, and it has 4"
    ):
        part_test(repeated, None, least=4)


def test_notes_say_what_was_taken() -> None:
    splits = draw_splits(pool("r", 554), pool("t", 70), num_train=1000, num_dev=500, num_test=1000, seed=0)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (370, 184, 70)
    assert splits.notes == (
        "The test split has 70 rows: took all, 1000 were asked for.",
        "The training split has 554 usable rows: took 370 of 1000 training examples and 184 of 500 dev examples.",
    )


def test_test_rows_of_one_group_stay_together() -> None:
    rows = [Example(f"{g}-{a}", f"{g} {a}", (), (0,), group=str(g)) for g in range(30) for a in range(1 + g % 5)]
    whole = Counter(example.group for example in rows)
    splits = draw_splits(None, rows, num_train=1, num_dev=0, num_test=40, seed=0)
    assert 36 <= len(splits.test) <= 40
    assert all(count == whole[group] for group, count in Counter(e.group for e in splits.test).items())
    assert [e.id for e in rows if e in set(splits.test)] == ids(splits.test)
    one = draw_splits(None, rows, num_train=1, num_dev=0, num_test=1, seed=0)
    assert len({example.group for example in one.test}) == 1


def test_without_a_training_pool_and_without_a_limit() -> None:
    rows = pool("t", 5)
    splits = draw_splits(None, rows, num_train=10, num_dev=10, num_test=None, seed=0)
    assert (splits.train, splits.dev, splits.test, splits.notes) == ((), (), tuple(rows), ())


@pytest.mark.parametrize("option", ["num_train", "num_dev", "num_test"])
def test_numbers_out_of_range(option: str) -> None:
    numbers = {"num_train": 1, "num_dev": 1, "num_test": 1, option: -1}
    with pytest.raises(SlzoError, match=f"^data.{option} -1: must be "):
        draw_splits(pool("r", 5), pool("t", 5), seed=0, **numbers)
    if option != "num_dev":
        with pytest.raises(SlzoError, match=f"^data.{option} 0: must be "):
            draw_splits(pool("r", 5), pool("t", 5), seed=0, **{**numbers, option: 0})


def test_training_rows_that_are_all_test_rows() -> None:
    with pytest.raises(SlzoError, match="none of the 5 training rows is usable"):
        draw_splits(pool("t", 5), pool("t", 5), num_train=1, num_dev=1, num_test=1, seed=0)
