"""The metrics of tasks, alone and gathered over processes."""

import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.classification import BinaryF1Score
from torchmetrics.text import SQuAD

from slzo.evaluation.evaluator import Outcome, RunningScore
from slzo.evaluation.held_out import score_held_out
from slzo.evaluation.metrics import TaskMetrics, row_score
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.rewards.answers import exact_match, normalize_answer, token_f1
from slzo.rewards.runner import RewardedAnswers
from slzo.tasks.base import Example, Kind
from slzo.tasks.registry import TASKS, get_task

pytestmark = pytest.mark.fast


def test_normalization():
    assert normalize_answer("  The U.S.  Army's\nan  Anthem, a theory") == "us armys anthem theory"


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("the Lady Gaga.", ["Beyonce", "lady gaga"], 1, 1),
        ("Lady", ["Lady Gaga"], 2 / 3, 0),
        ("a b b c", ["b b d"], 2 * (2 / 3) * (2 / 3) / (4 / 3), 0),
        ("", ["x"], 0, 0),
        (" ", ["the"], 0, 0),
        ("", [""], 1, 1),
        ("", [], 1, 1),
        ("x", [], 0, 0),
        ("x", [""], 0, 0),
        ("...", ["Paris"], 0, 0),
        ("The", ["the"], 1, 1),
    ],
)
def test_answers(prediction, references, f1, exact):
    assert token_f1(prediction, references) == pytest.approx(f1)
    assert exact_match(prediction, references) == exact


def generated():
    words = ["the", "red", "fox", "a", "dog", "1,000", "U.S."]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(200)]
    examples = [
        Example(str(i), "p", (f" {texts[i]}\n",), (0,), references=(texts[i], texts[(i * 7) % 200])) for i in range(100)
    ]
    return examples, texts[100:]


def test_generation_agrees_with_torchmetrics():
    examples, predictions = generated()
    metrics = TaskMetrics(get_task("squad"))
    for start in range(0, 100, 30):
        metrics.update(examples[start : start + 30], predictions[start : start + 30])
    other = SQuAD()
    answers = [{"answers": {"text": list(e.references), "answer_start": [0, 0]}, "id": e.id} for e in examples]
    other.update([{"prediction_text": p, "id": str(i)} for i, p in enumerate(predictions)], answers)
    expected = {name: value.item() / 100 for name, value in other.compute().items()}
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0 < found["exact_match"] < found["f1"] < 1


def test_accuracy_counts_any_gold_and_no_unlabelled_row():
    metrics = TaskMetrics(get_task("record"))
    golds = [(0,), (1, 2), (1,), ()]
    examples = [Example(str(i), "p", (" a", " b", " c"), gold) for i, gold in enumerate(golds)]
    metrics.update(examples[:2], [0, 2])
    metrics.update(examples[2:], [0, 0])
    assert {name: value.item() for name, value in metrics.compute().items()} == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="argument 2"):
        metrics.update(examples, [0])


def answers():
    draw = random.Random(1)
    examples, predictions = [], []
    for group in range(40):
        for answer in range(draw.randint(1, 4)):
            label = draw.randint(0, 1)
            examples.append(Example(f"{group}-{answer}", "p", ("No", "Yes"), (label,), group=f"q{group}"))
            predictions.append(label if draw.random() < 0.8 else 1 - label)
    return examples, predictions


def macro_f1(gold, predictions):
    """The mean F1 of the classes that occur, counted one by one."""
    found = []
    for label in {*gold, *predictions}:
        hits = sum(label == each == other for each, other in zip(gold, predictions, strict=True))
        found.append(2 * hits / (gold.count(label) + predictions.count(label)))
    return sum(found) / len(found)


def test_macro_f1_counts_each_class_equally():
    """Class 3 never occurs; the candidates of odd rows are in another order."""
    draw = random.Random(2)
    gold = [draw.choice((0, 0, 0, 0, 1, 2)) for _ in range(200)]
    predictions = [label if draw.random() < 0.5 else 0 for label in gold]
    texts = (" a", " b", " c", " d")
    examples = [
        Example(str(row), "p", texts[::-1] if row % 2 else texts, (3 - label if row % 2 else label,))
        for row, label in enumerate(gold)
    ]
    shown = [3 - label if row % 2 else label for row, label in enumerate(predictions)]
    metrics = TaskMetrics(get_task("cb"))
    metrics.update(examples, shown)
    found = metrics.compute()
    assert found["macro_f1"].item() == pytest.approx(macro_f1(gold, predictions))
    assert found["macro_f1"] < found["accuracy"] - 0.05


def test_macro_f1_of_rows_with_several_right_answers_and_of_one_class():
    metrics = TaskMetrics(get_task("cb"))
    golds = [(0, 1), (1, 2), (2,), ()]
    metrics.update([Example(str(row), "p", (" a", " b", " c"), gold) for row, gold in enumerate(golds)], [1, 0, 2, 0])
    assert metrics.compute()["macro_f1"].item() == pytest.approx(macro_f1([1, 1, 2], [1, 0, 2]))
    metrics = TaskMetrics(get_task("cb"))
    metrics.update([Example("0", "p", (" a", " b"), (0,))] * 3, [0, 0, 0])
    assert metrics.compute()["macro_f1"] == 1


def test_multirc():
    examples, predictions = answers()
    metrics = TaskMetrics(get_task("multirc"))
    for row in range(0, len(examples), 3):  # groups are parted over batches
        metrics.update(examples[row : row + 3], predictions[row : row + 3])
    gold = [example.gold[0] for example in examples]
    right = defaultdict(list)
    for example, prediction in zip(examples, predictions, strict=True):
        right[example.group].append(prediction == example.gold[0])
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == {
        "accuracy": pytest.approx(sum(sum(group) for group in right.values()) / len(examples)),
        "macro_f1": pytest.approx(macro_f1(gold, predictions)),
        "answer_f1": pytest.approx(BinaryF1Score()(torch.tensor(predictions), torch.tensor(gold)).item()),
        "question_em": pytest.approx(sum(all(group) for group in right.values()) / len(right)),
    }
    assert 0 < found["question_em"] < found["accuracy"] < 1
    metrics = TaskMetrics(get_task("multirc"))
    assert all(value.isnan() for value in metrics.compute().values())  # there was no labelled row
    metrics.update(examples[:1], [examples[0].gold[0]])
    assert metrics.compute()["question_em"] == 1


def merged(first, others):
    """What processes compute together: the states gathered by a stand-in, and reduced by torchmetrics itself."""
    for key, metric in first._metrics.items():
        names = iter(list(metric._reductions))

        def gather(value, group=None, key=key, names=names):
            name = next(names)
            states = [getattr(other._metrics[key], name) for other in others]
            gathered = [value, *(torch.cat(state) if isinstance(state, list) else state for state in states)]
            assert len({tensor.dtype for tensor in gathered}) == 1
            return gathered

        metric.dist_sync_fn = gather
        metric.distributed_available_fn = lambda: True
    return first.compute()


@pytest.mark.parametrize("name", ["multirc", "squad", "sst2"])
def test_processes_together_give_what_one_gives(name):
    examples, predictions = generated() if name == "squad" else answers()
    whole, *parts = (TaskMetrics(get_task(name)) for _ in range(4))  # the last sees no row
    whole.update(examples, predictions)
    for start in (0, 1):
        parts[start].update(examples[start::2], predictions[start::2])
    together = merged(parts[0], parts[1:])
    for key, value in whole.compute().items():
        torch.testing.assert_close(together[key], value)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_tasks_metric_is_computed(name):
    task = get_task(name)
    metrics = TaskMetrics(task)
    example = Example("0", "p", (" a", " b"), (1,), references=("b",))
    metrics.update([example], ["b"] if task.kind is Kind.GENERATION else [1])
    found = metrics.compute()
    assert task.metric in found
    score = RunningScore(task, torch.device("cpu"), ["length"])
    assert set(score.compute()) <= set(score.names)
    assert list(found) == metrics.names
    assert all(value.shape == () and value == 1 for value in found.values())


@pytest.mark.parametrize("name", ["sst2", "squad", "multirc"])
def test_no_row_is_not_a_number(name):
    metrics = TaskMetrics(get_task(name))
    metrics.update([], [])
    assert metrics.compute()[get_task(name).metric].isnan()


@pytest.mark.parametrize(
    ("best", "before", "largest"),
    [
        *[(None, 2.0, 2.2), (None, -2.0, -1.8), (None, 0.002, 0.032), (None, 0.0, 0.03)],
        *[(1.0, 0.5, 0.55), (1.0, 0.005, 0.015), (1.0, 0.0, 0.01), (1.0, -4.0, -3.6)],
    ],
)
def test_a_distance_may_rise_by_a_share_of_its_size(best, before, largest):
    """Near 0, by a share of a tenth of the first loss, or of the best reward or F1; with losses and rewards of any sign."""
    metric = SelectionMetric("loss" if best is None else "reward", "reward", best)
    assert metric.upper_bound(before, 1.1, first=3.0) == pytest.approx(largest)


def test_rewarded_rows_without_labels_have_no_perplexity(monkeypatch):
    task = SimpleNamespace(kind=Kind.GENERATION, metrics=("perplexity",), grouped=False)
    score = RunningScore(task, torch.device("cpu"), ["length"])
    found = score.compute()
    assert not {"loss", "perplexity"} & set(found)
    monkeypatch.setattr("slzo.evaluation.held_out.score_rows", lambda *_, **__: dict(found))
    held_out, _ = score_held_out(None, [], None, "perplexity")
    assert math.isnan(held_out.metrics["perplexity"])
    assert "reward" in held_out.metrics


@pytest.mark.parametrize("center", [0.0, 1000.0, -1e12])
def test_the_spread_of_rewards_far_from_zero(center):
    score = RunningScore(get_task("squad"), torch.device("cpu"), ["length"])
    example, loss = Example("a", "What?", (), (0,), ("42",)), torch.tensor([torch.nan, 3.0])
    for change in (-1e-3, 1e-3):  # as a share
        rewards = (center + change * max(1.0, abs(center)),) * 2
        outcome = Outcome(["42"] * 2, [], loss, (1, 1), RewardedAnswers(rewards, {}, ()))
        score.update(SimpleNamespace(examples=(example,) * 2), outcome)
    found = score.compute()
    assert float(found["reward"]) == pytest.approx(center, rel=1e-6, abs=1e-6)
    assert float(found["reward_std"]) == pytest.approx(1e-3 * max(1.0, abs(center)), rel=1e-3)
    assert math.isnan(found["loss"])  # a loss that is not finite is not left out


def test_several_rewards_are_also_reported_one_by_one():
    score = RunningScore(get_task("squad"), torch.device("cpu"), ["length", "format", "never"])
    example, loss = Example("a", "What?", (), (0,), ("42",)), torch.tensor([0.0, 1.0])
    nan = math.nan  # a function returned None, or the row failed
    for totals, length, form in (
        ((2.0, 2.5), (1.0, 2.0), (nan, 0.5)),
        ((4.0, nan), (3.0, nan), (1.0, nan)),
    ):
        parts = {"length": length, "format": form, "never": (nan, nan)}
        outcome = Outcome(["42"] * 2, [], loss, (1, 1), RewardedAnswers(totals, parts, ()))
        score.update(SimpleNamespace(examples=(example,) * 2), outcome)
    found = {name: float(value) for name, value in score.compute().items()}
    assert set(score.names) == set(found)
    assert found["reward"] == pytest.approx(8.5 / 3)
    assert found["reward_length"] == pytest.approx(2.0)
    assert found["reward_format"] == pytest.approx(0.75)
    assert math.isnan(found["reward_never"])
    assert {"reward", "reward_length"} <= set(score.maximized)


def test_a_generated_answer_has_a_row_score_in_every_metric():
    example = Example("a", "What?", ("42",), (0,), ("42",))
    assert (row_score("accuracy", example, "42"), row_score("accuracy", example, "41")) == (1.0, 0.0)
    assert row_score("perplexity", example, "42") is None
    assert row_score("accuracy", example, 0) == 1.0


@pytest.mark.parametrize(("totals", "mean"), [((6.0, 14.0), 20 / 64), ((torch.nan, 14.0), torch.nan)])
def test_the_loss_is_the_mean_over_rows_and_no_value_is_left_out(totals, mean):
    score = RunningScore(get_task("sst2"), torch.device("cpu"))
    example = Example("a", "It was", (" bad", " good"), (1,))
    for loss in zip(totals, (60.0, 4.0), strict=True):
        score.update(SimpleNamespace(examples=(example,)), Outcome([1], [[-1.0, -0.5]], torch.tensor(loss)))
    assert float(score.compute()["loss"]) == pytest.approx(mean, nan_ok=True)
