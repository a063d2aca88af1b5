"""The summary of a run: change of held-out score and dev loss, and a command to try."""

import math
import re
import shlex
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, run_dir, run_fit, summary

from slzo import TaskDataModule, fit
from slzo.__main__ import main
from slzo.evaluation.bag_of_words import WordsReference
from slzo.evaluation.held_out import HeldOutScores
from slzo.evaluation.metrics import perplexity_by_row, row_score
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.report.history import History
from slzo.report.next_command import next_command
from slzo.report.run_facts import FitOutcome, RunFacts
from slzo.report.score_change import ScoreChange, dev_loss, is_doubtful, score_change, verdict
from slzo.report.summary import format_summary, summarize
from slzo.tasks.base import Example
from slzo.zo.processes import SINGLE_PROCESS


def run_facts(**facts):
    """Facts of a run; 1 is as good as any other value."""
    usual = {"best": "run/checkpoints/b.ckpt", "config": "run/config.yaml", "steps": 1, "lr": 1.0, "last": None}
    usual |= {
        "rollbacks": 0,
        "limit": ("max_steps", 0),
        "command": None,
        "virtual_tokens": False,
        "folder": "run",
        "reference": WordsReference(),
        "first_order_gb": None,
        "num_rows": 8,
        "scheduled": False,
        "figures": figures(facts),
        "metric": SelectionMetric("loss", "accuracy"),
        "history": History(
            seconds=1.0, train_seconds=1.0, points=[{"step": 1, "evaluations": 1, "seconds": 1.0, "distance": 1.0}]
        ),
    }
    given = usual | facts
    outcome, known = ({field.name for field in fields(kind)} for kind in (FitOutcome, RunFacts))
    given["outcome"] = FitOutcome(**{name: given[name] for name in outcome & given.keys()})
    return RunFacts(**dict.fromkeys(known, 1) | {name: given[name] for name in known & given.keys()})


def figures(facts):
    """Those of a training of the default kind, with the facts that have other names than the fields of RunFacts."""
    names = ("layer_reason", "num_layers", "scope", "estimator", "optimizer", "steps", "skipped_steps")
    names += ("peak_memory_gb", "planned_memory_gb", "tuned_parameters", "total_parameters")
    return dict.fromkeys(names, 1) | {"rollbacks": 0, "majority_share": None} | facts


FACTS = run_facts(
    last="run/last.ckpt", best="run/best.ckpt", limit=("max_steps", 100), layer=3, num_rows=2000, requested_rows=2000
)


def compare(before, after, metric="accuracy"):
    """Two lists of row scores."""
    rows = [{str(i): float(v) for i, v in enumerate(values)} for values in (before, after)]
    means = tuple(sum(values) / len(values) for values in (before, after))
    return changed(metric, means, rows, len(after))


def changed(metric, scores, rows, num_rows):
    """The change between two scores of a metric, with the scores of the rows."""
    first, second = (HeldOutScores({metric: score}, own) for score, own in zip(scores, rows, strict=True))
    return score_change(SelectionMetric("loss", metric), first, second, num_rows)


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
    change = changed("perplexity", scores, by_row, 400)
    assert change.paired
    assert change.change == pytest.approx(change_without())
    left_out = torch.tensor([change_without(row) for row in range(400)])
    jackknife = math.sqrt(399 / 400 * float(((left_out - left_out.mean()) ** 2).sum()))
    assert change.standard_error == pytest.approx(jackknife, rel=0.02)
    assert perplexity_by_row({}) == {}
    assert perplexity_by_row({"a": (1000.0, 1.0)}) == {"a": math.inf}


def test_without_the_same_rows_accuracy_has_an_unpaired_error_and_f1_none():
    expected = math.sqrt((0.5 * 0.5 + 0.6 * 0.4) / 100)
    for rows in (({}, {}), ({}, {"a": 1.0}), ({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0})):
        change = changed("accuracy", (0.5, 0.6), rows, 100)
        assert (change.standard_error, change.paired) == (pytest.approx(expected), False)
        assert changed("f1", (0.5, 0.6), rows, 100).standard_error is None


def test_rows_that_do_not_give_the_score_are_not_used():
    """Ids that are not unique, or a metric that is no mean."""
    rows = ({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert not changed("accuracy", (0.5, 0.6), rows, 100).paired


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
        "The held-out accuracy went from 0.5000 to 0.5100 (+0.0100, unpaired standard error 0.0200), which is within two "
        "standard errors: no change is shown."
    )
    same = ScoreChange("f1", 0.5, 0.5, 0.0, True)
    assert verdict(same, None) == "The held-out f1 did not change: 0.5000 before and after."
    assert losses(math.inf, 0.5, 0.4).fell
    rose = ScoreChange("f1", 0.5, 0.6, None, False)
    assert verdict(rose, losses(0.6, 0.5, 0.8)) == (
        "The held-out f1 rose from 0.5000 to 0.6000 (+0.1000). The dev loss rose from 0.6000 at step 10 to 0.8000 at step 30."
    )
    assert verdict(None, losses(0.6, None)) == "The dev loss was not finite at step 20."
    assert verdict(None, losses(0.6, 0.5)) is None
    assert verdict(None, losses(None)) == "The dev loss was not finite at step 10."
    assert verdict(None, losses(0.0, 0.0)) == "The dev loss was 0 at step 10 already: nothing is left to learn."


@pytest.mark.parametrize(
    ("change", "dev", "doubtful"),
    [
        (ScoreChange("accuracy", 0.5, 0.6, 0.02, True), losses(0.7, 0.6), False),
        (ScoreChange("accuracy", 0.5, 0.6, 0.02, True), losses(0.6, 0.7), True),
        (ScoreChange("accuracy", 0.5, 0.51, 0.02, True), losses(0.7, 0.6), True),
        (ScoreChange("accuracy", 0.5, 0.49, 0.002, True), losses(0.7, 0.6), True),
        (compare([0] * 500, [1] + [0] * 499), None, True),  # one row is just its standard error
        (compare([0] * 9, [1] * 3 + [0] * 6), None, True),  # just two standard errors
        (ScoreChange("accuracy", 0.5, 0.541, 0.02, True), None, False),
        (ScoreChange("accuracy", 0.5, 0.539, 0.02, True), None, True),
        (ScoreChange("answer_f1", 0.5, 0.51, None, False), None, False),  # nothing is claimed that is not known
        (None, losses(0.7, 0.6), False),
        (None, losses(0.6), False),
        (None, losses(None), True),
        (None, losses(0.0, 0.0), True),
        (None, None, False),
    ],
)
def test_when_the_run_is_doubtful(change, dev, doubtful):
    assert is_doubtful(change, dev) is doubtful


WITHIN = ScoreChange("accuracy", 0.5, 0.51, 0.02, True)
FELL = ScoreChange("accuracy", 0.5, 0.4, 0.02, True)


SEARCH = "slzo sweep --config run/config.yaml --model.layer 3 --output run/rates --lrs auto  # "


@pytest.mark.parametrize(
    ("change", "dev", "expected"),
    [
        (FELL, losses(0.6, 0.9), f"{SEARCH}the learning rate may be too large"),
        (WITHIN, losses(0.6, 0.6), f"{SEARCH}.*too small"),
        (
            FELL,
            losses(0.6, 0.5),
            r"slzo fit --config run/config.yaml --model.layer null --profiler.rule Race  #.*compares layers",
        ),
        (WITHIN, losses(0.6, 0.5), "slzo fit .*--ckpt_path run/last.ckpt --trainer.max_steps 200  #.*still falling"),
        (WITHIN, losses(0.6, 0.5, 0.55), "slzo test .*--data.num_test 8000 --ckpt_path run/best.ckpt"),
        (WITHIN, None, f"{SEARCH}too few validations"),
    ],
)
def test_the_next_command_fits_the_case(change, dev, expected):
    assert re.match(expected, next_command(change, dev, FACTS))


def test_a_dev_loss_that_rises_after_many_epochs_is_no_matter_of_the_rate_alone():
    found = next_command(FELL, losses(0.6, 0.9), replace(FACTS, epochs=80.0))
    assert found.startswith(f"{SEARCH}each training row was used 80 times")


def test_what_cannot_be_done_again_is_not_suggested():
    assert "max_steps" not in next_command(
        WITHIN, losses(0.6, 0.5), replace(FACTS, scheduled=True)
    )  # it ends with its steps
    none = replace(FACTS, outcome=replace(FACTS.outcome, history=History()))
    assert next_command(WITHIN, None, none).endswith("; needs dev rows (data.num_dev)")


def test_a_reward_that_never_changed_is_no_matter_of_the_learning_rate():
    facts = replace(FACTS, metric=SelectionMetric("reward", "reward", 1.0))
    found = next_command(None, losses(1.0, 1.0), facts)
    assert found.startswith(
        "slzo predict --config run/config.yaml --ckpt_path run/best.ckpt  # the reward never changed"
    )
    assert "too small" in next_command(None, losses(1.0, 0.999), facts)


def test_a_reward_that_failed_is_no_matter_of_the_learning_rate():
    facts = replace(FACTS, metric=SelectionMetric("reward", "reward", 1.0))
    found = next_command(None, losses(1.0, math.inf), facts)
    assert found.startswith("slzo fit --config run/config.yaml  # the reward function failed on dev rows")


def test_first_order_is_not_suggested_for_a_reward_that_never_changed():
    points = [{"step": step, "evaluations": 1, "seconds": 1.0, "distance": 1.0} for step in (1, 2)]
    history = History(seconds=1.0, train_seconds=1.0, points=points)
    assert summarized(BEFORE, BEFORE, "accuracy", history=history, first_order_gb=1.25)["first_order"]
    rewarded = HeldOutScores({"reward": 0.0}, BEFORE.rows)
    assert summarized(rewarded, rewarded, "reward", history=history, first_order_gb=1.25)["first_order"] is None


def test_a_schedule_is_not_part_of_the_next_command():
    """It would set the rates that the sweep tries."""
    for scheduled in (False, True):
        found = next_command(FELL, losses(0.6, 0.9), replace(FACTS, scheduled=scheduled))
        assert found.startswith("slzo sweep")
        assert ("--model.lr_scheduler null" in found) == scheduled


def test_the_next_command_names_what_selected_the_checkpoint():
    facts = replace(FACTS, metric=SelectionMetric("reward", "reward", 1.0))
    assert "the dev distance to the best reward (1) was still falling" in next_command(WITHIN, losses(0.6, 0.5), facts)


def test_without_a_best_checkpoint_the_last_one_is_used():
    found = summarized(BEFORE, AFTER, best=None, last="run/checkpoints/last.ckpt")
    assert all("--ckpt_path run/checkpoints/last.ckpt" in command for command in found["use"])
    assert len(found["use"]) == 4


def test_what_several_processes_cannot_do_is_suggested_for_one():
    facts, one = replace(FACTS, processes=2), "--trainer.strategy auto --model.parallel rows"
    assert f"{one} --lrs auto  #" in next_command(WITHIN, losses(0.6, 0.6), facts)
    assert f"{one}  #" in next_command(FELL, losses(0.6, 0.5), facts)
    assert one not in next_command(WITHIN, losses(0.6, 0.5), facts)


def lines_after_scoring(output):
    return output.rpartition("Scoring")[2].partition("\n")[2].strip().splitlines()


def test_a_run_that_made_it_worse_says_so_first(options, capsys):
    assert main(["fit", *options, "--model.optimizer.lr=1", "--trainer.enable_progress_bar=false"]) == 0
    lines, found = lines_after_scoring(capsys.readouterr().out), summary()
    first = next(i for i, line in enumerate(lines) if line.startswith("The held-out accuracy"))
    assert "The dev loss rose from" in lines[first]
    assert lines[first] == found["verdict"]
    assert not any(line.startswith("Scope") for line in lines[:first])
    assert (
        "Compare    largest class 0.5000, bag of words 1.0000, macro_f1 1.0000 (TF-IDF and logistic regression)"
        in lines
    )
    assert lines[-4:-1] == [f"Next       {found['next']}", f"{'':11}{found['first_order']}", found["ahead"]]
    command = shlex.split(found["next"], comments=True)
    of_run = ["--config", "runs/version_0/config.yaml", "--model.layer", "0", "--output", "runs/version_0/rates"]
    assert command == ["slzo", "sweep", *of_run, "--lrs", "auto"]
    assert main([*command[1:-1], "[1e-3]", "--steps=1"]) == 0


def test_a_run_that_changed_nothing_says_so_first_and_resumed_too(options, capsys):
    options = [*options, "--model.optimizer.lr=1e-12", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    found = summary()
    assert (found["score_change"], found["score_change_standard_error"], found["score_change_paired"]) == (0, 0, True)
    assert any(
        line.startswith("The held-out accuracy did not change") for line in lines_after_scoring(capsys.readouterr().out)
    )
    assert main(["fit", *options, "--trainer.max_steps=5", f"--ckpt_path={last_checkpoint()}"]) == 0
    assert summary(1)["score_change_paired"] is True


def test_only_the_first_process_computes_what_only_it_prints(options, monkeypatch):
    facts = fit._run_facts

    def of_the_second(*args):
        monkeypatch.setattr(TaskDataModule, "processes", replace(SINGLE_PROCESS, rank=1))
        return facts(*args)

    monkeypatch.setattr(fit, "_run_facts", of_the_second)
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert (summary()["reference_score"], summary()["first_order"]) == (None, None)


def test_without_a_score_before_nothing_is_said_of_its_change(options, capsys):
    assert main(["fit", *options, "--record.test_before=false", "--trainer.val_check_interval=8"]) == 0
    found = summary()
    assert (found["score_change"], found["verdict"], found["doubtful"]) == (None, None, False)
    assert found["next"] == found["first_order"]
    assert "held-out accuracy" not in capsys.readouterr().out


def test_the_command_for_more_steps_goes_on(options, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    config, last = str(run_dir() / "config.yaml"), str(last_checkpoint())
    facts = run_facts(config=config, last=last, best=None, limit=("max_steps", 2), num_rows=24, requested_rows=None)
    command = shlex.split(next_command(WITHIN, losses(0.6, 0.5), facts), comments=True)
    assert main(command[1:]) == 0
    assert summary(1)["steps"] == 4


def test_the_first_order_command_trains_the_same_layer(options, capsys):
    """The run has a scheduler, which a measured rate excludes. It also leaves out the reference."""
    own = ["--model.num_queries=2", "--model.optimizer.momentum=0.5", "--model.lr_scheduler=ConstantLR"]
    assert main(["fit", *options, *own, "--trainer.max_steps=2", "--record.reference=false"]) == 0
    found = summary()
    assert (found["reference_score"], found["reference_problem"], found["ahead"]) == (None, "", None)
    assert "Compare    largest class 0.5000\n" in capsys.readouterr().out
    command = shlex.split(found["first_order"], comments=True)
    assert command[:2] == ["slzo", "fit"]
    assert main([*command[1:], "--trainer.max_steps=3"]) == 0
    changed = summary(1)
    assert [changed[name] for name in ("estimator", "optimizer", "lr", "steps")] == ["Backprop", "AdamW", "auto", 3]
    (planned,) = re.findall(r"about ([\d.]+) GiB", found["first_order"])
    assert float(planned) == pytest.approx(
        changed["planned_memory_gb"], abs=0.011
    )  # the runs have other numbers of steps
    same = ("dominant_layer", "tuned_parameters", "seed", "num_rows")
    assert [changed[name] for name in same] == [found[name] for name in same]
    assert (changed["layer_reason"], changed["first_order"]) == ("set by model.layer", None)


def scored(*rows, metric="accuracy", named=True):
    """The held-out scores of rows."""
    return SimpleNamespace(
        metrics={metric: sum(rows) / len(rows)},
        rows={str(n): float(row) for n, row in enumerate(rows)} if named else {},
    )


BEFORE, AFTER = scored(1, 1, 0, 0, 1, 0, 0, 0), scored(1, 1, 1, 1, 0, 0, 0, 0)
SHOWN = scored(*[0] * 8), scored(*[1] * 7, 0)


def summarized(before, after, metric="accuracy", **facts):
    """The summary of a run with these scores and facts."""
    run = run_facts(metric=SelectionMetric("loss", metric), **facts)
    return summarize(run, before, after)


def test_the_change_of_one_row_shows_nothing():
    found = summarized(scored(1), scored(0), num_rows=1)
    assert (found["score_before"], found["score_after"]) == (1.0, 0.0)
    assert {found[name] for name in ("score_change", "score_standard_error", "verdict")} == {None}
    assert not found["doubtful"]


def test_rewards_are_compared_on_the_rows_that_have_one_both_times():
    before = HeldOutScores({"reward": 0.5}, {"a": 0.0, "b": 0.5, "c": 1.0})
    after = HeldOutScores({"reward": 0.8}, {"b": 0.7, "c": 0.9})
    found = summarized(before, after, "reward", num_rows=4)
    assert (found["score_before"], found["score_after"], found["num_rows"]) == pytest.approx((0.75, 0.8, 2))
    assert found["score_change"] == pytest.approx(0.05)
    line = dict(lines_of(found))["Score"]
    assert line.startswith(
        "reward 0.7500 -> 0.8000 ± 0.1000 on 2 held-out rows (2 without a reward are left out); change"
    )


def lines_of(found, name=""):
    """The lines of a summary from the one with a name on, or all; their names apart."""
    lines = [(line[:11].strip(), line[11:]) for line in format_summary(found).splitlines()]
    return lines[[own for own, _ in lines].index(name) :] if name else lines


@pytest.mark.parametrize(
    ("scores", "metric", "expected"),
    [
        ((BEFORE, AFTER), "accuracy", "accuracy 0.3750 -> 0.5000 ± 0.1890 on 8 held-out rows; change +0.1250 ± 0.2266"),
        ((None, AFTER), "accuracy", "accuracy 0.5000 ± 0.1890 on 8 held-out rows"),
        (
            (scored(0.5, metric="f1", named=False), scored(0.25, metric="f1", named=False)),
            "f1",
            "f1 0.5000 -> 0.2500 on 8 held-out rows; change -0.2500",
        ),
    ],
)
def test_the_score_line_has_the_errors_of_score_and_change(scores, metric, expected):
    assert lines_of(summarized(*scores, metric), "Score")[0] == ("Score", expected)


def test_other_metrics_have_a_line():
    before, after = scored(0, 1), scored(1, 1)
    before.metrics["macro_f1"], after.metrics["macro_f1"], after.metrics["question_em"] = 0.25, 0.5, math.nan
    assert lines_of(summarized(before, after), "Also")[0] == ("Also", "macro_f1 0.2500 -> 0.5000")
    assert lines_of(summarized(None, after), "Also")[0] == ("Also", "macro_f1 0.5000")
    assert "Also" not in dict(lines_of(summarized(BEFORE, AFTER)))


def test_a_bag_of_words_without_the_small_classes_is_not_ahead():
    after = scored(*[1] * 7, 0)
    after.metrics["macro_f1"] = 0.6
    for f1, is_ahead in ((0.5, False), (0.7, True)):
        assert (summarized(None, after, reference=WordsReference(0.9, f1))["ahead"] is not None) == is_ahead


@pytest.mark.parametrize(
    ("share", "reference", "expected"),
    [
        (
            0.625,
            WordsReference(0.75, 0.5),
            ["largest class 0.6250, bag of words 0.7500, macro_f1 0.5000 (TF-IDF and logistic regression)"],
        ),
        (
            0.625,
            WordsReference(0.0, 0.0),
            ["largest class 0.6250, bag of words 0.0000, macro_f1 0.0000 (TF-IDF and logistic regression)"],
        ),
        (0.625, WordsReference(problem="why"), ["largest class 0.6250, no bag of words (why)"]),
        (0.625, WordsReference(), ["largest class 0.6250"]),
        (None, WordsReference(), []),
    ],
)
def test_the_compare_line_has_what_is_known(share, reference, expected):
    found = summarized(BEFORE, AFTER, majority_share=share, reference=reference)
    assert [text for name, text in lines_of(found) if name == "Compare"] == expected


AHEAD = "A bag of words is ahead on these rows (0.5100, tuned model 0.5000); a linear model may be enough."


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (WordsReference(0.51, 0.51), [AHEAD]),
        (WordsReference(0.5, 0.5), []),
        (WordsReference(problem="why"), []),
        (WordsReference(), []),
    ],
)
def test_a_bag_of_words_that_is_ahead_is_the_last_line(reference, expected):
    found = summarized(BEFORE, AFTER, reference=reference, first_order_gb=1.25)
    assert found["ahead"] == (expected[0] if expected else None)
    lines = format_summary(found).splitlines()
    assert [line for line in lines if "ahead" in line] == expected
    assert lines[-1] == expected[0] if expected else "slzo fit" in lines[-1]


@pytest.mark.parametrize(
    ("metric", "rollbacks", "expected"),
    [
        (SelectionMetric("loss", "reward"), 1, "once, after a dev-loss spike"),
        (SelectionMetric("reward", "reward", 1.0), 1, "once, after a fall of the dev reward"),
        (SelectionMetric("f1", "f1", 1.0), 2, "2 times, after falls of the dev f1"),
    ],
)
def test_a_rollback_names_what_selected_the_checkpoint(metric, rollbacks, expected):
    found = summarized(BEFORE, AFTER) | {"selected_by": metric.name, "rollbacks": rollbacks}
    assert f"Rollback   {expected};" in format_summary(found)
    assert summarize(run_facts(metric=replace(metric, metric="accuracy")), BEFORE, AFTER)["selected_by"] == metric.name


FIRST_ORDER = (
    "slzo fit --config run/config.yaml --model.layer 3 --model.estimator Backprop --model.optimizer AdamW "
    "--model.optimizer.lr auto  # first order fits (about 1.25 GiB) and may learn more"
)
TOO_FEW = f"{SEARCH}too few validations to find the reason: try other learning rates"


@pytest.mark.parametrize(
    ("scores", "first_order_gb", "commands"),
    [
        ((BEFORE, AFTER), 1.25, [TOO_FEW, FIRST_ORDER]),
        ((BEFORE, AFTER), None, [TOO_FEW]),
        (SHOWN, 1.25, [FIRST_ORDER]),
        (SHOWN, None, []),
    ],
)
def test_the_next_commands_come_after_those_that_use_the_run(scores, first_order_gb, commands):
    found = summarized(*scores, first_order_gb=first_order_gb, layer=3)
    assert found["doubtful"] == (scores != SHOWN)
    first = format_summary(found).strip().splitlines()[0]
    assert first == found["verdict"] if found["doubtful"] else first.startswith("Scope")
    assert found["next"] == (commands[0] if commands else None)
    assert found["first_order"] == (FIRST_ORDER if first_order_gb else None)
    lines = lines_of(found, "Use it")
    names = ["Next", *[""] * (len(commands) - 1)] if commands else []
    assert lines[len(found["use"]) :] == list(zip(names, commands, strict=True))


def test_the_first_order_command_names_no_layer_where_the_scope_needs_none():
    found = summarized(*SHOWN, first_order_gb=1.25, layer=None)
    assert found["first_order"] == FIRST_ORDER.replace(" --model.layer 3", "")


@pytest.mark.parametrize("virtual_tokens", [True, False])
def test_virtual_tokens_have_no_command_to_generate(virtual_tokens):
    found = summarized(BEFORE, AFTER, virtual_tokens=virtual_tokens)
    assert any("generate" in command for command in found["use"]) is not virtual_tokens


@pytest.mark.parametrize("config", [None, "run/config.yaml"])
def test_in_python_the_hint_is_what_to_do_without_a_command(config, monkeypatch):
    monkeypatch.setattr("slzo.report.summary.score_change", lambda *_: FELL)
    monkeypatch.setattr("slzo.report.summary.dev_loss", lambda validations, description: losses(0.6, 0.9))
    reason, more = "the learning rate may be too large", "first order fits (about 1.25 GiB) and may learn more"
    found = summarized(BEFORE, AFTER, config=config, first_order_gb=1.25, layer=3)
    in_python = f"ZOModule(optimizer=...)  # {reason}", f"ZOModule(estimator=Backprop())  # {more}"
    expected = (f"{SEARCH}{reason}", FIRST_ORDER) if config else in_python
    assert (found["next"], found["first_order"]) == expected
