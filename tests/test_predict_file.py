"""Predictions for a file of the user's own, without labels."""

import math

import pytest
from helpers import error_line, read_lines, write_lines

from slzo.__main__ import main
from slzo.data.sources import RowSource
from slzo.task_data import TaskData
from slzo.tasks.registry import TASKS, get_task
from slzo.tasks.template import TemplateTask
from slzo.utils.errors import SlzoError

TEXTS = ["a fine film", "a bad film, a very bad one", "films"]


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(TASKS))
def test_rows_of_every_task_may_lack_their_label(name, tmp_path):
    task, file = get_task(name), tmp_path / "rows.jsonl"
    (label,) = task.no_label
    special = {
        ("copa", "question"): "effect",
        ("copa", "choice2"): "other text",
        ("record", "query"): "@placeholder",
        ("record", "entities"): ["one", "two"],
    }
    row = {field: special.get((name, field), "some text") for field in task.fields if field != label}
    assert label in task.fields
    write_lines(file, [row, *({**row, label: none} for none in (None, "", math.nan))])
    examples = RowSource(task).read_to_predict(str(file)).examples
    assert [example.gold for example in examples] == [()] * 4
    assert [example.references for example in examples] == [()] * 4


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"candidates": [" no", " yes"], "label_field": "y"}, {"answer_field": "y"}])
def test_rows_of_a_template_may_lack_their_label(options, tmp_path):
    (tmp_path / "rows.csv").write_text("x;y\nsome text;\nmore text;\n")
    source = RowSource(TemplateTask("{x}?", **options))
    (example, _) = source.read_to_predict(str(tmp_path / "rows.csv")).examples
    assert example.prompt == "some text?"
    assert example.gold == ()


def test_a_checkpoint_predicts_a_file(options, tmp_path, capsys):
    assert main(["fit", *options, "--model.layer=1", "--trainer.max_steps=2", "--record.test_before=false"]) == 0
    rows = tmp_path / "mine.csv"
    rows.write_text("id,sentence\n" + "".join(f'r{n},"{text}"\n' for n, text in enumerate(TEXTS)), encoding="utf-8-sig")
    capsys.readouterr()
    given = ["--ckpt_path=last", f"--data.predict_file={rows}", "--output=out.jsonl"]
    assert main(["predict", *given]) == 0
    assert f"Task sst2: 3 rows of {rows}." in capsys.readouterr().out
    found = read_lines(tmp_path / "out.jsonl")
    assert [(line["id"], line["prompt"], line["gold"]) for line in found] == [
        (f"r{number}", f"{text} It was", None) for number, text in enumerate(TEXTS)
    ]
    for line in found:
        weights = [math.exp(score) for score in line["scores"]]
        assert line["probabilities"] == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)
        assert line["prediction"] == line["probabilities"].index(max(line["probabilities"]))

    assert main(["predict", *given, "--data.num_demonstrations=2", "--output=shots.jsonl"]) == 0
    assert [line["scores"] for line in read_lines(tmp_path / "shots.jsonl")] != [line["scores"] for line in found]


def test_a_missing_field_is_told_with_the_fields_of_the_file_alone(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"body": "a"}')
    task = TemplateTask("{text} It was", [" bad", " good"], label_field="mood", train_file="rows.jsonl")
    with pytest.raises(SlzoError, match=r"'text' is missing; .*, and the row has body;"):
        RowSource(task).read_to_predict(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.predict_file 'mine.jsonl': no such file; give an existing one"),
        ("", "mine.jsonl: holds no rows; task 'sst2' needs at least one"),
        (
            '{"text": "a"}',
            "mine.jsonl:1: field 'sentence' is missing; task 'sst2' needs it (in all: sentence, label), and the row has text",
        ),
        ('{"sentence": "a", "label": 7}', "mine.jsonl:1: field 'label' is 7; it must be one of the numbers 0, 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(sst2_options, tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setattr("slzo.training.held_model.load_parts", pytest.fail)  # it is read before the model is loaded
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    assert message in error_line(capsys, "predict", *sst2_options, "--data.predict_file=mine.jsonl")


@pytest.mark.parametrize(
    ("scope", "format"),
    [("LoRA", "adapter"), *(pytest.param("LayerScope", name, marks=pytest.mark.slow) for name in ("delta", "merged"))],
)
def test_an_exported_folder_predicts_as_its_run(options, tmp_path, capsys, scope, format):
    tune = [f"--model.scope={scope}", "--model.layer=1", "--model.optimizer.lr=0.5", "--trainer.max_steps=2"]
    tune.append("--data.max_length=8")  # shorter than some rows
    assert main(["fit", *options, *tune, "--record.test_before=false"]) == 0
    assert main(["export", "--ckpt_path=best", "--output=out", f"--format={format}"]) == 0
    write_lines("mine.jsonl", [{"sentence": text} for text in TEXTS])
    rows = ["--data.predict_file=mine.jsonl"]
    assert main(["predict", "--ckpt_path=runs/version_0", *rows, "--output=run.jsonl"]) == 0
    base = [] if format == "merged" else [option for option in options if option.startswith("--model.model=")]
    capsys.readouterr()
    if base:
        line = error_line(capsys, "predict", "--ckpt_path=out", *rows)
        assert "its base model is not public" in line
        assert "give a copy with --model.model" in line
    assert main(["predict", "--ckpt_path=out", *rows, *base, "--output=out.jsonl"]) == 0
    assert "untuned" not in capsys.readouterr().out
    other_model = "" if base else "model: {model: not_used}\n"  # a whole model has its own tokenizer
    (tmp_path / "task.yaml").write_text(other_model + "data: {task: sst2, max_length: 8}")
    assert main(["predict", "--config=task.yaml", "--ckpt_path=out", *rows, *base, "--output=again.jsonl"]) == 0
    assert read_lines(tmp_path / "again.jsonl") == read_lines(tmp_path / "out.jsonl")
    if format == "adapter":
        assert main(["predict", "--ckpt_path=out", *rows, *base, "--model.dtype=bfloat16", "--output=half.jsonl"]) == 0
        half = read_lines(tmp_path / "half.jsonl")[0]["probabilities"]
        assert half != pytest.approx(read_lines(tmp_path / "out.jsonl")[0]["probabilities"], abs=1e-6)
    for mine, theirs in zip(read_lines(tmp_path / "out.jsonl"), read_lines(tmp_path / "run.jsonl"), strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert main(["predict", *options, *rows, "--output=untuned.jsonl"]) == 0
    untuned, tuned = (
        [line["scores"][0] for line in read_lines(tmp_path / f"{name}.jsonl")] for name in ("untuned", "out")
    )
    assert untuned != pytest.approx(tuned, abs=1e-4)


def test_another_file_needs_another_data_module(tmp_path, model_dir):
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", [{"sentence": name}])
    rows = TaskData("sst2", tokenizer=str(model_dir), predict_file=str(tmp_path / "a.jsonl"))
    rows.setup("predict")
    (row,) = rows.rows("predict")
    assert row.example.prompt == "a It was"
    rows.predict_file = str(tmp_path / "b.jsonl")
    with pytest.raises(
        SlzoError, match=r"data.predict_file .*b.jsonl: was .*a.jsonl when the rows were read; make a new"
    ):
        rows.setup("predict")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_score_is_never_that_of_the_file(stage, sst2_options, capsys):
    write_lines("mine.jsonl", [{"sentence": "a"}])
    assert main([stage, *sst2_options, "--data.predict_file=mine.jsonl"]) == 0
    assert "data.predict_file 'mine.jsonl': not used" in capsys.readouterr().err


def test_an_export_of_an_own_task_needs_its_config(capsys, tmp_path):
    (tmp_path / "slzo.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    line = error_line(capsys, "predict", f"--ckpt_path={tmp_path}")
    assert "does not hold its task, a class of your own; give its config, as in " in line
