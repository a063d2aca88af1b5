"""Balanced batches: every class alike, the same after a resume, and every row's prefix in one block."""

import json
from collections import Counter

import pytest
from helpers import last_checkpoint, same_tensors, tuned

from slzo.__main__ import main
from slzo.data.balance import balanced_order, classes_of, describe_balance, epochs_for_all
from slzo.data.sampler import StepBatchSampler
from slzo.datamodule import TaskDataModule
from slzo.tasks.base import Example
from slzo.training import training_blocks
from slzo.utils.errors import SlzoError

CLASSES = [0] * 30 + [1] * 7 + [2] * 3


def test_batches_draw_all_classes_alike():
    sampler = StepBatchSampler(40, 6, 3, classes=CLASSES)
    for epoch in range(3):
        batches = [sampler.rows_of_step(7 * epoch + place) for place in range(7)]
        assert [len(batch) for batch in batches] == [6] * 6 + [4]
        for batch in batches[:-1]:
            assert Counter(CLASSES[row] for row in batch) == {0: 2, 1: 2, 2: 2}


def test_rows_of_a_class_come_equally_often():
    drawn = Counter(row for epoch in range(30) for row in balanced_order(CLASSES, 0, epoch))
    for own in range(3):
        counts = [drawn[row] for row, other in enumerate(CLASSES) if other == own]
        # an epoch of 40 leaves out at most two of its 14 turns of three
        assert max(counts) - min(counts) <= 0.15 * max(counts) + 1
    assert set(drawn) == set(range(40))
    all_rows = {row for epoch in range(epochs_for_all(CLASSES) + 1) for row in balanced_order(CLASSES, 0, epoch)}
    assert len(all_rows) >= 38


def test_an_order_depends_on_seed_and_epoch_alone():
    assert balanced_order(CLASSES, 0, 5) == balanced_order(CLASSES, 0, 5)
    assert len({tuple(balanced_order(CLASSES, seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def example(gold, candidates=(" no", " yes"), number=0):
    return Example(str(number), "?", candidates, (gold,))


def test_classes_are_right_candidates():
    rows = [example(1), example(0), example(1)]
    assert classes_of(rows) == [1, 0, 1]
    assert describe_balance(rows, [1, 0, 1]) == (
        "Balanced batches: training rows by class 'no' 1, 'yes' 2; an epoch of 3 draws about 2 of each."
    )
    for others, message in (
        ([example(1), example(1)], "none of the 2 training rows has class 'no'; raise data.num_train"),
        ([example(1), example(0, (" a", " b"))], "the rows have different candidates"),
    ):
        with pytest.raises(SlzoError, match=f"data.balanced true: {message}"):
            classes_of(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "squad"}, "data.balanced true: task 'squad' generates answers"),
        ({"task": "copa"}, "data.balanced true: task 'copa' has different candidates in each row"),
    ],
)
def test_what_cannot_be_balanced_is_told(options, message):
    with pytest.raises(SlzoError, match=message):
        TaskDataModule(balanced=True, **options)


@pytest.fixture
def unequal(options, tmp_path):
    """Options of a run on rows of which a sixth is of one class."""
    folder = tmp_path / "unequal" / "sst2"
    folder.mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 24)):
        rows = [
            {"idx": i, "sentence": f"film {name} {i}" + " x" * (i % 5), "label": int(i % 6 == 0)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    more = [f"--data.data_dir={folder.parent}", "--data.num_train=36", "--data.balanced=true", "--model.layer=2"]
    return ["fit", *options, *more, "--record.test_before=false", "--trainer.enable_progress_bar=false"]


def test_a_row_is_in_one_block(unequal, capsys):
    assert main([*unequal, "--trainer.max_steps=2"]) == 0
    assert "Balanced batches: training rows by class 'terrible' " in capsys.readouterr().out
    named = dict(option.removeprefix("--").split("=", 1) for option in unequal[1:])
    places = named["model.model"], named["data.data_dir"]
    data = TaskDataModule("sst2", *places, num_train=36, num_dev=16, batch_size=8, balanced=True, seed=0)
    data.setup("fit")
    keys = [key for block in training_blocks(data) for key in block.keys]
    assert len(keys) == len(set(keys))
    assert len(keys) >= 34  # of 36 rows


@pytest.mark.parametrize("cache", ["1", "1e-4"])
@pytest.mark.slow
def test_a_resumed_run_is_the_run(unequal, cache):
    """In the second epoch, with room for all prefix states and for some."""
    fit = [*unequal, f"--model.engine.cache_gb={cache}", "--trainer.max_steps=11"]
    assert main(fit) == 0
    assert main([*fit, "--trainer.max_steps=7"]) == 0
    assert main([*fit, "--ckpt_path=last"]) == 0
    whole, resumed = (tuned(last_checkpoint(number)) for number in (0, 2))
    assert same_tensors(whole, resumed)
