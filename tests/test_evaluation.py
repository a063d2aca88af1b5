"""Scoring commands: zero-shot, in-context learning, predictions, generation tasks, training on the metric."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import LossAt, make_tokenizer, run_dir, tiny_model

from slzo.__main__ import main
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.losses import candidate_scores
from slzo.batches.packing import pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import EvalCollator, Row, TrainCollator, plan_batches
from slzo.data.encoding import Encoder
from slzo.datamodule import TaskDataModule
from slzo.utils.errors import SlzoError
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.metrics import token_f1
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.tasks.base import Example
from slzo.trainer import ZOTrainer
from slzo.zo.objectives import AnswerF1, CandidateCrossEntropy, CandidateErrors


@pytest.fixture(scope="module")
def squad_dir(tmp_path_factory):
    """Made-up SQuAD rows: several questions per context."""
    folder = tmp_path_factory.mktemp("data") / "squad"
    folder.mkdir()
    generator = random.Random(2)
    for name, count in (("train", 24), ("validation", 10)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                word = generator.choice(["red", "green", "blue"])
                row = {
                    "id": f"{name}{number}",
                    "title": "Colours",
                    "context": f"In {name} {number // 3} the film is about colours.",
                    "question": f"Which one is {word}?" + " Really?" * (number % 2),
                    "answers": {"text": [word, f"the {word}"], "answer_start": [0, 0]},
                }
                file.write(json.dumps(row) + "\n")
    return folder.parent


@pytest.fixture
def options(sst2_options):
    return sst2_options


@pytest.fixture
def squad_options(model_dir, squad_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [
        f"--model.model={model_dir}",
        "--data.task=squad",
        f"--data.data_dir={squad_dir}",
        "--trainer.accelerator=cpu",
    ]


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def only_validation(data_dir, folder, task):
    (folder / task).mkdir(parents=True)
    text = (data_dir / task / "validation.jsonl").read_text()
    (folder / task / "validation.jsonl").write_text(text)
    return folder


def run_trainer(command, model_dir, data_dir, task, tmp_path, *, data=None, **model):
    """Result of a trainer command with the Python interface."""
    module = ZOModule(str(model_dir), **model)
    datamodule = TaskDataModule(task, str(model_dir), data_dir=str(data_dir), **(data or {}))
    trainer = ZOTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, max_steps=2,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    result = getattr(trainer, command)(module, datamodule=datamodule)
    return result, module, datamodule, trainer


def test_scoring_needs_no_training_split(options, data_dir, tmp_path, capsys):
    folder = only_validation(data_dir, tmp_path / "rows", "sst2")
    options = [o for o in options if "data_dir" not in o] + [f"--data.data_dir={folder}"]
    assert main(["test", *options]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["predict", *options]) == 0
    assert main(["validate", *options]) == 2
    assert "train split of task 'sst2' is missing" in capsys.readouterr().err
    assert main(["test", *options, "--data.num_demonstrations=2"]) == 2
    assert "train split of task 'sst2' is missing" in capsys.readouterr().err


def test_predict_writes_the_rows_in_file_order(options, data_dir, capsys):
    assert main(["predict", *options]) == 0
    assert "untuned model" in capsys.readouterr().out
    found = list(Path("runs").glob("*/predictions.jsonl"))
    assert len(found) == 1
    lines = read_lines(found[0])
    rows = read_lines(data_dir / "sst2" / "validation.jsonl")
    assert [line["id"] for line in lines] == [str(row["idx"]) for row in rows]
    assert [line["prompt"] for line in lines] == [f"{row['sentence']} It was" for row in rows]
    assert [line["gold"] for line in lines] == [row["label"] for row in rows]
    for line in lines:
        assert set(line) == {"id", "prompt", "prediction", "prediction_text", "scores", "gold"}
        assert len(line["scores"]) == 2
        assert line["prediction"] == line["scores"].index(max(line["scores"]))
        assert line["prediction_text"] == (" terrible", " great")[line["prediction"]]


def test_predict_agrees_with_test_and_takes_an_output_file(options, model_dir, data_dir, tmp_path):
    assert main(["predict", *options, "--output=here.jsonl"]) == 0
    lines = read_lines("here.jsonl")
    result, *_ = run_trainer("test", model_dir, data_dir, "sst2", tmp_path)
    right = sum(line["prediction"] == line["gold"] for line in lines)
    assert result[0]["test/accuracy"] == pytest.approx(right / len(lines))


def test_output_must_be_a_file_in_a_folder_that_exists(options, capsys):
    assert main(["predict", *options, "--output=nowhere/here.jsonl"]) == 2
    assert "output 'nowhere/here.jsonl'" in capsys.readouterr().err


def test_predict_takes_the_tuned_layer_of_a_checkpoint(options):
    fit = ["--model.layer=1", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.optimizer=SGD",
           "--model.optimizer.lr=0.05", "--data.num_train=20", "--data.num_dev=8"]  # fmt: skip
    assert main(["fit", *options, *fit]) == 0
    assert main(["predict", *options, "--output=before.jsonl"]) == 0
    assert main(["predict", *options, "--ckpt_path=last", "--output=after.jsonl"]) == 0
    before, after = (read_lines(f"{name}.jsonl") for name in ("before", "after"))
    assert [line["id"] for line in before] == [line["id"] for line in after]
    assert [line["scores"] for line in before] != [line["scores"] for line in after]


@pytest.mark.slow
def test_predict_on_two_processes_writes_the_same_file(options):
    assert main(["predict", *options, "--output=one.jsonl"]) == 0
    command = [sys.executable, "-m", "slzo", "predict", *options, "--output=two.jsonl"]
    subprocess.run([*command, "--trainer.devices=2", "--trainer.strategy=ddp"], check=True, timeout=300)
    one, two = read_lines("one.jsonl"), read_lines("two.jsonl")
    for ours, theirs in zip(one, two, strict=True):
        assert theirs.pop("scores") == pytest.approx(ours.pop("scores"), abs=1e-4)
        assert ours == theirs


def test_generation_tasks_report_f1_exact_match_and_loss(squad_options, model_dir, squad_dir, tmp_path):
    assert main(["predict", *squad_options, "--output=here.jsonl"]) == 0
    lines = read_lines("here.jsonl")
    rows = read_lines(squad_dir / "squad" / "validation.jsonl")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["gold"] for line in lines] == [row["answers"]["text"] for row in rows]
    assert all(line["scores"] is None and line["prediction"] == line["prediction_text"] for line in lines)
    assert all("\n" not in line["prediction"] for line in lines)
    result, module, datamodule, _ = run_trainer("test", model_dir, squad_dir, "squad", tmp_path)
    metrics = datamodule.make_metrics()
    metrics.update([row.example for row in datamodule.rows("test")], [line["prediction"] for line in lines])
    for name, value in metrics.compute().items():
        assert result[0][f"test/{name}"] == pytest.approx(float(value))
    packed = pack([row.encoded for row in datamodule.rows("test")])
    tokens = module.parts.logits(packed).log_softmax(-1)[packed.token_needed, packed.token_id]
    assert result[0]["test/loss"] == pytest.approx(-float(tokens.mean()), rel=1e-4)


def test_long_prompts_are_profiled_few_at_once(model_dir, data_dir, monkeypatch):
    datamodule = TaskDataModule("sst2", str(model_dir), data_dir=str(data_dir), num_train=20, num_dev=8)
    datamodule.setup("fit")
    (whole,) = datamodule.profile_batches(12, 16)
    monkeypatch.setattr("slzo.datamodule._PROMPT_TOKENS", 3 * max(whole.example_tokens))
    parts = datamodule.profile_batches(12, 16)
    assert len(parts) > 2
    assert all(part.num_tokens <= 3 * max(whole.example_tokens) for part in parts)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)


def test_demonstrations_are_in_evaluation_batches_only(model_dir, data_dir):
    zero = TaskDataModule("sst2", str(model_dir), data_dir=str(data_dir), num_train=40, num_dev=8)
    few = TaskDataModule("sst2", str(model_dir), data_dir=str(data_dir), num_train=40, num_dev=8, num_demonstrations=3)
    for datamodule in (zero, few):
        datamodule.setup("fit")
    assert few.rows("train") == zero.rows("train")
    assert few.demonstrations == few.splits.train[:3]
    assert len({example.id for example in few.demonstrations}) == 3
    tokenizer = few.encoder.tokenizer
    shown = "\n\n".join(example.prompt + example.candidates[example.gold[0]] for example in few.demonstrations)
    for split in ("dev", "test"):
        for row, plain in zip(few.rows(split), zero.rows(split), strict=True):
            for sequence, candidate in zip(row.encoded.sequences, row.example.candidates, strict=True):
                assert tokenizer.decode(sequence.ids) == f"{shown}\n\n{row.example.prompt}{candidate}"
            assert [s.num_answer for s in row.encoded.sequences] == [s.num_answer for s in plain.encoded.sequences]


def test_demonstrations_depend_on_the_seed_and_come_before_generated_answers(model_dir, squad_dir):
    def setup(seed):
        datamodule = TaskDataModule(
            "squad", str(model_dir), data_dir=str(squad_dir), num_train=16, num_dev=4, num_demonstrations=2, seed=seed
        )
        datamodule.setup("test")
        return datamodule

    first, again, other = setup(0), setup(0), setup(5)
    assert first.demonstrations == again.demonstrations != other.demonstrations
    text = first.encoder.tokenizer.decode(first.rows("test")[0].prompt)
    assert text.count("Answer:") == 3
    assert text.endswith("Answer:")


def test_in_context_learning_changes_the_score(model_dir, data_dir, tmp_path):
    zero, *_ = run_trainer("test", model_dir, data_dir, "sst2", tmp_path)
    data = {"num_train": 40, "num_dev": 8, "num_demonstrations": 4}
    few, *_ = run_trainer("test", model_dir, data_dir, "sst2", tmp_path, data=data)
    assert zero[0]["test/loss"] != few[0]["test/loss"]


def test_more_demonstrations_than_training_rows(options, capsys):
    assert main(["test", *options, "--data.num_train=20", "--data.num_demonstrations=21"]) == 2
    assert "data.num_demonstrations 21: only 20 training rows" in capsys.readouterr().err
    assert main(["test", *options, "--data.num_demonstrations=-1"]) == 2


def test_a_data_module_used_for_test_can_train_after(model_dir, data_dir):
    datamodule = TaskDataModule("sst2", str(model_dir), data_dir=str(data_dir), num_train=20, num_dev=8)
    datamodule.setup("test")
    before = datamodule.rows("test")
    assert not datamodule.splits.train
    datamodule.setup("fit")
    assert len(datamodule.splits.train) == 20
    assert datamodule.rows("test") == before
    keys = [row.encoded.index for split in ("train", "dev", "test") for row in datamodule.rows(split)]
    assert len(set(keys)) == len(keys)


def make_evaluator(parts):
    return Evaluator(parts, make_tokenizer(), CandidateCrossEntropy())


def make_rows(texts):
    encoder = Encoder(make_tokenizer(), 200)
    examples = [Example(str(i), text, (" great", " bad"), (i % 2,)) for i, text in enumerate(texts)]
    return [Row(example, encoder.encode(example, i), i) for i, example in enumerate(examples)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_row_is_planned_once(world_size):
    for texts in (
        [f"{'a' * (i % 5 + 1)}{i} film" for i in range(20)],
        [f"{'film ' * (i // 4 + 2)}{i}" for i in range(20)],
    ):
        rows = make_rows(texts)
        plans = [
            plan_batches(rows, max_rows=4, max_tokens=60, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        seen = [row.position for plan in plans for batch in plan.batches for row in batch]
        assert sorted(seen) == list(range(20))
        assert all(len(batch) <= 4 for plan in plans for batch in plan.batches)
        assert len({plan.share for plan in plans}) == 1


def test_rows_with_one_beginning_are_shared_and_scored_alike():
    paragraph = "A film about a good movie that was bad. "
    rows = make_rows([f"{paragraph * (1 + i // 4)}{i} It was" for i in range(12)])
    plan = plan_batches(rows, max_rows=8, max_tokens=10_000)
    assert plan.share
    parts = ModelParts(tiny_model())
    evaluator = make_evaluator(parts)
    tokens = 0
    for members in plan.batches:
        batch = EvalCollator(share_rows=True)(members)
        outcome = evaluator(batch)
        tokens += batch.packed.num_tokens
        alone = [evaluator(EvalCollator()([row])) for row in members]
        for scores, one in zip(outcome.scores, alone, strict=True):
            assert scores == pytest.approx(one.scores[0], abs=1e-4)
        assert float(outcome.loss.total) == pytest.approx(sum(float(one.loss.total) for one in alone), abs=1e-3)
    assert tokens < 0.6 * sum(len(row.encoded.sequences[0].ids) for row in rows)


def test_unlabelled_rows_do_not_count_in_the_loss():
    rows = make_rows(["one It was", "two It was"])
    blank = Example("x", "three It was", (" great", " bad"))
    mixed = [*rows, Row(blank, Encoder(make_tokenizer()).encode(blank, 2), 2)]
    evaluator = make_evaluator(ModelParts(tiny_model()))
    labelled, all_rows = (evaluator(EvalCollator()(part)) for part in (rows, mixed))
    assert float(all_rows.loss.weight) == 2
    assert float(all_rows.loss.total) == pytest.approx(float(labelled.loss.total), abs=1e-4)
    assert len(all_rows.predictions) == 3


def test_errors_are_one_minus_accuracy_with_any_right_candidate():
    tokenizer = make_tokenizer()
    parts = ModelParts(tiny_model())
    golds = [(0,), (1,), (0, 2), (1, 2), (2,), ()]
    examples = [Example(str(i), f"film {i} It was", (" a", " good", " movie"), gold) for i, gold in enumerate(golds)]
    rows = [Row(e, Encoder(tokenizer).encode(e, i), i) for i, e in enumerate(examples)]
    batch = TrainCollator()(rows)
    best = make_evaluator(parts)(EvalCollator()(rows)).predictions
    wrong = sum(index not in gold for index, gold in zip(best, golds, strict=True) if gold)
    errors = CandidateErrors().of_scores(candidate_scores(parts.logits(batch.packed), batch.packed), batch.packed)
    assert (float(errors.total), float(errors.weight)) == (wrong, 5)


@pytest.mark.parametrize("task", ["sst2", "squad"])
def test_training_on_the_metric(task, model_dir, data_dir, squad_dir, tmp_path):
    folder = {"sst2": data_dir, "squad": squad_dir}[task]
    seen = []

    class Recording(ZOModule):
        def loss_of(self, batch, *args):
            loss = super().loss_of(batch, *args)

            def at(points):
                losses = loss.at(points)
                for point, value in zip(points, losses.tolist(), strict=True):
                    self.tuned_tensors.write(point.direction, point.scale)
                    metrics = self.datamodule.make_metrics()
                    found = self.evaluator(EvalCollator()(batch.rows)).predictions
                    metrics.update([row.example for row in batch.rows], found)
                    seen.append((value, 1 - float(metrics.compute()[self.datamodule.task.metric])))
                return losses

            return LossAt(at)

    options = {"data_dir": str(folder), "num_train": 16, "num_dev": 4, "batch_size": 8}
    datamodule = TaskDataModule(task, str(model_dir), objective="metric", **options)
    module = Recording(str(model_dir), layer=1, eps=0.1, optimizer=partial(torch.optim.SGD, lr=3e-4))
    trainer = ZOTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, max_steps=3,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    assert trainer.global_step == 3
    assert len(seen) == 6
    for loss, expected in seen:
        assert loss == pytest.approx(expected, abs=1e-6)
    if task == "sst2":
        assert len({loss for loss, _ in seen}) > 1


def test_missing_f1_is_that_of_the_generated_answers():
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, 200)
    evaluator = make_evaluator(ModelParts(tiny_model()))

    def rows(references):
        examples = [Example(str(i), f"film {i}:", (" x\n",), (0,), references[i]) for i in range(6)]
        return tuple(Row(e, encoder.encode(e, i), i, encoder.encode_prompt(e)) for i, e in enumerate(examples))

    texts = [answer.text for answer in evaluator.answers(rows([("x",)] * 6))]
    assert sum(bool(text) for text in texts) >= 4
    references = [(text, "y") if i < 3 else ("nothing like it",) for i, text in enumerate(texts)]
    expected = [1 - token_f1(text, wanted) for text, wanted in zip(texts, references, strict=True)]
    assert 0 < sum(expected) < 6
    labelled = rows(references)
    again = [answer.text for answer in evaluator.answers(labelled)]
    assert AnswerF1().of_answers(again, [row.example for row in labelled]) == expected


def test_a_run_that_trains_f1_is_judged_by_it(squad_options):
    """Not by the loss of the gold answers, which it does not see."""
    judge = TaskDataModule("squad", objective="metric").judge
    assert (judge.name, judge.mode, judge.distance({"f1": 0.75, "loss": 9.0})) == ("f1", "max", 0.25)
    assert TaskDataModule("squad", objective="loss").judge.name == "loss"
    assert TaskDataModule("sst2", objective="metric").judge.name == "loss"
    options = ["--data.objective=metric", "--model.eps=0.3", "--model.optimizer=SGD", "--model.optimizer.lr=1"]
    assert main(["fit", *squad_options, *options, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]) == 0
    state = read_checkpoint(run_dir() / "checkpoints" / "last.ckpt").content["callbacks"]
    assert any("val/f1" in name and "'max'" in name for name in state)
    summary = json.loads((run_dir() / "summary.json").read_text(encoding="utf-8"))
    assert all(0 <= point["loss"] <= 1 for point in summary["validations"])


def test_objective_must_be_known(options, capsys):
    assert main(["fit", *options, "--data.objective=accuracy"]) == 2
    assert "data.objective" in capsys.readouterr().err
    with pytest.raises(SlzoError, match=r"data\.objective 'accuracy': choose loss, metric"):
        TaskDataModule("sst2", objective="accuracy")


def test_scores_of_a_batch_equal_those_of_the_whole_model(model_dir, data_dir, tmp_path):
    _, module, datamodule, _ = run_trainer("test", model_dir, data_dir, "sst2", tmp_path)
    with torch.no_grad():
        for batch in datamodule.test_dataloader():
            ours = [score for scores in module.evaluator(batch).scores for score in scores]
            plain = candidate_scores(module.parts.logits(batch.packed), batch.packed).tolist()
            assert ours == pytest.approx(plain, abs=1e-5)


def test_class_weights_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=generator)
    gold = torch.tensor([0, 1, -1, 1])
    examples = [EncodedExample(i, tuple(EncodedSequence((5, 6 + slot), 1) for slot in range(2)), ()) for i in range(4)]
    batch = replace(pack(examples), gold=gold)
    total, weight = CandidateCrossEntropy([1.0, 3.0]).of_scores(scores, batch)
    expected = torch.nn.functional.cross_entropy(scores.view(4, 2), gold, torch.tensor([1.0, 3.0]), ignore_index=-1)
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(SlzoError, match=r"class_weights \[1.0\]: the task has 2 candidates; give a weight for each"):
        CandidateCrossEntropy([1.0]).of_scores(scores, batch)
    with pytest.raises(SlzoError, match=r"class_weights \[0.0, 1.0\]: give a number above 0 for each candidate"):
        CandidateCrossEntropy([0.0, 1.0])
