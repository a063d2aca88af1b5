"""A resumed run, and the scoring of a checkpoint, notice rows and a tokenizer that have been changed."""

import json
import re
import shutil
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line, read_lines, run_dir, run_fit, summary, write_lines
from tokenizers import normalizers

from slzo.__main__ import main
from slzo.batches.encoded import prompt_alone
from slzo.data.batch import Row
from slzo.data.fingerprint import DataFingerprint, hash_tokenizer
from slzo.models.load import load_tokenizer
from slzo.tasks.base import Example, Kind
from slzo.training.scored import scores_are_comparable
from tiny import make_tokenizer

ALLOW = "--data.allow_changed_rows=true"


def train(model_dir, data_dir, *options):
    """A run of two steps on its own copies of model and rows."""
    shutil.copytree(model_dir, "model")
    shutil.copytree(data_dir, "rows")
    run_fit(*options, "--trainer.max_steps=2")


@pytest.fixture
def run(options, once, model_dir, data_dir):
    """The options of a run, whose files, model and rows are in the current folder."""
    options = [*options, "--model.model=model", "--data.data_dir=rows", "--model.layer=1", "--trainer.max_steps=4"]
    once(train, model_dir, data_dir, *options)
    return options


def edit_rows(tmp_path, split, change):
    """Change the rows of a file in place."""
    file = tmp_path / "rows" / "sst2" / f"{split}.jsonl"
    write_lines(file, [change(row) for row in read_lines(file)])


def swap_two_tokens(folder):
    """Exchange the ids of two tokens in a tokenizer's files."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    known = content["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("split", "change", "name"),
    [
        ("train", lambda row: row | {"sentence": row["sentence"] + " indeed"}, "train"),
        pytest.param("train", lambda row: row | {"label": 1 - row["label"]}, "train", marks=pytest.mark.slow),
        pytest.param(
            "validation", lambda row: row | {"sentence": row["sentence"] + " indeed"}, "test", marks=pytest.mark.slow
        ),
    ],
    ids=["text", "label", "held-out"],
)
def test_changed_rows_are_refused_and_can_be_allowed(run, tmp_path, capsys, split, change, name):
    edit_rows(tmp_path, split, change)
    line = error_line(capsys, "fit", *run, "--ckpt_path=last")
    assert f"row 0 of the {name} rows, example " in line
    assert f"{split}.jsonl:" in line
    assert line.endswith("or set data.allow_changed_rows to true to use these rows")
    assert not run_dir(1).exists()
    assert main(["fit", *run, "--ckpt_path=last", ALLOW]) == 0


def test_one_changed_row_is_named(run, tmp_path, capsys):
    edit_rows(tmp_path, "train", lambda row: row | ({"label": 1 - row["label"]} if row["idx"] % 7 == 0 else {}))
    line = error_line(capsys, "fit", *run, "--ckpt_path=last")
    named = re.search(r"row \d+ of the train rows, example 'train-(\d+)'", line)
    assert int(named[1]) % 7 == 0


def test_scores_of_changed_rows_are_not_compared(run, capsys):
    fewer = ["--data.num_dev=8", "--data.num_test=12"]
    assert main(["fit", *run, "--ckpt_path=last", *fewer, ALLOW]) == 0
    told = "its validations and its best state are left out and its held-out score before training is left out"
    assert told in capsys.readouterr().err
    content = summary(1)
    assert (content["score_before"], content["score_change"], content["rollbacks"]) == (None, None, 0)
    assert [each["step"] for each in content["validations"]] == [4]
    assert content["best_checkpoint"] == str(run_dir(1) / "checkpoints" / "step=4.ckpt")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "is_generated", "expected"),
    [
        ({"data.task.stop": ["."]}, True, False),
        ({"data.task.train_file": "moved.jsonl", "data.batch_size": 4}, False, True),
        ({"data.task": "new", "data.task.name": "new"}, False, True),
        ({"data.task": "new", "data.task.name": None}, False, False),
        ({"data.objective.functions": ["other"]}, True, False),
        ({"data.objective.best": 2.0}, True, False),
        ({"data.objective.timeout": 9.0, "data.objective.samples": 8}, True, True),
        ({"data.objective": "AnswerF1"}, True, False),
        ({"data.objective": "ErrorRate"}, False, True),  # dev rows still have the task's loss
    ],
)
def test_which_options_change_scores(change, is_generated, expected):
    before = {"data.task": "mine", "data.task.name": "mine"}
    before |= {"data.objective": "Reward", "data.objective.functions": ["one"]}
    rows = {"dev": torch.arange(3, dtype=torch.int32), "test": torch.arange(4, dtype=torch.int32)}
    data = SimpleNamespace(task=SimpleNamespace(kind=Kind.GENERATION if is_generated else Kind.CLASSIFICATION))
    settings = {name: value for name, value in (before | change).items() if value is not None}
    prepared = SimpleNamespace(settings=settings, fingerprint=SimpleNamespace(rows=rows | {"test": rows["dev"]}))
    checkpoint = {"slzo": {"settings": before, "data": {"rows": rows}}}
    assert scores_are_comparable(checkpoint, prepared, data, "dev") is expected
    assert not scores_are_comparable(checkpoint, prepared, data, "test")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(
            "--data.num_train=30",
            "the checkpoint's run had 40 train rows, and now there are 30",
            marks=pytest.mark.slow,
        ),
        ("--data.max_length=12", "row 0 of the train rows"),
    ],
)
def test_options_that_change_rows_are_noticed(run, capsys, option, message):
    assert message in error_line(capsys, "fit", *run, "--ckpt_path=last", option)
    assert main(["fit", *run, "--ckpt_path=last", option, ALLOW]) == 0


def test_a_validation_on_rows_that_may_be_trained_ones_says_so(run, capsys):
    assert main(["validate", *run, "--ckpt_path=last"]) == 0
    assert "the rows that it was trained on" not in capsys.readouterr().err
    assert main(["validate", *run, "--ckpt_path=last", "--seed_everything=5"]) == 0
    assert "dev rows may be among the rows that it was trained on; use its options" in capsys.readouterr().err
    assert main(["test", *run, "--ckpt_path=last", "--seed_everything=5"]) == 0
    assert "the rows that it was trained on" not in capsys.readouterr().err


@pytest.mark.slow
def test_another_tokenizer_is_refused_and_can_be_allowed(run, tmp_path, capsys):
    swap_two_tokens(tmp_path / "model")
    for command in ("fit", "test", "validate", "predict"):
        more = run if command == "fit" else [o for o in run if "max_steps" not in o]
        output = ["--output=found.jsonl"] if command == "predict" else []
        line = error_line(capsys, command, *more, *output, "--ckpt_path=last")
        assert "the tokenizer of model.model is not that of the checkpoint's run; restore it, or set" in line
    assert main(["test", *run, "--ckpt_path=last", ALLOW]) == 0
    assert main(["fit", *run, "--ckpt_path=last", ALLOW]) == 0


def test_the_hash_of_a_tokenizer_depends_on_more_than_its_vocabulary():
    one, other = make_tokenizer(), make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert one.get_vocab() == other.get_vocab()
    assert hash_tokenizer(one) != hash_tokenizer(other)


def test_the_hash_of_a_tokenizer_does_not_depend_on_what_it_was_used_for(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    before = hash_tokenizer(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=4)
    assert hash_tokenizer(tokenizer) == before == hash_tokenizer(load_tokenizer(str(model_dir)))


def test_the_hash_of_a_row_covers_its_id_and_the_values_of_its_columns():
    """Sampled answers depend on the id. A value whose text is its address has the same hash in every process."""

    def row_hash(id="a", **columns):
        row = Row(Example(id, "x", (), columns=columns), prompt_alone(0, (3, 4)), 0)
        return int(DataFingerprint.of(make_tokenizer(), {"train": [row]}).rows["train"])

    first, second = object(), object()
    assert row_hash(image=first, when=date(2026, 1, 2)) == row_hash(image=second, when=date(2026, 1, 2))
    others = [row_hash(), row_hash("b"), row_hash(image="0x1"), row_hash(image="0x2"), row_hash(image=first)]
    others += [row_hash(image=date(2026, 1, day)) for day in (1, 2)]
    assert len(set(others)) == len(others)
