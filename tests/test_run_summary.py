"""The summary of a run: change of held-out score and dev loss, and a command to try."""

import math
import re
import shlex
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, run_dir, summary

from slzo.__main__ import main
from slzo.evaluation.metrics import perplexity_by_row, row_score
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.report.next_command import AdviceFacts, next_command
from slzo.report.score_change import ScoreChange, dev_loss, is_doubtful, score_change, verdict
from slzo.report.summary import RunFacts, summarize
from slzo.tasks.base import Example

FACTS = AdviceFacts("run/config.yaml", "run/last.ckpt", "run/best.ckpt", ("max_steps", 100), 3, 2000, 2000)


def compare(before, after, metric="accuracy"):
    """Two lists of row scores."""
    rows = [{str(i): float(v) for i, v in enumerate(values)} for values in (before, after)]
    means = tuple(sum(values) / len(values) for values in (before, after))
    return score_change(metric, means, (rows[0], rows[1]), len(after))


def losses(*values):
    return dev_loss([{"step": 10 * i, "loss": value} for i, value in enumerate(values, 1)])


def test_the_standard_error_is_that_of_the_paired_difference():
    change = compare([1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0])
    differences = torch.tensor([0, 0, 1, 1, -1, 0, 0, 0], dtype=torch.float64)
    assert change.paired
    assert change.change == pytest.approx(float(differences.mean()))
    assert change.standard_error == pytest.approx(float(differences.std() / math.sqrt(8)))


def test_f1_is_compared_by_its_rows():
    change = compare([0.5, 0.0, 1.0], [0.75, 0.5, 1.0], "f1")
    assert change.paired
    assert change.standard_error == pytest.approx(float(torch.tensor([0.25, 0.5, 0]).std()) / math.sqrt(3))


def test_a_perplexity_has_the_error_of_a_ratio_over_rows():
    """Against the jackknife over rows, which knows nothing of the formula."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (400,), generator=generator).double()
    first = tokens * (1 + torch.rand(400, generator=generator).double())
    second = first * (0.8 + 0.3 * torch.rand(400, generator=generator).double())

    def change_without(row=None):
        kept = torch.arange(400) != (-1 if row is None else row)
        return float((second[kept].sum() / tokens[kept].sum()).exp() - (first[kept].sum() / tokens[kept].sum()).exp())

    by_row = [
        perplexity_by_row({str(n): (float(s), float(t)) for n, (s, t) in enumerate(zip(sums, tokens, strict=True))})
        for sums in (first, second)
    ]
    scores = tuple(float((sums.sum() / tokens.sum()).exp()) for sums in (first, second))
    change = score_change("perplexity", scores, tuple(by_row), 400, lower_is_better=True)
    assert change.paired
    assert change.change == pytest.approx(change_without())
    left_out = torch.tensor([change_without(row) for row in range(400)])
    jackknife = math.sqrt(399 / 400 * float(((left_out - left_out.mean()) ** 2).sum()))
    assert change.standard_error == pytest.approx(jackknife, rel=0.02)
    assert perplexity_by_row({}) == {}


def test_without_the_same_rows_accuracy_has_an_unpaired_error_and_f1_none():
    expected = math.sqrt((0.5 * 0.5 + 0.6 * 0.4) / 100)
    for rows in ((None, None), ({}, {"a": 1.0}), ({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0})):
        change = score_change("accuracy", (0.5, 0.6), rows, 100)
        assert (change.standard_error, change.paired) == (pytest.approx(expected), False)
        assert score_change("f1", (0.5, 0.6), rows, 100).standard_error is None


def test_rows_that_do_not_give_the_score_are_not_used():
    """Ids that are not unique, or a metric that is no mean."""
    rows = ({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert not score_change("accuracy", (0.5, 0.6), rows, 100).paired


def test_what_a_row_scores():
    choice = Example("0", "p", (" a", " b"), (1,))
    answer = Example.from_answers("1", "p", ["red fox"])
    assert [row_score("accuracy", choice, i) for i in (0, 1)] == [0.0, 1.0]
    assert row_score("f1", answer, "fox") == pytest.approx(2 / 3)
    assert row_score("exact_match", answer, "Red fox.") == 1.0
    assert row_score("answer_f1", choice, 1) is None
    assert row_score("accuracy", Example("2", "p", (" a", " b")), 1) is None


def test_the_sentence_says_what_happened():
    fell = ScoreChange("accuracy", 0.525, 0.485, 0.012, True)
    assert verdict(fell, None) == (
        "The held-out accuracy fell from 0.5250 to 0.4850 (-0.0400, paired standard error 0.0120)."
    )
    within = ScoreChange("accuracy", 0.5, 0.51, 0.02, False)
    assert verdict(within, losses(0.7, 0.6)) == (
        "The held-out accuracy rose from 0.5000 to 0.5100 (+0.0100, unpaired standard error 0.0200), which is within its "
        "standard error."
    )
    same = ScoreChange("f1", 0.5, 0.5, 0.0, True)
    assert verdict(same, None) == "The held-out f1 did not change: 0.5000 before and after."
    rose = ScoreChange("f1", 0.5, 0.6, None, False)
    assert verdict(rose, losses(0.6, 0.5, 0.8)) == (
        "The held-out f1 rose from 0.5000 to 0.6000 (+0.1000). The dev loss rose from 0.6000 at step 10 to 0.8000 at step 30."
    )
    assert verdict(None, losses(0.6, None)) == "The dev loss was not finite at step 20."
    assert verdict(None, losses(0.6, 0.5)) is None


@pytest.mark.parametrize(
    ("change", "dev", "doubtful"),
    [
        (ScoreChange("accuracy", 0.5, 0.6, 0.02, True), losses(0.7, 0.6), False),
        (ScoreChange("accuracy", 0.5, 0.6, 0.02, True), losses(0.6, 0.7), True),
        (ScoreChange("accuracy", 0.5, 0.51, 0.02, True), losses(0.7, 0.6), True),
        (ScoreChange("accuracy", 0.5, 0.49, 0.002, True), losses(0.7, 0.6), True),
        (compare([0] * 500, [1] + [0] * 499), None, True),  # one row is just its standard error
        (ScoreChange("answer_f1", 0.5, 0.51, None, False), None, False),  # nothing is claimed that is not known
        (None, losses(0.7, 0.6), False),
        (None, None, False),
    ],
)
def test_when_the_run_is_doubtful(change, dev, doubtful):
    assert is_doubtful(change, dev) is doubtful


WITHIN = ScoreChange("accuracy", 0.5, 0.51, 0.02, True)
FELL = ScoreChange("accuracy", 0.5, 0.4, 0.02, True)


SEARCH = "slzo sweep --config run/config.yaml --lrs auto  # "


@pytest.mark.parametrize(
    ("change", "dev", "expected"),
    [
        (FELL, losses(0.6, 0.9), f"{SEARCH}the learning rate may be too large"),
        (WITHIN, losses(0.6, 0.6), f"{SEARCH}.*too small"),
        (FELL, losses(0.6, 0.5), r"slzo sweep --config run/config.yaml --sensitivity_only true  #.*than 3 \(--model"),
        (WITHIN, losses(0.6, 0.5), "slzo fit .*--ckpt_path run/last.ckpt --trainer.max_steps 200  #.*still falling"),
        (WITHIN, losses(0.6, 0.5, 0.55), "slzo test .*--data.num_test 8000 --ckpt_path run/best.ckpt"),
        (WITHIN, None, f"{SEARCH}too few validations"),
    ],
)
def test_the_next_command_fits_the_case(change, dev, expected):
    assert re.match(expected, next_command(change, dev, FACTS))


def lines_after_scoring(output):
    return output.rpartition("Scoring")[2].partition("\n")[2].strip().splitlines()


def test_a_run_that_made_it_worse_says_so_first(options, capsys):
    assert main(["fit", *options, "--model.optimizer.lr=1", "--trainer.enable_progress_bar=false"]) == 0
    lines, found = lines_after_scoring(capsys.readouterr().out), summary()
    first = next(i for i, line in enumerate(lines) if line.startswith("The held-out accuracy"))
    assert "The dev loss rose from" in lines[first]
    assert lines[first] == found["verdict"]
    assert lines[first + 1] == f"Next       {found['next']}"
    assert not any(line.startswith("Scope") for line in lines[:first])
    command = shlex.split(found["next"], comments=True)
    assert command == ["slzo", "sweep", "--config", "runs/version_0/config.yaml", "--lrs", "auto"]
    assert main([*command[1:-1], "[1e-3]", "--steps=1"]) == 0


def test_a_run_that_changed_nothing_says_so_first_and_resumed_too(options, capsys):
    options = [*options, "--model.optimizer.lr=1e-12", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    found = summary()
    assert (found["score_change"], found["score_change_standard_error"], found["score_change_paired"]) == (0, 0, True)
    assert any(
        line.startswith("The held-out accuracy did not change") for line in lines_after_scoring(capsys.readouterr().out)
    )
    assert main(["fit", *options, f"--ckpt_path={last_checkpoint()}"]) == 0
    assert summary(1)["score_change_paired"] is True


def test_without_a_score_before_nothing_is_said_of_its_change(options, capsys):
    assert main(["fit", *options, "--record.test_before=false", "--trainer.val_check_interval=8"]) == 0
    found = summary()
    assert (found["score_change"], found["verdict"], found["next"]) == (None, None, None)
    assert "held-out accuracy" not in capsys.readouterr().out


def test_the_command_for_more_steps_goes_on(options):
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    facts = AdviceFacts(str(run_dir() / "config.yaml"), str(last_checkpoint()), None, ("max_steps", 2), 3, 24, None)
    command = shlex.split(next_command(WITHIN, losses(0.6, 0.5), facts), comments=True)
    assert main(command[1:]) == 0
    assert summary(1)["steps"] == 4


@pytest.mark.parametrize("config", [None, "run/config.yaml"])
def test_in_python_the_hint_is_a_reason_without_a_command(config, monkeypatch):
    before, after = (
        SimpleNamespace(metrics={"accuracy": 0.5}, rows={}),
        SimpleNamespace(metrics={"accuracy": 0.4}, rows={}),
    )
    monkeypatch.setattr("slzo.report.summary._change", lambda run, before, after: FELL)
    monkeypatch.setattr("slzo.report.summary.dev_loss", lambda validations, description: losses(0.6, 0.9))
    names = [field.name for field in fields(RunFacts)]
    run = RunFacts(**dict.fromkeys(names, 1) | {"spikes": {}, "validations": [], "best": "b.ckpt", "config": config})
    run = replace(run, metric=SelectionMetric("loss", "accuracy"))
    reason = "the learning rate may be too large"
    expected = f"slzo sweep --config {config} --lrs auto  # {reason}" if config else reason
    assert summarize(run, before, after)["next"] == expected
