"""A user's own files: one is enough, ids come from a column, and rows that cannot be used may be left out."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pyarrow
import pytest
import torch
from helpers import read_lines, run_dir
from pyarrow import parquet

from slzo.__main__ import main
from slzo.data.sources import RowSource
from slzo.task_data import TaskData
from slzo.tasks.base import Example, Kind, Task
from slzo.tasks.chat import ChatTask
from slzo.tasks.fields import label_field
from slzo.tasks.template import TemplateTask
from slzo.training import profiling
from slzo.training.profiling import ProfileOptions
from slzo.utils.errors import SlzoError
from slzo.zo.selection import FirstOutlierLayer
from tiny import make_tokenizer


@pytest.fixture(autouse=True)
def _tiny_tokenizer(monkeypatch):
    monkeypatch.setattr("slzo.task_data.load_tokenizer", lambda *args: make_tokenizer())


def write(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return str(path)


def rows_of(count, first=0):
    return [{"text": f"film {i}", "label": i % 2, "key": 100 + i} for i in range(first, first + count)]


def test_empty_fields_of_prompts_are_counted(tmp_path, capsys):
    rows = [{**row, "context": " " if number < 3 else "old"} for number, row in enumerate(rows_of(20))]
    path = write(tmp_path / "rows.jsonl", [*rows, {**rows_of(1, 20)[0], "label": "", "context": "new"}])
    set_up(TemplateTask("{context} {text} is", [" bad", " good"], train_file=path))
    said = capsys.readouterr().out
    assert f"3 of 21 rows of {path} have an empty 'context'." in said
    assert "'label'" not in said


def test_equal_ids_in_a_folder_are_refused(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name, text in {"train": "film", "validation": "other film"}.items():
        rows = [{"idx": f"r{number}", "sentence": f"{text} {number}", "label": number % 2} for number in range(8)]
        write(tmp_path / "sst2" / f"{name}.jsonl", rows)
    with pytest.raises(
        SlzoError, match=r"^data.data_dir '.*': .*train.jsonl:1 has id 'r0', as does .*validation.jsonl:1; "
    ):
        set_up("sst2", data_dir=str(tmp_path))


def talks_of(count):
    return [{"prompt": f"film {i}", "completion": "good", "key": f"t{i}"} for i in range(count)]


def template(**options):
    return TemplateTask("{text} is", [" bad", " good"], **options)


def set_up(task, **options):
    """The rows of a task, for a fit."""
    rows = TaskData(task, **{"seed": 0, **options})
    rows.setup("fit")
    return rows


def parts_of(rows):
    return [rows.splits.train, rows.splits.dev, rows.splits.test]


def ids_and_prompts(rows):
    return [(example.id, example.prompt) for part in parts_of(rows) for example in part]


@pytest.mark.parametrize(("make", "rows"), [(template, rows_of), (ChatTask, talks_of)])
def test_one_file_makes_three_splits_down_to_four_rows(tmp_path, make, rows):
    for count in (4, 5, 30):
        path = write(tmp_path / "rows.jsonl", rows(count))
        data, other = (set_up(make(train_file=path), seed=seed) for seed in (0, 1))
        assert all(parts_of(data))
        prompts = [prompt for _, prompt in ids_and_prompts(data)]
        assert len(set(prompts)) == len(prompts) == count
        assert other.splits.test == data.splits.test
    for count in (1, 3):
        path = write(tmp_path / "rows.jsonl", rows(count))
        with pytest.raises(
            SlzoError, match=rf"^data.task.train_file: .* at least 4 rows .* and it has {count}; add rows"
        ):
            set_up(make(train_file=path))
        TaskData(make(train_file=path), seed=0).setup("test")


def test_two_rows_are_enough_without_dev_rows(tmp_path):
    data = set_up(template(train_file=write(tmp_path / "rows.jsonl", rows_of(2))), num_dev=0)
    assert list(map(len, parts_of(data))) == [1, 0, 1]


def test_ids_come_from_the_named_column(tmp_path):
    data = set_up(template(train_file=write(tmp_path / "rows.jsonl", rows_of(20)), id_field="key"))
    assert all(id == str(100 + int(prompt.split()[1])) for id, prompt in ids_and_prompts(data))
    talks = set_up(ChatTask(train_file=write(tmp_path / "talks.jsonl", talks_of(20)), id_field="key"))
    assert all(id.startswith("t") for id, _ in ids_and_prompts(talks))


def test_an_id_stands_for_one_row_in_all_files(tmp_path):
    def file(name, rows):
        return write(tmp_path / f"{name}.jsonl", rows)

    twice = file("twice", [*rows_of(3), rows_of(1)[0] | {"text": "other"}])
    with pytest.raises(SlzoError, match=r"twice.jsonl:4: id '100' is also the id of .*twice.jsonl:1"):
        set_up(template(train_file=twice, id_field="key"))
    train, same = file("train", rows_of(10)), file("same", rows_of(2))
    data = set_up(template(train_file=train, test_file=same, id_field="key"))
    assert "Left out 2 training rows also found in the test split." in data.splits.notes
    other = file("other", [row | {"text": "another"} for row in rows_of(1)])
    with pytest.raises(SlzoError, match=r"^data.task.id_field 'key': .*train.jsonl:1 has id '100', .*other.jsonl:1"):
        set_up(template(train_file=train, test_file=other, id_field="key"))
    with pytest.raises(SlzoError, match=r"train.jsonl:1: field 'name' is missing"):
        set_up(template(train_file=train, id_field="name"))


BAD = {
    3: b'{"text": "film',
    5: {"label": 1},
    6: {"text": "film", "label": "maybe"},
    8: {"text": "caf\u00e9", "label": 1},
}


def test_rows_that_cannot_be_used_are_left_out_and_listed(tmp_path):
    rows = [BAD.get(number, row) for number, row in enumerate(rows_of(12))]
    rows[8] = json.dumps(BAD[8], ensure_ascii=False).encode("latin-1")
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SlzoError, match=r"rows.jsonl:9: not valid UTF-8; .*; data.skip_bad_rows true leaves .* out$"):
        set_up(template(train_file=path))
    data = set_up(template(train_file=path), skip_bad_rows=True)
    assert {int(prompt.split()[1]) for _, prompt in ids_and_prompts(data)} == set(range(12)) - BAD.keys()
    first, *lines = data.splits.notes[0].splitlines()
    assert first == f"Left out 4 of 12 rows of {path} that cannot be used (data.skip_bad_rows):"
    assert [line.split(": ")[0] for line in lines] == [f"  {path}:4", f"  {path}:6", f"  {path}:7", "  ..."]


def test_a_bad_row_does_not_change_the_ids_of_those_before_it(tmp_path):
    rows = [*({"text": f"film {i}"} for i in range(2)), b"\xff", {"text": "film 3"}, b"{", {"text": "film 5"}]
    path = write(tmp_path / "rows.jsonl", rows)
    found = RowSource(template(train_file=path), skip_bad_rows=True).read_to_predict(path).examples
    assert [example.id for example in found] == ["0", "1", "3", "5"]


def test_a_row_with_more_columns_or_a_repeated_id_is_left_out(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text,label\na,film 1,0\nb,film 2,1,more\na,film 3,1\nc,film 4,1\n")
    data = set_up(template(train_file=str(tmp_path / "rows.csv")), num_dev=0, skip_bad_rows=True)
    assert {id for id, _ in ids_and_prompts(data)} == {"a", "c"}


def test_a_file_without_a_good_row_is_one_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [b"{", b"[1]"])
    with pytest.raises(SlzoError) as error:
        set_up(template(train_file=path), skip_bad_rows=True)
    assert str(error.value).startswith(f"{path}: none of the 2 rows can be used")
    assert f"{path}:1: not JSON" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_are_too_long_are_left_out_too(tmp_path, capsys):
    rows = [*talks_of(9), {"prompt": "film", "completion": "good " * 60, "key": "long"}]
    path = write(tmp_path / "talks.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"prompt": "other", "completion": "bad"}])
    task = ChatTask(train_file=path, test_file=test, id_field=None)
    options = {"num_dev": 0, "max_length": 80, "tokenizer": "smollm2-135m"}
    with pytest.raises(SlzoError, match=r"talks.jsonl:10\) alone needs .*; data.skip_bad_rows true leaves .* out$"):
        set_up(task, **options).rows("train")
    assert len(set_up(task, skip_bad_rows=True, **options).rows("train")) == 9
    assert "Left out 1 of 10 rows of the train split that cannot be used" in capsys.readouterr().out


def test_held_out_rows_that_are_too_long_are_not_counted(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", rows_of(12))
    write(tmp_path / "test.jsonl", [*rows_of(4, 20), {"text": "long", "label": 1, "key": 1}])
    (tmp_path / "own_task.py").write_text(
        "from slzo.tasks import Example\nfrom slzo.tasks.template import TemplateTask\n"
        "class Task(TemplateTask):\n    def example(self, row, id):\n"
        "        longer = ' good' * (100 if row['text'] == 'long' else 1)\n"
        "        return Example(id, row['text'], (' bad', longer), (row['label'],))\n"
    )
    (tmp_path / "task.yaml").write_text(
        "data: {task: {class_path: own_task.Task, init_args: {prompt: '{text}', candidates: [' bad', ' good'],"
        " train_file: train.jsonl, test_file: test.jsonl}}}"
    )
    options = ["--config=task.yaml", f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu"]
    rows = ["--data.batch_size=4", "--data.max_length=40", "--data.skip_bad_rows=true", "--record.test_before=false"]
    steps = ["--model.eps=1e-3", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--trainer.max_steps=2"]
    assert main(["fit", *options, *rows, *steps, "--record.reference=false"]) == 0
    assert "Scoring 4 held-out rows after training" in capsys.readouterr().out
    found = json.loads((run_dir() / "summary.json").read_text())
    assert (found["num_rows"], found["majority_share"]) == (4, 0.5)


def test_ids_reach_predictions_and_samples(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", rows_of(20))
    (tmp_path / "task.yaml").write_text(
        "data: {task: {class_path: TemplateTask, init_args: {prompt: '{text} is', candidates: [' bad', ' good'],"
        " train_file: rows.jsonl, id_field: key}}}"
    )
    options = ["--config=task.yaml", f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu"]
    steps = ["--model.eps=1e-3", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--trainer.max_steps=2"]
    assert main(["fit", *options, *steps, "--data.batch_size=4"]) == 0
    assert main(["predict", *options, "--output=found.jsonl"]) == 0
    found = read_lines("found.jsonl")
    samples = json.loads((run_dir() / "samples.json").read_text())["rows"]
    assert [record["id"] for record in found] == [row["id"] for row in samples]
    assert all(row["id"] == str(100 + int(row["prompt"].split()[1])) for row in samples)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "field 'text' is nan, as pandas writes a missing value; fill it"),
        ("Infinity", "field 'text' is inf; it must be text"),
    ],
)
def test_a_missing_value_of_pandas_is_no_text(tmp_path, value, reason):
    rows = [*rows_of(8), f'{{"text": {value}, "label": 1}}'.encode()]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SlzoError, match=rf"rows\.jsonl:9: {reason}"):
        set_up(template(train_file=path))


def test_a_missing_value_of_pandas_is_no_reference(tmp_path):
    rows = [{"question": "q", "answer": "a", "more": more} for more in ("b", float("nan"), "c", "d")]
    path = write(tmp_path / "rows.jsonl", rows)
    task = TemplateTask("{question}", answer_field="answer", references_field="more", train_file=path)
    references = [example.references for example in RowSource(task).read("train").examples]
    assert references == [("a", "b"), ("a",), ("a", "c"), ("a", "d")]


def test_a_field_of_further_answers_that_no_row_has_is_named(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"question": f"q{n}", "answer": "a", "more": "b"} for n in range(8)])
    set_up(TemplateTask("{question}", answer_field="answer", references_field="moer", train_file=path))
    assert "data.task.references_field 'moer': no row of " in capsys.readouterr().err
    set_up(TemplateTask("{question}", answer_field="answer", references_field="more", train_file=path))
    assert "references_field" not in capsys.readouterr().err


def test_labels_that_are_true_and_false_or_floats(tmp_path):
    for labels, values in (
        (["false", "true"], [True, False]),
        (["False", "True"], [True, False]),
        ([0, 1], ["1.0", "0"]),
    ):
        rows = [{"text": "a", "mood": values[0]}, {"text": "b", "mood": values[1]}, {"text": "c", "mood": ""}]
        path = write(tmp_path / "rows.jsonl", rows)
        task = template(labels=labels, label_field="mood", train_file=path)
        assert [example.gold for example in RowSource(task).read("train").examples] == [(1,), (0,), ()]


def test_an_empty_answer_is_none(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "x"}])
    tasks = (TemplateTask("{prompt}", answer_field="completion", train_file=path), ChatTask(train_file=path))
    for task in tasks:
        assert [example.gold for example in RowSource(task).read("train").examples] == [(), (0,)]


def test_rewards_get_the_fields_as_they_were_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "word": "x"}])
    source = RowSource(TemplateTask("{text}", answer_field="answer", train_file=path), columns=True)
    assert dict(source.read_to_predict(path).examples[0].columns) == {"text": "a", "word": "x"}


def test_sources_beside_a_tasks_own_files_are_named(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", rows_of(8))
    set_up(template(train_file=path), data_dir="other", hub_path="a/b")
    lines = capsys.readouterr().err.splitlines()
    told = f"not used, because task 'custom' has its own files, such as {path}; leave it out"
    assert lines == [f"slzo: warning: data.data_dir 'other', data.hub_path 'a/b': {told}"]


def test_training_rows_of_one_class_are_named(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{**row, "label": 1} for row in rows_of(8)])
    set_up(template(train_file=path), num_dev=2)
    assert (
        "slzo: warning: data.task 'custom': all 6 training rows have the same answer, ' good', so training can only"
        in (capsys.readouterr().err)
    )
    set_up(template(train_file=write(tmp_path / "rows.jsonl", rows_of(8))))
    assert not capsys.readouterr().err


def test_cut_prompts_are_counted(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"text": f"film {i} " + "very long " * 9, "label": i % 2} for i in range(8)])
    data = set_up(template(train_file=path), max_length=30, num_dev=2, tokenizer="smollm2-135m")
    for split in ("train", "test"):
        rows = data.rows(split)
        long = sum(len(row.example.prompt) > 30 for row in rows)
        assert capsys.readouterr().err == (
            f"slzo: warning: data.max_length 30: shortened {long} of {len(rows)} {split} row{'s' * (len(rows) > 1)}, cut on "
            "the left, so the start of the prompt is missing; raise it, or move what must stay to the end of the prompt\n"
        )
        data.profile_batches(4)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_that_are_longer_than_generated_ones_are_told(chat, tmp_path, capsys):
    # a space and each letter are a token, as is what ends an answer; earlier turns do not count
    turns = [{"role": role, "content": "b" * 30} for role in ("user", "assistant", "user")]
    rows = [{"text": f"film {i}", "answer": "b" * (8 + i)} for i in range(3)]
    talks = [{"messages": [*turns, {"role": "assistant", "content": row["answer"]}]} for row in rows]
    options = {"max_new_tokens": 10, "metrics": ["f1"]}
    for file in ("train", "test"):
        options[f"{file}_file"] = write(tmp_path / f"{file}.jsonl", talks if chat else rows)
    task = ChatTask(**options) if chat else TemplateTask("{text}:", answer_field="answer", **options)
    data = TaskData(task, tokenizer="smollm2-135m")
    data.setup("test")
    data.rows("test")
    assert (
        "data.task.max_new_tokens 10: the answers of 1 test row are longer, so generated answers are cut before they can"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [0, -5])
def test_the_number_of_held_out_rows_is_checked_for_a_single_file_too(tmp_path, number):
    path = write(tmp_path / "rows.jsonl", rows_of(20))
    with pytest.raises(SlzoError, match=rf"^data.num_test {number}: must be at least 1"):
        set_up(template(train_file=path), num_test=number)


def test_a_row_to_predict_needs_no_label_even_if_minus_one_is_one(tmp_path):
    task = template(labels=[-1, 1])
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b", "label": -1}, {"text": "c", "label": ""}])
    assert [example.gold for example in RowSource(task).read_to_predict(path).examples] == [(), (0,), ()]


def test_an_empty_cell_of_further_answers_is_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,answer,more\na,yes,\nb,no,nope\n")
    task = TemplateTask("{text}", answer_field="answer", references_field="more", train_file=str(path))
    assert [example.references for example in RowSource(task).read("train").examples] == [("yes",), ("no", "nope")]


def test_a_task_with_the_name_of_a_built_in_one_reads_its_own_labels(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "entailment"}])
    task = template(name="rte", labels=["not_entailment", "entailment"], train_file=path)
    for rows in (RowSource(task).read("train"), RowSource(task).read_to_predict(path)):
        assert [example.gold for example in rows.examples] == [(1,)]


def test_numbers_among_the_labels_of_a_csv(tmp_path):
    """Names such as 007 stay as they are; pandas writes 1.0 in a column with gaps."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"film {i},00{7 + i % 2}\n" for i in range(8)))
    data = set_up(template(train_file=str(path), labels=["007", "008"]), num_dev=0)
    assert {example.gold for part in parts_of(data) for example in part} == {(0,), (1,)}
    path.write_text("text,label\n" + "".join(f"film {i},{i % 2}.0\n" for i in range(8)))
    data = set_up(template(train_file=str(path)), num_dev=0)
    assert {example.gold for part in parts_of(data) for example in part} == {(0,), (1,)}


def test_labels_that_are_fractions(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"film {i},{0.5 + i % 2 / 2}\n" for i in range(8)))
    rows = [{"text": f"film {i}", "label": 0.5 + i % 2 / 2} for i in range(8)]
    for file in (str(path), write(tmp_path / "rows.jsonl", rows)):
        for labels in ([0.5, 1.0], ["0.5", "1.0"], [0.5, 1]):
            examples = RowSource(template(train_file=file, labels=labels)).read("train").examples
            assert [example.gold for example in examples] == [(0,), (1,)] * 4
    with pytest.raises(SlzoError, match=r"equal to a number that can be a label; give the rows' labels"):
        TemplateTask("{text}", [" 1.0", " 2.0"])


def test_labels_true_and_false_without_labels_in_the_config_are_explained(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": True}])
    with pytest.raises(
        SlzoError, match=r'is True; .* data\.task\.labels, as in \["false", "true"\]; data\.skip_bad_rows'
    ):
        RowSource(template(train_file=path)).read("train")
    examples = RowSource(template(train_file=path, labels=["false", "true"])).read("train").examples
    assert [example.gold for example in examples] == [(1,)]


def test_a_prompt_of_a_conversation_that_is_a_number_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "2 + 2", "completion": 4}])
    with pytest.raises(SlzoError, match=r"'completion' is 4; it must be text, or a list of turns"):
        RowSource(ChatTask(train_file=path)).read("train")


def test_rows_without_a_label_are_told(tmp_path, capsys):
    train, test = (write(tmp_path / f"{name}.jsonl", rows_of(8, first)) for name, first in (("train", 0), ("test", 8)))
    write(Path(test), [row | ({"label": -1} if i < 3 else {}) for i, row in enumerate(rows_of(8, 8))])
    told = "3 of 8 held-out rows have no label and are not scored"
    data = set_up(template(train_file=train, test_file=test), num_dev=2)
    assert told in capsys.readouterr().err
    data.setup("test")
    assert told not in capsys.readouterr().err
    # rows to predict need no label, but the same rows may be scored afterwards
    data = TaskData(template(train_file=train, test_file=test), seed=0)
    data.setup("predict")
    assert told not in capsys.readouterr().err
    data.setup("test")
    assert told in capsys.readouterr().err


def test_demonstrations_are_labelled_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | ({} if i % 2 else {"label": -1}) for i, row in enumerate(rows_of(40))])
    data = set_up(template(train_file=path), num_demonstrations=4, tokenizer="tiny")
    assert len(data.demonstrations) == 4
    assert all(example.gold for example in data.demonstrations)
    assert data.rows("dev")
    with pytest.raises(SlzoError, match=r"^data.num_demonstrations 30: only \d+ labelled training rows"):
        set_up(template(train_file=path), num_demonstrations=30)


def test_the_outlier_profile_of_a_chat_task_may_read_texts(tmp_path):
    data = set_up(ChatTask(train_file=write(tmp_path / "rows.jsonl", talks_of(20))), tokenizer="tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("one line of text\n\nanother\n", encoding="utf-8")
    (batch,) = profiling._batches(data, ProfileOptions(FirstOutlierLayer(), 16, str(texts)))
    assert batch.num_examples == 2


def test_a_parquet_file_with_two_equal_columns_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(SlzoError, match=r"rows.parquet: two columns are called 'text'; give each its own name"):
        set_up(template(train_file=tmp_path / "rows.parquet"))


def test_ids_that_start_again_in_each_file_are_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"id": f"q{i}", "text": f"a {i}", "label": i % 2} for i in range(8)])
    test = write(tmp_path / "test.jsonl", [{"id": f"q{i}", "text": f"b {i}", "label": i % 2} for i in range(4)])
    with pytest.raises(SlzoError, match=r"has id 'q\d', as does .*; give each row its own id across all files"):
        set_up(template(train_file=train, test_file=test))


def test_a_long_cell_and_a_number_as_id_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{'long ' * 40000},1\n")
    limit = csv.field_size_limit()
    (row,) = RowSource(template(train_file=str(path))).read("train").examples
    assert len(row.prompt) > 131072
    assert csv.field_size_limit() == limit
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0, "id": 3.0}])
    assert RowSource(template(test_file=path)).read("test").examples[0].id == "3"


def test_a_token_without_an_embedding_is_named(tmp_path):
    """Also if the rows were encoded before the model was loaded, for the memory plan."""
    data = set_up(template(train_file=write(tmp_path / "rows.jsonl", rows_of(8))), tokenizer="tiny", num_dev=1)
    size = len(data.encoder.tokenizer)

    def model(known):
        config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
        embeddings = SimpleNamespace(weight=torch.empty(known, 1))
        return SimpleNamespace(get_input_embeddings=lambda: embeddings, config=config)

    before = [row.encoded for row in data.rows("train")]
    data.adapt_to_model(model(size - 1), "tiny")  # no row has the last token
    assert [row.encoded for row in data.rows("train")] == before
    data.adapt_to_model(model(5), "tiny")
    with pytest.raises(
        SlzoError,
        match=r"^.*rows.jsonl:\d.*: the tokenizer gives it token \d+, and the model has 5\d*; give the tokenizer that belongs",
    ):
        data.rows("train")
    with pytest.raises(SlzoError, match=rf"^data.tokenizer 'tiny': has {size} tokens, but model 'other' has 5"):
        data.adapt_to_model(model(5), "other")


def test_a_setup_that_failed_is_tried_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows_of(30))

    def needs(completions, judged):
        return [0.0 for _ in completions]

    task = {"answer_field": "label", "train_file": path}
    for rows, message in (
        (TaskData(template(train_file=path), num_demonstrations=99, seed=0), "data.num_demonstrations 99: only"),
        (TaskData(TemplateTask("{text} is", **task), reward=needs, seed=0), "judged"),
    ):
        for _ in range(2):
            with pytest.raises(SlzoError, match=message):
                rows.setup("fit")
    rows = TaskData(template(train_file=path), predict_file="nothing.jsonl", seed=0)
    with pytest.raises(SlzoError, match=r"nothing\.jsonl"):
        rows.setup("predict")
    rows.predict_file = path
    rows.setup("predict")


@pytest.mark.parametrize("name", ["candidates", "labels", "stop", "metrics"])
def test_a_text_in_place_of_a_list_is_refused(name):
    """Each of its letters would count."""
    options = {"candidates": [" bad", " good"]} if name == "labels" else {}
    with pytest.raises(SlzoError, match=rf"^data\.task\.{name} 'END': is one text; give a list, as in \['END'\]"):
        TemplateTask("{text} is", **options, **{name: "END"})


class OwnRows(Task):
    name, kind = "own", Kind.CLASSIFICATION

    def rows(self, split):
        return [{"id": f"r{i}", "text": f"{split} {i}", "label": i % 2} for i in range(20)]

    def example(self, row, id):
        return Example(id, row["text"], (" a", " b"), (row["label"],), **self.more)

    more: ClassVar = {}


def test_ids_that_occur_in_two_splits_of_an_own_task_are_named():
    with pytest.raises(SlzoError, match=r"^data\.task 'own': .* has id 'r0', as does .*; give each row its own id"):
        set_up(OwnRows())


@pytest.mark.parametrize("more", [{"references": "Paris"}, {"references": None}, {"group": ("a",)}])
def test_fields_of_an_example_are_checked(more):
    task = OwnRows()
    task.more = more
    with pytest.raises(SlzoError, match=f"example.. returned {next(iter(more))} .*, which (are|is) n"):
        set_up(task)


@pytest.mark.parametrize("attribute", ["name", "kind"])
def test_a_task_without_name_or_kind_is_named(attribute):
    class Incomplete(Task):
        def example(self, row, id):
            raise AssertionError

    setattr(Incomplete, "kind" if attribute == "name" else "name", "x")
    with pytest.raises(SlzoError, match=f"^data.task .*Incomplete: it has no attribute {attribute}; it must"):
        TaskData(Incomplete())


@pytest.mark.parametrize("kind", [np.int64, torch.tensor], ids=lambda kind: kind.__name__)
def test_rows_may_hold_values_of_numpy_and_tensors(kind):
    """As those of a ``datasets.Dataset`` with a format."""

    class FromArrays(OwnRows):
        def rows(self, split):
            return [{"id": f"{split}{i}", "text": f"{split} {i}", "label": kind(i % 2)} for i in range(20)]

        def example(self, row, id):
            return Example(id, row["text"], (" a", " b"), label_field(row, 2))

    assert {example.gold for example in set_up(FromArrays()).splits.test} == {(0,), (1,)}


def test_an_empty_cell_of_a_csv_file_with_one_column_is_a_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text\na\n""\n\nb\n')
    data = TaskData(template(train_file=str(path)), predict_file=str(path), tokenizer="smollm2-135m")
    data.setup("predict")
    rows = [(row.example.id, row.example.prompt) for row in data.rows("predict")]
    assert rows == [("0", "a is"), ("1", "is"), ("2", "b is")]
