"""Files of one's own: one is enough, ids come from a column, and rows that cannot be used may be left out."""

import json

import pytest
from conftest import make_tokenizer

from slzo.__main__ import main
from slzo.datamodule import TaskDataModule
from slzo.utils.errors import SlzoError
from slzo.tasks.chat import ChatTask
from slzo.tasks.template import TemplateTask


def write(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return str(path)


def rows_of(count, first=0):
    return [{"text": f"film {i}", "label": i % 2, "key": 100 + i} for i in range(first, first + count)]


def talks_of(count):
    return [{"prompt": f"film {i}", "completion": "good", "key": f"t{i}"} for i in range(count)]


def template(**options):
    return TemplateTask("{text} is", [" bad", " good"], **options)


def module(task, **options):
    data = TaskDataModule(task, seed=0, **options)
    data.__dict__["encoder"] = data._make_encoder(make_tokenizer(), data.max_length)
    return data


def prompts(examples):
    return {example.prompt for example in examples}


@pytest.mark.parametrize(("make", "rows"), [(template, rows_of), (ChatTask, talks_of)])
def test_one_file_makes_three_splits_down_to_four_rows(tmp_path, make, rows):
    for count in (4, 5, 30):
        data = module(make(train_file=write(tmp_path / "rows.jsonl", rows(count))))
        data.setup("fit")
        parts = [data.splits.train, data.splits.dev, data.splits.test]
        assert all(parts)
        assert len(set().union(*map(prompts, parts))) == sum(map(len, parts)) == count
        other = module(make(train_file=data.task.train_file))
        other.seed = 1
        other.setup("fit")
        assert other.splits.test == data.splits.test
    for count in (1, 3):
        path = write(tmp_path / "rows.jsonl", rows(count))
        with pytest.raises(
            SlzoError, match=rf"^data.task.train_file: .* at least 4 rows .* and it has {count}; add some"
        ):
            module(make(train_file=path)).setup("fit")
        module(make(train_file=path), num_demonstrations=0).setup("test")


def test_two_rows_are_enough_without_dev_rows(tmp_path):
    data = module(template(train_file=write(tmp_path / "rows.jsonl", rows_of(2))), num_dev=0)
    data.setup("fit")
    assert [len(data.splits.train), len(data.splits.dev), len(data.splits.test)] == [1, 0, 1]


def test_ids_come_from_the_column_that_is_named(tmp_path):
    data = module(template(train_file=write(tmp_path / "rows.jsonl", rows_of(20)), id_field="key"))
    data.setup("fit")
    for part in (data.splits.train, data.splits.dev, data.splits.test):
        assert all(example.id == str(100 + int(example.prompt.split()[1])) for example in part)
    talks = module(ChatTask(train_file=write(tmp_path / "talks.jsonl", talks_of(20)), id_field="key"))
    talks.setup("test")
    assert all(example.id.startswith("t") for example in talks.splits.test)


def test_ids_stand_for_one_row_over_all_files(tmp_path):
    twice = write(tmp_path / "twice.jsonl", [*rows_of(3), rows_of(1)[0] | {"text": "other"}])
    with pytest.raises(
        SlzoError, match=r"twice.jsonl:4: id '100' is also that of .*twice.jsonl:1; give each row its own id"
    ):
        module(template(train_file=twice, id_field="key")).setup("fit")
    train = write(tmp_path / "train.jsonl", rows_of(10))
    same = write(tmp_path / "same.jsonl", rows_of(2))
    data = module(template(train_file=train, test_file=same, id_field="key"))
    data.setup("fit")
    assert "Left out 2 training rows that are also in the test split." in data.splits.notes
    other = write(tmp_path / "other.jsonl", [row | {"text": "another"} for row in rows_of(1)])
    with pytest.raises(
        SlzoError, match=r"^data.task.id_field 'key': .*train.jsonl:1 has id '100', which .*other.jsonl:1"
    ):
        module(template(train_file=train, test_file=other, id_field="key")).setup("fit")
    with pytest.raises(SlzoError, match=r"train.jsonl:1: field 'name' is missing"):
        module(template(train_file=train, id_field="name")).setup("fit")


BAD = {
    3: b'{"text": "film',
    5: {"label": 1},
    6: {"text": "film", "label": "maybe"},
    8: {"text": "caf\u00e9", "label": 1},
}


def some_bad(path):
    rows = rows_of(12)
    for number, bad in BAD.items():
        rows[number] = bad
    rows[8] = json.dumps(BAD[8], ensure_ascii=False).encode("latin-1")
    return write(path, rows)


def test_rows_that_cannot_be_used_are_left_out_and_told(tmp_path):
    path = some_bad(tmp_path / "rows.jsonl")
    with pytest.raises(
        SlzoError, match=r"rows.jsonl:9: not valid UTF-8; .*; data.skip_bad_rows true leaves such rows out$"
    ):
        module(template(train_file=path)).setup("fit")
    data = module(template(train_file=path), skip_bad_rows=True)
    data.setup("fit")
    kept = data.splits.train + data.splits.dev + data.splits.test
    assert {int(example.prompt.split()[1]) for example in kept} == set(range(12)) - BAD.keys()
    told = data.splits.notes[0].splitlines()
    assert told[0] == f"Left out 4 of 12 rows of {path} that cannot be used (data.skip_bad_rows):"
    assert [line.split(": ")[0] for line in told[1:]] == [f"  {path}:9", f"  {path}:4", f"  {path}:6", "  ..."]


def test_a_row_of_more_columns_or_with_a_repeated_id_is_left_out(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text,label\na,film 1,0\nb,film 2,1,more\na,film 3,1\nc,film 4,1\n")
    task = template(train_file=str(tmp_path / "rows.csv"))
    data = module(task, num_dev=0, skip_bad_rows=True)
    data.setup("fit")
    assert {example.id for example in data.splits.train + data.splits.test} == {"a", "c"}


def test_all_rows_bad_is_one_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [b"{", b"[1]"])
    with pytest.raises(SlzoError) as error:
        module(template(train_file=path), skip_bad_rows=True).setup("fit")
    assert str(error.value).startswith(f"{path}: none of the 2 rows can be used")
    assert f"{path}:1: not JSON" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_do_not_fit_are_left_out_too(tmp_path, capfd):
    rows = [*talks_of(9), {"prompt": "film", "completion": "good " * 60, "key": "long"}]
    path = write(tmp_path / "talks.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"prompt": "other", "completion": "bad"}])
    task = ChatTask(train_file=path, test_file=test, id_field=None)
    options = {"num_dev": 0, "max_length": 80}
    data = module(task, **options)
    data.setup("fit")
    with pytest.raises(
        SlzoError, match=r"talks.jsonl:10\) alone needs .*; data.skip_bad_rows true leaves such rows out$"
    ):
        data.rows("train")
    data = module(task, skip_bad_rows=True, **options)
    data.setup("fit")
    assert len(data.rows("train")) == 9
    assert "Left out 1 of 10 rows of the train split that cannot be used" in capfd.readouterr().err


def test_ids_reach_predictions_and_samples(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", rows_of(20))
    (tmp_path / "task.yaml").write_text(
        "data: {task: {class_path: TemplateTask, init_args: {prompt: '{text} is', candidates: [' bad', ' good'],"
        " train_file: rows.jsonl, id_field: key}}}"
    )
    options = ["--config=task.yaml", f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu"]
    fixed = ["--model.eps=1e-3", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--report.write=false"]
    assert main(["fit", *options, *fixed, "--trainer.max_steps=2", "--data.batch_size=4"]) == 0
    assert main(["predict", *options, "--output=found.jsonl"]) == 0
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    samples = json.loads((tmp_path / "runs" / "version_0" / "samples.json").read_text())["rows"]
    assert [record["id"] for record in found] == [row["id"] for row in samples]
    assert all(row["id"] == str(100 + int(row["prompt"].split()[1])) for row in samples)
