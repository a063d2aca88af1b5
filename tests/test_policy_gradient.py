"""The policy gradient of sampled answers: against plain forward passes and autograd, and in runs."""

import copy
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    assert_mean_is,
    assert_same_estimate,
    chat_options,
    described,
    error_line,
    estimate_at,
    flat,
    last_checkpoint,
    logged,
    on_grid,
    plain_scores,
    round_by_batch,
    same_tensors,
    summary,
    tiny_model,
    tuned,
    tuned_model,
)

from slzo.__main__ import main
from slzo.batches.encoded import EncodedExample, EncodedSequence, prompt_alone
from slzo.batches.packing import pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.decoder import VariedLayers
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation import Answer, Decoding, answer_text
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.tasks.base import Example
from slzo.zo.estimators import Backprop, LayerOutputPerturbation
from slzo.zo.objectives import AnswerLikelihood, AnswerObjective, Reward
from slzo.zo.packed_layer_output import PackedLayerOutput
from slzo.zo.policy_gradient import AnswerSampling, advantages, policy_batch
from slzo.zo.processes import SINGLE_PROCESS
from slzo.zo.stepper import StepOptions, Stepper
from tiny import make_tokenizer

fast = pytest.mark.fast

SEED, STOP, LONGEST, TOKENS, LAST, TEMPERATURE = 5, 2, 4, 16, 3, 0.8  # few tokens, so the stop token is often sampled
SAME = "r1"  # its answers are all equally good
ESTIMATORS = [LayerOutputPerturbation(), Backprop()]


def letters(text):
    """A hand-made loss."""
    return sum(map(ord, text)) % 11 / 11


class Letters(AnswerObjective):
    """A user's objective."""

    def __init__(self, samples=4):
        self.sampling = AnswerSampling(samples, TEMPERATURE)

    def answer_losses(self, answers, examples):
        return [0.5 if row.id == SAME else letters(text) for text, row in zip(answers, examples, strict=True)]


class Constant(Letters):
    """All answers are equally good."""

    def answer_losses(self, answers, examples):
        return [0.7] * len(answers)


def rows_of(numbers=range(5)):
    """Rows with prompts of several lengths; two have a common beginning."""
    rows = []
    for number in numbers:
        prompt = tuple(random.Random(number // 2).choices(range(3, TOKENS), k=4 + 2 * number))
        rows.append(Row(Example(f"r{number}", "p", ()), prompt_alone(number, prompt), number, prompt))
    return tuple(rows)


def batch_of(rows, max_tokens=None):
    return TrainBatch(pack([row.encoded for row in rows]), rows, max_tokens)


def stepper_of(objective, layer=LAST, estimator=None, packed=True, longest=LONGEST, processes=SINGLE_PROCESS):
    model = tuned_model(tiny_model(scale=2.0, vocab_size=TOKENS), layer, packed=packed)
    evaluator = Evaluator(model.parts, make_tokenizer(), AnswerLikelihood(), decoding=Decoding((), longest))
    estimator = LayerOutputPerturbation() if estimator is None else estimator
    return Stepper(model, objective, estimator, StepOptions(None), seed=SEED, evaluator=evaluator, processes=processes)


def plain_copy(model):
    """A copy of a model that transformers runs alone."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def plain_answer(model, row, step, sample):
    """Tokens of a sampled answer, by running the whole sequence anew for each token."""
    sampling, ids = Sampling(TEMPERATURE, (sample_key(SEED, step, row.example.id, sample),)), []
    while len(ids) < LONGEST and STOP not in ids:
        logits = model(input_ids=torch.tensor([[*row.prompt, *ids]]), use_cache=False).logits[:, -1]
        ids.append(int(sampling.with_noise(logits, [0], len(ids)).argmax()))
    return ids


def text_of(ids):
    return answer_text(make_tokenizer(), [token for token in ids if token != STOP], ())


def plain_policy(model, names, rows, step=0, samples=4):
    """The mean loss of sampled answers and the policy gradient, from a forward pass of the whole model for each answer."""
    model, losses, total = plain_copy(model), [], 0.0
    parameters = {name: own.requires_grad_(True) for name, own in model.named_parameters() if name in names}
    for row in rows:
        answers = [plain_answer(model, row, step, sample) for sample in range(samples)]
        own = Letters().answer_losses([text_of(ids) for ids in answers], [row.example] * samples)
        for number, ids in enumerate(answers):
            others = own[:number] + own[number + 1 :]
            whole = EncodedExample(0, (EncodedSequence((*row.prompt, *ids), len(ids)),), (0,))
            total += (own[number] - sum(others) / len(others)) * plain_scores(model, whole, TEMPERATURE)[0].sum()
        losses += own
    (total / len(losses)).backward()
    return sum(losses) / len(losses), {name: parameter.grad for name, parameter in parameters.items()}


# ---- the loss whose derivative it is ---------------------------------------------------------------------------------------


@fast
def test_an_advantage_is_the_distance_from_the_mean_of_the_others():
    losses = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    expected = [[own - (sum(row) - own) / 4 for own in row] for row in losses.tolist()]
    found = advantages(losses)
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(3))


@fast
@pytest.mark.parametrize("kept", [(0, 2), (0,)], ids=["some rows", "no row"])
def test_only_rows_whose_answers_differ_are_run(kept):
    """And one row if there is none. They have the weight of all answers."""
    rows, tokens = rows_of(range(3)), [(5,), (5, 6, STOP), (STOP,), (6, 6)]
    answers = [Answer("", 0, tokens[(number + shift) % 4]) for number in range(3) for shift in range(4)]
    losses = [0.5 if len(kept) == 1 or number == 1 else shift * 0.1 for number in range(3) for shift in range(4)]
    batch, policy, numbers = policy_batch(rows, answers, losses, 0.5, torch.device("cpu"))
    assert batch.example_index == tuple(numbers) == kept
    logits = torch.randn(2, len(batch.logit_positions), TOKENS, generator=torch.Generator().manual_seed(0))
    likelihood = (2 * logits).log_softmax(-1)[..., batch.token_logit, batch.token_id]
    expected, sizes = torch.zeros(2, len(kept)), iter(batch.candidate_length.tolist())
    first = 0
    for place, number in enumerate(kept):
        for shift in range(4):
            ids = answers[4 * number + shift].tokens
            stop = first + next(sizes)
            assert batch.token_id[first:stop].tolist() == list(ids)
            own = losses[4 * number : 4 * number + 4]
            advantage = own[shift] - (sum(own) - own[shift]) / 3
            expected[:, place] += advantage * likelihood[:, first:stop].sum(dim=1)
            first = stop
    totals, weights, of_positions, temperature = policy.row_losses(logits, batch, False)
    torch.testing.assert_close(totals, expected)
    assert float(weights.sum()) == 12
    assert temperature == 0.5
    assert of_positions.shape == (2, len(batch.logit_positions))
    torch.testing.assert_close(of_positions.sum(dim=1), expected.sum(dim=1))
    one_point = policy.row_losses(logits[1], batch, False).sum()
    torch.testing.assert_close(one_point, torch.stack([expected[1].sum(), weights.sum()]))


@fast
@pytest.mark.parametrize(
    ("layer", "max_tokens", "packed"), [(0, None, True), (2, None, True), (2, 15, True), (2, 15, False)]
)
def test_the_exact_gradient_is_that_of_plain_passes(layer, max_tokens, packed):
    stepper, rows = stepper_of(Letters(), layer, packed=packed), rows_of()
    value, expected = plain_policy(stepper.model.parts.model, stepper.model.tensors.names, rows)
    loss = stepper.loss(batch_of(rows, max_tokens))
    found, gradient = loss.gradient()
    assert found == pytest.approx(value, rel=1e-5)
    assert gradient.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-3, atol=1e-5 * float(flat(expected).norm()))
    other = flat(stepper.loss(batch_of(rows), step=1).gradient()[1])  # the answers are those of the step
    assert (other - flat(gradient)).norm() > 0.1 * other.norm()


@fast
def test_the_answers_of_a_step_are_sampled_once(monkeypatch):
    """Several parts of a step use the same answers, and a reward is asked once."""
    calls, objective = [], Letters()
    losses = objective.answer_losses
    monkeypatch.setattr(objective, "answer_losses", lambda *given: calls.append(given) or losses(*given))
    loss = stepper_of(objective).loss(batch_of(rows_of()))
    for _ in range(3):
        loss.gradient()
    assert len(calls) == 1


@fast
def test_the_mean_of_estimates_at_the_output_is_the_exact_gradient():
    """In the last layer. Each token has a loss of its own, so one query is enough by default."""
    stepper, rows = stepper_of(Letters()), rows_of()
    loss, model = stepper.loss(batch_of(rows)), stepper.model
    value, expected = loss.gradient()
    estimates = [estimate_at(model, loss, step, queries=20, scale=0.02) for step in range(10)]
    assert estimates[0].loss == value
    assert_mean_is(expected, estimates)
    usual, one, four = (estimate_at(model, loss, queries=queries) for queries in (None, 1, 4))
    assert same_tensors(usual.gradient, one.gradient)
    assert not same_tensors(usual.gradient, four.gradient)


@fast
@pytest.mark.parametrize("layer", [0, 2])
def test_a_batch_in_parts_has_the_same_estimate(layer, monkeypatch):
    """Parts of at most so many tokens, or of so many logits."""
    stepper, rows = stepper_of(Letters(), layer), rows_of()
    whole = estimate_at(stepper.model, stepper.loss(batch_of(rows)), queries=3)
    seen, losses = [], PackedLayerOutput.losses
    monkeypatch.setattr(PackedLayerOutput, "losses", lambda self, s: seen.append(self.keys) or losses(self, s))
    assert_same_estimate(estimate_at(stepper.model, stepper.loss(batch_of(rows, 45)), queries=3), whole)
    parts = list(dict.fromkeys(seen))
    assert sum(parts, ()) == (0, 2, 3, 4)
    assert 1 < len(parts) < 4
    seen.clear()
    monkeypatch.setattr("slzo.zo.answer_loss.MOST_LOGITS", 45 * TOKENS)
    assert_same_estimate(estimate_at(stepper.model, stepper.loss(batch_of(rows)), queries=3), whole)
    assert list(dict.fromkeys(seen)) == parts


@fast
def test_the_mean_over_answers_is_the_gradient_of_the_expected_loss():
    """Of answers of one token, whose expectation is a sum over the vocabulary."""
    objective, rows = Letters(), rows_of()
    stepper = stepper_of(objective, longest=1)
    model, names = plain_copy(stepper.model.parts.model), stepper.model.tensors.names
    parameters = {name: own.requires_grad_(True) for name, own in model.named_parameters() if name in names}
    expectation = 0.0
    for row in rows:
        chances = (
            model(input_ids=torch.tensor([row.prompt]), use_cache=False).logits[0, -1].div(TEMPERATURE).softmax(-1)
        )
        losses = objective.answer_losses([text_of([token]) for token in range(TOKENS)], [row.example] * TOKENS)
        expectation += chances @ torch.tensor(losses) / len(rows)
    expectation.backward()
    found = [stepper.loss(batch_of(rows), step).gradient() for step in range(80)]
    assert sum(loss for loss, _ in found) / 80 == pytest.approx(expectation.item(), abs=0.02)
    assert_mean_is(
        {name: parameter.grad for name, parameter in parameters.items()},
        [SimpleNamespace(gradient=gradient) for _, gradient in found],
    )


@fast
@pytest.mark.parametrize("samples", [4, 7])
def test_equally_good_answers_have_no_gradient(samples):
    """Exactly: AdamW would enlarge what rounding leaves."""
    stepper = stepper_of(Constant(samples))
    loss = stepper.loss(batch_of(rows_of()))
    value, gradient = loss.gradient()
    estimate = estimate_at(stepper.model, loss)
    assert value == estimate.loss == pytest.approx(0.7)
    assert not flat(gradient).any()
    assert not flat(estimate.gradient).any()


@fast
@pytest.mark.parametrize("packed", [True, False])
def test_the_tokens_of_an_answer_have_the_stop_token_that_ended_it(packed):
    evaluator, rows = stepper_of(Letters(), packed=packed).evaluator, rows_of()
    model = plain_copy(evaluator.parts.model)
    repeated = [row for row in rows for _ in range(4)]
    keys = tuple(sample_key(SEED, 0, row.example.id, number % 4) for number, row in enumerate(repeated))
    expected = [tuple(plain_answer(model, row, 0, number % 4)) for number, row in enumerate(repeated)]
    ended = [ids[-1] == STOP for ids in expected]
    assert any(ended)
    assert not all(ended)
    found = [evaluator.answers(repeated, Sampling(TEMPERATURE, keys))]
    if packed:
        found.append(
            evaluator.answers_at_points(repeated, VariedLayers(2, 3, 1, lambda _: None), Sampling(TEMPERATURE, keys))
        )
    for answers in found:
        assert [answer.tokens for answer in answers] == expected
        assert [answer.num_tokens for answer in answers] == [
            len(ids) - end for ids, end in zip(expected, ended, strict=True)
        ]
        assert [answer.text for answer in answers] == [text_of(ids) for ids in expected]


@fast
def test_processes_divide_the_rows():
    """Halves of other sizes; one has only a row whose answers are all equally good."""
    rows = rows_of()
    halves = ((rows[1],), (rows[0], *rows[2:]))
    whole = estimate_at(stepper_of(Letters()).model, stepper_of(Letters()).loss(batch_of(rows)), queries=4)

    def run(processes):
        stepper = stepper_of(Letters(), processes=processes)
        return estimate_at(stepper.model, stepper.loss(batch_of(halves[processes.rank])), queries=4)

    found = on_grid(2, 1, run)
    for estimate in found:
        assert_same_estimate(estimate, whole)
    assert same_tensors(found[0].gradient, found[1].gradient)


# ---- steps on rewards ------------------------------------------------------------------------------------------------------

FUNCTIONS = """
def letters(completions, **columns): return [sum(map(ord, text)) % 11 / 11 for text in completions]
def words(completions, **columns): return [sum(map(ord, each[0]["content"])) % 97 / 97 for each in completions]
def fails(completions, **columns): return [*letters(completions[1:]), None]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS)


@fast
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=described)
def test_the_loss_of_a_step_is_minus_the_mean_reward(estimator, folder):
    stepper, rows = stepper_of(Reward("mine.py:letters", TEMPERATURE, in_process=True), estimator=estimator), rows_of()
    model = plain_copy(stepper.model.parts.model)
    answers = [plain_answer(model, row, 7, sample) for row in rows for sample in range(4)]
    before = stepper.model.tensors.clone_masters()
    result = stepper.step(batch_of(rows), 7, torch.optim.AdamW(stepper.model.tensors.masters, lr=1e-3))
    rewards = torch.tensor([letters(text_of(ids)) for ids in answers])
    mean = float(rewards.mean())
    assert result.estimate.finite
    assert result.estimate.loss == pytest.approx(-mean, rel=1e-5)
    length = sum(len(ids) - (ids[-1] == STOP) for ids in answers) / len(answers)
    spread = float(rewards.std(correction=0))
    assert result.report.values == pytest.approx({"reward": mean, "reward_std": spread, "answer_tokens": length})
    assert not same_tensors(stepper.model.tensors.named_masters(), before)


@fast
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=described)
def test_no_step_is_taken_when_a_reward_fails(estimator, folder):
    stepper = stepper_of(Reward("mine.py:fails", in_process=True), estimator=estimator)
    tensors, model = stepper.model.tensors, stepper.model.parts.model
    before = tensors.clone_masters(), {name: own.clone() for name, own in model.named_parameters()}
    optimizer = torch.optim.AdamW(tensors.masters, lr=1.0)
    result = stepper.step(batch_of(rows_of()), 0, optimizer)
    assert not result.estimate.finite
    assert math.isnan(result.estimate.loss)
    assert result.estimate.gradient == result.report.values == {}
    assert "mine.py:fails: returned None, at row 'r" in result.report.problems[0]
    assert same_tensors(tensors.named_masters(), before[0])
    assert same_tensors(dict(model.named_parameters()), before[1])
    assert not optimizer.state
    assert stepper.num_nonfinite == 1


# ---- runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(folder, model_dir):
    """A run with the default estimator and optimizer."""
    reward = ["--data.objective=Reward", "--data.objective.functions=mine.py:words"]
    return ["fit", *chat_options(model_dir), *reward, "--trainer.max_steps=7", "--record.test_before=false"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.objective.samples=1"], "data.objective.samples 1: a policy gradient compares answers to a row"),
        (["--data.objective.temperature=0"], "data.objective.temperature 0.0: a policy gradient needs sampled answers"),
        (
            ["--model.parallel=directions"],
            "model.parallel directions: with LayerOutputPerturbation every process would",
        ),
    ],
)
def test_what_has_no_policy_gradient_is_refused_in_one_line(fit, options, expected, capsys):
    error = error_line(capsys, *fit, *options)
    assert error.startswith(f"slzo: error: {expected}")
    assert error.endswith(("or use model.estimator SPSA", "or model.estimator SPSA"))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(fit, monkeypatch):
    """Stopped in the second epoch, with states of prompts that depend on the size of the batch, as they do by rounding."""
    round_by_batch(monkeypatch)
    fit = [*fit, "--model.engine.cache_gb=4e-5"]  # room for some of the prompts
    for more in ([], ["--trainer.max_steps=5"], ["--ckpt_path=last"]):
        assert main([*fit, *more]) == 0
    contents = [read_checkpoint(last_checkpoint(number)).content for number in range(3)]
    one, early, other = (tuned(last_checkpoint(number)) for number in range(3))
    assert not same_tensors(one, early)
    assert same_tensors(one, other)
    states = [content["optimizer_states"][0]["state"] for content in (contents[0], contents[2])]
    assert all(same_tensors(states[0][key], states[1][key]) for key in states[0])
    assert logged("train/reward")[5:] == logged("train/reward", 2)
    assert len(logged("train/reward")) == 7
    assert all(summary(n)["estimator"] == "LayerOutputPerturbation" for n in range(3))
    assert all(summary(n)["optimizer"] == "AdamW" for n in range(3))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(1.0, "there is nothing left to learn", marks=pytest.mark.slow),
        (0.5, "so nothing is learned"),
        (3.0, "so nothing is learned"),
    ],
)
def test_a_reward_that_is_always_the_same_is_named(value, said, fit, capfd):
    Path("same.py").write_text(f"def same(completions):\n    return [{value} for _ in completions]\n")
    assert main([*fit, "--data.objective.functions=same.py:same", "--watch.max_zero_steps=2"]) == 0
    printed = capfd.readouterr().err
    assert f"for 2 steps all 4 answers to each row were equally good (mean loss {-value:.4g})" in printed
    assert said in printed
