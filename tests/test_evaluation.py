"""Scoring commands: zero-shot, in-context learning, predictions, generation tasks, training on the metric."""

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import error_line, last_checkpoint, read_lines, run_dir, summary, tiny_model, write_lines

from slzo.__main__ import main
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import Row, TrainBatch, eval_batch, plan_batches
from slzo.data.encoding import Encoder
from slzo.datamodule import TaskDataModule
from slzo.evaluation.evaluator import Evaluator, Outcome, records
from slzo.evaluation.metrics import TaskMetrics
from slzo.lightning.trainer import ZOTrainer
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.rewards.answers import token_f1
from slzo.task_data import TaskData
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError
from slzo.zo.objectives import AnswerF1, AnswerLikelihood, CandidateCrossEntropy, CandidateErrors
from slzo.zo.stepper import Stepper
from tiny import make_tokenizer


@pytest.fixture(scope="module")
def squad_dir(tmp_path_factory):
    """Made-up SQuAD rows: several questions per context."""
    folder, generator = tmp_path_factory.mktemp("data") / "squad", random.Random(2)
    for name, count in (("train", 24), ("validation", 10)):
        rows = []
        for number in range(count):
            word = generator.choice(["red", "green", "blue"])
            row = {"id": f"{name}{number}", "title": "Colours", "answers": {"text": [word, f"the {word}"]}}
            row["context"] = f"In {name} {number // 3} the film is about colours."
            row["question"] = f"Which one is {word}?" + " Really?" * (number % 2)
            row["answers"]["answer_start"] = [0, 0]
            rows.append(row)
        write_lines(folder / f"{name}.jsonl", rows)
    return folder.parent


@pytest.fixture
def squad_options(sst2_options, squad_dir):
    return [*sst2_options, "--data.task=squad", f"--data.data_dir={squad_dir}"]


def quiet_trainer(folder, **options):
    """A trainer that writes nothing."""
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    return ZOTrainer(accelerator="cpu", default_root_dir=folder, **off, **options)


def scored(model_dir, data_dir, task, folder, **options):
    """Results of ``test`` in Python, with what was used."""
    module = ZOModule(str(model_dir))
    rows = TaskDataModule(task, str(model_dir), data_dir=str(data_dir), **options)
    return quiet_trainer(folder).test(module, datamodule=rows)[0], module, rows


def set_up(task, model_dir, data_dir, stage="fit", **options):
    rows = TaskData(task, str(model_dir), data_dir=str(data_dir), **{"num_train": 20, "num_dev": 8, **options})
    rows.setup(stage)
    return rows


def test_scoring_needs_no_training_split(sst2_options, data_dir, tmp_path, capsys):
    (tmp_path / "rows" / "sst2").mkdir(parents=True)
    shutil.copy(data_dir / "sst2" / "validation.jsonl", tmp_path / "rows" / "sst2")
    options = [*sst2_options, "--data.data_dir=rows"]
    assert main(["test", *options]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["predict", *options]) == 0
    for command in (["validate"], ["test", "--data.num_demonstrations=2"]):
        assert "train split of task 'sst2' is missing" in error_line(capsys, *command, *options)


def test_predict_writes_the_rows_in_file_order(sst2_options, data_dir, capsys):
    assert main(["predict", *sst2_options]) == 0
    assert "untuned model" in capsys.readouterr().out
    lines = read_lines(run_dir() / "predictions.jsonl")
    rows = read_lines(data_dir / "sst2" / "validation.jsonl")
    assert [line["id"] for line in lines] == [str(row["idx"]) for row in rows]
    assert [line["prompt"] for line in lines] == [f"{row['sentence']} It was" for row in rows]
    assert [line["gold"] for line in lines] == [row["label"] for row in rows]
    for line in lines:
        assert set(line) == {"id", "prompt", "prediction", "prediction_text", "scores", "probabilities", "gold"}
        assert len(line["scores"]) == 2
        assert line["prediction"] == line["scores"].index(max(line["scores"]))
        assert line["prediction_text"] == (" terrible", " great")[line["prediction"]]


def test_the_reported_loss_uses_class_weights(sst2_options, model_dir, data_dir, tmp_path):
    weights = [1.0, 3.0]
    options = [*sst2_options, "--data.objective=CandidateCrossEntropy", f"--data.objective.class_weights={weights}"]
    assert main(["predict", *options, "--output=here.jsonl"]) == 0
    lines = read_lines("here.jsonl")
    scores, gold = (torch.tensor([line[name] for line in lines]) for name in ("scores", "gold"))
    expected = torch.nn.functional.cross_entropy(scores, gold, torch.tensor(weights))
    result, _, _ = scored(model_dir, data_dir, "sst2", tmp_path, objective=CandidateCrossEntropy(weights))
    assert result["test/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_predict_agrees_with_test_and_takes_an_output_file(sst2_options, model_dir, data_dir, tmp_path):
    assert main(["predict", *sst2_options, "--output=here.jsonl"]) == 0
    lines = read_lines("here.jsonl")
    result, _, _ = scored(model_dir, data_dir, "sst2", tmp_path)
    right = sum(line["prediction"] == line["gold"] for line in lines)
    assert result["test/accuracy"] == pytest.approx(right / len(lines))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["predict", "--output=."], "output '.': not a file; give one such as predictions.jsonl"),
        (["test", "--data.num_train=20", "--data.num_demonstrations=21"], "21: only 20 labelled training rows"),
        (["test", "--data.num_demonstrations=-1"], "data.num_demonstrations -1"),
        (["fit", "--data.objective=accuracy"], "data.objective"),
    ],
)
def test_wrong_options_are_one_line(sst2_options, command, message, capsys):
    assert message in error_line(capsys, *command, *sst2_options)


def test_predict_takes_the_tuned_layer_of_a_checkpoint(sst2_options):
    fit = ["--model.layer=1", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.optimizer=SGD"]
    fit += ["--model.optimizer.lr=0.05", "--data.num_train=20", "--data.num_dev=8"]
    assert main(["fit", *sst2_options, *fit]) == 0
    assert main(["predict", *sst2_options, "--output=before.jsonl"]) == 0
    assert main(["predict", *sst2_options, "--ckpt_path=last", "--output=after.jsonl"]) == 0
    before, after = (read_lines(f"{name}.jsonl") for name in ("before", "after"))
    assert [line["id"] for line in before] == [line["id"] for line in after]
    assert [line["scores"] for line in before] != [line["scores"] for line in after]


@pytest.mark.slow
def test_predict_on_two_processes_writes_the_same_file(sst2_options):
    assert main(["predict", *sst2_options, "--output=one.jsonl"]) == 0
    command = [sys.executable, "-m", "slzo", "predict", *sst2_options, "--output=two.jsonl"]
    subprocess.run([*command, "--trainer.devices=2", "--trainer.strategy=ddp"], check=True, timeout=300)
    one, two = read_lines("one.jsonl"), read_lines("two.jsonl")
    for ours, theirs in zip(one, two, strict=True):
        for name in ("scores", "probabilities"):
            assert theirs.pop(name) == pytest.approx(ours.pop(name), abs=1e-4)
        assert ours == theirs


def test_generation_tasks_report_f1_exact_match_and_loss(squad_options, model_dir, squad_dir, tmp_path):
    assert main(["predict", *squad_options, "--output=here.jsonl"]) == 0
    lines = read_lines("here.jsonl")
    rows = read_lines(squad_dir / "squad" / "validation.jsonl")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["gold"] for line in lines] == [row["answers"]["text"] for row in rows]
    assert all(line["scores"] is None and line["prediction"] == line["prediction_text"] for line in lines)
    assert all("\n" not in line["prediction"] for line in lines)
    result, module, datamodule = scored(model_dir, squad_dir, "squad", tmp_path)
    metrics = TaskMetrics(datamodule.task)
    metrics.update([row.example for row in datamodule.rows("test")], [line["prediction"] for line in lines])
    for name, value in metrics.compute().items():
        assert result[f"test/{name}"] == pytest.approx(float(value))
    packed = pack([row.encoded for row in datamodule.rows("test")])
    tokens = needed_logits(module.parts, packed).log_softmax(-1)[packed.token_logit, packed.token_id]
    assert result["test/loss"] == pytest.approx(-float(tokens.mean()), rel=1e-4)


def test_long_prompts_are_profiled_few_at_once(model_dir, data_dir, monkeypatch):
    rows = set_up("sst2", model_dir, data_dir)
    (whole,) = rows.profile_batches(12)
    monkeypatch.setattr("slzo.data.row_encoding._PROMPT_TOKENS", 3 * max(whole.example_tokens))
    parts = rows.profile_batches(12)
    assert len(parts) > 2
    assert all(part.num_tokens <= 3 * max(whole.example_tokens) for part in parts)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)


def test_demonstrations_are_in_evaluation_batches_only(model_dir, data_dir):
    zero, few = (set_up("sst2", model_dir, data_dir, num_demonstrations=number) for number in (0, 3))
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
    options = {"num_train": 16, "num_dev": 4, "num_demonstrations": 2}
    first, again, other = (set_up("squad", model_dir, squad_dir, "test", seed=seed, **options) for seed in (0, 0, 5))
    assert first.demonstrations == again.demonstrations != other.demonstrations
    text = first.encoder.tokenizer.decode(first.rows("test")[0].prompt)
    assert text.count("Answer:") == 3
    assert text.endswith("Answer:")


def test_rows_used_for_test_can_train_after(model_dir, data_dir):
    rows = set_up("sst2", model_dir, data_dir, "test")
    before = rows.rows("test")
    assert not rows.splits.train
    rows.setup("fit")
    assert len(rows.splits.train) == 20
    assert rows.rows("test") == before
    keys = [row.encoded.index for split in ("train", "dev", "test") for row in rows.rows(split)]
    assert len(set(keys)) == len(keys)


def make_evaluator(parts):
    return Evaluator(parts, make_tokenizer(), CandidateCrossEntropy())


def make_rows(texts):
    encoder = Encoder(make_tokenizer(), 200)
    examples = [Example(str(i), text, (" great", " bad"), (i % 2,)) for i, text in enumerate(texts)]
    return [Row(example, encoder.encode(example, i), i) for i, example in enumerate(examples)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("text", ["a", "film "])
def test_each_row_is_planned_once(world_size, text):
    texts = [f"{text * (i // 4 + 2)}{i}" for i in range(20)]
    rows = make_rows(texts)
    plans = [plan_batches(rows, 4, max_tokens=60, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [row.position for plan in plans for batch in plan.batches for row in batch]
    assert sorted(seen) == list(range(20))
    assert all(len(batch) <= 4 for plan in plans for batch in plan.batches)
    assert len({plan.shares_beginnings for plan in plans}) == 1


@pytest.mark.parametrize(("start", "shares"), [("A good movie ", True), ("", False)])
def test_all_candidates_count_as_tokens_of_a_batch(start, shares):
    encoder, candidates = Encoder(make_tokenizer(), 200), tuple(f" {n} good film" for n in range(9))
    examples = [Example(str(n), f"{start}{n} film {n} It was", candidates, (0,)) for n in range(12)]
    rows = [Row(example, encoder.encode(example, n), n) for n, example in enumerate(examples)]
    plan = plan_batches(rows, 64, max_tokens=200)
    assert plan.shares_beginnings is shares
    tokens = [plan.pack(batch).packed.num_tokens for batch in plan.batches]
    assert max(tokens) <= 200
    assert tokens[0] + tokens[1] > 200  # no batch is smaller than it must be


def test_rows_with_one_beginning_are_shared_and_scored_alike():
    paragraph = "A film about a good movie that was bad. "
    rows = make_rows([f"{paragraph * (1 + i // 4)}{i} It was" for i in range(12)])
    plan = plan_batches(rows, max_rows=8, max_tokens=10_000)
    assert plan.shares_beginnings
    parts = ModelParts(tiny_model())
    evaluator = make_evaluator(parts)
    tokens = 0
    for members in plan.batches:
        batch = plan.pack(members)
        outcome = evaluator(batch)
        tokens += batch.packed.num_tokens
        alone = [evaluator(eval_batch([row])) for row in members]
        for scores, one in zip(outcome.scores, alone, strict=True):
            assert scores == pytest.approx(one.scores[0], abs=1e-4)
        assert float(outcome.loss[0]) == pytest.approx(sum(float(one.loss[0]) for one in alone), abs=1e-3)
    assert tokens < 0.6 * sum(len(row.encoded.sequences[0].ids) for row in rows)


def test_the_loss_of_one_token_candidates_takes_their_logits_alone(monkeypatch):
    parts, widths, head = ModelParts(tiny_model()), [], ModelParts.head

    def recorded(*args):
        logits = head(*args)
        widths.append(logits.shape[1])
        return logits

    monkeypatch.setattr(ModelParts, "head", recorded)
    evaluator, batch = make_evaluator(parts), eval_batch(make_rows([f"{i} film It was" for i in range(9)]))
    whole, alone = evaluator(batch), evaluator(batch, log_likelihoods=False)
    assert widths == [parts.model.config.vocab_size, 2]
    assert alone.predictions == whole.predictions
    assert float(alone.loss[0]) == pytest.approx(float(whole.loss[0]), abs=1e-4)
    assert (len(whole.scores), alone.scores) == (9, [])
    encoder, example = Encoder(make_tokenizer(), 200), Example("0", "It was", (" a good", " bad"), (0,))
    longer = eval_batch([Row(example, encoder.encode(example, 0), 0)])
    whole, alone = evaluator(longer), evaluator(longer, log_likelihoods=False)
    assert (alone.predictions, alone.scores) == (whole.predictions, whole.scores)
    assert torch.equal(alone.loss, whole.loss)


def test_the_likelihood_of_a_candidate_of_one_token_takes_all_logits():
    evaluator = Evaluator(ModelParts(tiny_model()), make_tokenizer(), AnswerLikelihood())
    batch = eval_batch(make_rows([f"{i} film It was" for i in range(9)]))
    whole, alone = evaluator(batch), evaluator(batch, log_likelihoods=False)
    assert alone.scores == whole.scores
    assert torch.equal(alone.loss, whole.loss)
    expected = -sum(scores[row.example.gold[0]] for row, scores in zip(batch.rows, whole.scores, strict=True))
    assert whole.loss.tolist() == pytest.approx([expected, 9], abs=1e-4)


def test_records_are_json_with_scores_that_are_not_numbers():
    batch = eval_batch(make_rows(["one It was"]))
    (record,) = records(batch, Outcome([0], [[math.nan, -1.0]], torch.zeros(2)))
    json.dumps(record, allow_nan=False)
    assert record["scores"] == [None, -1.0]


def test_unlabelled_rows_do_not_count_in_the_loss():
    rows = make_rows(["one It was", "two It was"])
    blank = Example("x", "three It was", (" great", " bad"))
    mixed = [*rows, Row(blank, Encoder(make_tokenizer()).encode(blank, 2), 2)]
    evaluator = make_evaluator(ModelParts(tiny_model()))
    labelled, all_rows = (evaluator(eval_batch(part)) for part in (rows, mixed))
    assert float(all_rows.loss[1]) == 2
    assert float(all_rows.loss[0]) == pytest.approx(float(labelled.loss[0]), abs=1e-4)
    assert len(all_rows.predictions) == 3


def test_errors_are_one_minus_accuracy_with_any_right_candidate():
    tokenizer = make_tokenizer()
    parts = ModelParts(tiny_model())
    golds = [(0,), (1,), (0, 2), (1, 2), (2,), ()]
    examples = [Example(str(i), f"film {i} It was", (" a", " good", " movie"), gold) for i, gold in enumerate(golds)]
    rows = [Row(e, Encoder(tokenizer).encode(e, i), i) for i, e in enumerate(examples)]
    batch = TrainBatch(pack([row.encoded for row in rows]), tuple(rows))
    best = make_evaluator(parts)(eval_batch(rows)).predictions
    wrong = sum(index not in gold for index, gold in zip(best, golds, strict=True) if gold)
    errors = CandidateErrors().row_losses(needed_logits(parts, batch.packed), batch.packed, False).sum()
    assert errors.tolist() == [wrong, 5]


@pytest.mark.parametrize("task", ["sst2", pytest.param("squad", marks=pytest.mark.slow)])
def test_training_on_the_metric(task, model_dir, data_dir, squad_dir, tmp_path, monkeypatch):
    folder = {"sst2": data_dir, "squad": squad_dir}[task]
    options = {"data_dir": str(folder), "num_train": 16, "num_dev": 4, "batch_size": 8}
    datamodule = TaskDataModule(task, str(model_dir), objective="metric", **options)
    seen, real = [], Stepper.loss

    def recorded(stepper, batch, step=0, *more, **named):
        loss = real(stepper, batch, step, *more, **named)
        losses_at = loss.at

        def at(points):
            losses = losses_at(points)
            for point, value in zip(points, losses.tolist(), strict=True):
                stepper.model.tensors.write(point)
                metrics = TaskMetrics(datamodule.task)
                predictions = stepper.evaluator(eval_batch(batch.rows)).predictions
                metrics.update([row.example for row in batch.rows], predictions)
                seen.append((value, 1 - float(metrics.compute()[datamodule.task.metric])))
            return losses

        loss.at = at
        return loss

    monkeypatch.setattr(Stepper, "loss", recorded)
    module = ZOModule(str(model_dir), layer=1, eps=0.1, optimizer=partial(torch.optim.SGD, lr=3e-4))
    quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, datamodule=datamodule)
    assert len(seen) == 6
    for loss, expected in seen:
        assert loss == pytest.approx(expected, abs=1e-6)
    if task == "sst2":
        assert len({loss for loss, _ in seen}) > 1


def test_missing_f1_is_that_of_the_best_reference():
    example = Example("0", "film:", (" a\n",), (0,), ("red", "dark green"))
    answers = ["red", "dark green", "green", "blue"]
    losses = AnswerF1().answer_losses(answers, [example] * 4)
    assert losses == pytest.approx([0, 0, 1 / 3, 1])


def test_missing_f1_is_that_of_the_generated_answers():
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, 200)
    evaluator = make_evaluator(ModelParts(tiny_model()))

    def rows(references):
        examples = [Example(str(i), f"film {i}:", (" x\n",), (0,), references[i]) for i in range(6)]
        return tuple(Row(e, encoder.encode(e, i), i, encoder.encode_prompt(e).ids) for i, e in enumerate(examples))

    texts = [answer.text for answer in evaluator.answers(rows([("x",)] * 6))]
    assert sum(bool(text) for text in texts) >= 4
    references = [(text, "y") if i < 3 else ("nothing like it",) for i, text in enumerate(texts)]
    expected = [1 - token_f1(text, wanted) for text, wanted in zip(texts, references, strict=True)]
    assert 0 < sum(expected) < 6
    labelled = rows(references)
    again = [answer.text for answer in evaluator.answers(labelled)]
    assert AnswerF1().answer_losses(again, [row.example for row in labelled]) == expected


@pytest.mark.slow
def test_a_run_that_trains_f1_is_selected_by_it(squad_options):
    """Not by the loss of the gold answers, which it does not see."""
    metric = TaskData("squad", objective="metric").selection_metric
    assert (metric.name, metric.mode, metric.distance({"f1": 0.75, "loss": 9.0})) == ("f1", "max", 0.25)
    assert TaskData("squad", objective="loss").selection_metric.name == "loss"
    assert TaskData("sst2", objective="metric").selection_metric.name == "loss"
    options = ["--data.objective=metric", "--model.eps=0.3", "--model.optimizer=SGD", "--model.optimizer.lr=1"]
    assert main(["fit", *squad_options, *options, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]) == 0
    state = read_checkpoint(last_checkpoint()).content["callbacks"]
    assert any("val/f1" in name and "'max'" in name for name in state)
    assert all(0 <= point["loss"] <= 1 for point in summary()["validations"])


def test_the_objective_must_be_known():
    with pytest.raises(SlzoError, match=r"data\.objective 'accuracy': choose loss, metric"):
        TaskData("sst2", objective="accuracy")


def test_class_weights_are_those_of_torch(options, model_dir, data_dir, capsys, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=generator)
    gold = torch.tensor([0, 1, -1, 1])
    examples = [EncodedExample(i, tuple(EncodedSequence((5, 6 + slot), 1) for slot in range(2)), ()) for i in range(4)]
    batch = replace(pack(examples), gold=gold)
    total, weight = CandidateCrossEntropy([1.0, 3.0]).losses_from_scores(scores, batch).sum()
    expected = torch.nn.functional.cross_entropy(scores.view(4, 2), gold, torch.tensor([1.0, 3.0]), ignore_index=-1)
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-6)
    row = Example("r1", "p", (" a", " b"), (0,))
    CandidateCrossEntropy([1.0, 3.0]).check_examples([row])
    with pytest.raises(
        SlzoError, match=r"class_weights \[1.0\]: example 'r1' has 2 candidates; give one weight for each"
    ):
        CandidateCrossEntropy([1.0]).check_examples([row])
    rows = set_up("sst2", model_dir, data_dir, "test", objective=CandidateCrossEntropy([1.0]))
    with pytest.raises(SlzoError, match=r"class_weights \[1.0\]: example '0' \(.*:1\) has 2"):
        rows.rows("test")
    monkeypatch.setattr("slzo.fit.load_parts", pytest.fail)  # the rows are checked before the model is loaded
    weights = "--data.objective.class_weights=[1,2,3]"
    line = error_line(capsys, "fit", *options, "--data.objective=CandidateCrossEntropy", weights)
    assert "class_weights [1.0, 2.0, 3.0]: example 'train-" in line
    with pytest.raises(SlzoError, match=r"class_weights \[0.0, 1.0\]: give a number above 0 for each candidate"):
        CandidateCrossEntropy([0.0, 1.0])
