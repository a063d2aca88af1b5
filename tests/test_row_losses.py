"""What each row adds to a loss, for the objectives of slzo and of a user."""

import random
import re
from itertools import pairwise, product

import pytest
import torch
from helpers import (
    assert_same_estimate,
    batch_loss,
    described,
    estimate_at,
    flat,
    random_example,
    short_examples,
    slzo_error,
    tiny_loss,
    tuned_model,
)

from slzo.batches.encoded import EncodedExample
from slzo.batches.losses import RowLosses, check_positions
from slzo.batches.packing import pack
from slzo.models.logits import needed_logits
from slzo.zo.estimators import EstimatorContext, LayerOutputPerturbation, Point
from slzo.zo.objectives import (
    AnswerLikelihood,
    CandidateCrossEntropy,
    CandidateErrors,
    CandidateObjective,
    LogitObjective,
)
from slzo.zo.tuned import UNPERTURBED
from tiny import VOCABULARY

pytestmark = pytest.mark.fast


def of_examples(values, examples, batch):
    """Sums of values over the candidates or positions of each example."""
    totals = values.new_zeros(*values.shape[:-1], batch.num_examples)
    return totals.index_add_(-1, examples, values)


class Margins(CandidateObjective):
    """A user's objective of scores: by how much each wrong candidate is closer than 1 to the right one."""

    def losses_from_scores(self, scores, batch):
        right = scores[..., batch.right][..., batch.candidate_example]  # one in each example
        wrong = (1 + scores - right).relu() * ~batch.right
        return RowLosses(of_examples(wrong, batch.candidate_example, batch), torch.ones(batch.num_examples))


class Certainty(LogitObjective):
    """A user's objective of logits, with another weight for each example."""

    def row_losses(self, logits, batch, selected):
        entropy, examples = torch.distributions.Categorical(logits=logits).entropy(), batch.logit_example
        return RowLosses(of_examples(entropy, examples, batch), torch.bincount(examples).float())


WEIGHTED = CandidateCrossEntropy([1.0, 5.0])
BUILT_IN = [CandidateCrossEntropy(), WEIGHTED, AnswerLikelihood(), CandidateErrors()]


def plain_loss(objective, logits, example):
    """Total and weight of an example alone, from the logits before its answer tokens."""
    batch = pack([example])
    if objective not in BUILT_IN:
        return objective.row_losses(logits, batch, False).sum()
    tokens = logits.log_softmax(-1)[batch.token_logit, batch.token_id].split(batch.candidate_length.tolist())
    means = torch.stack([own.mean() for own in tokens])
    if not example.gold:
        return torch.zeros(2)
    if isinstance(objective, AnswerLikelihood):
        return -tokens[example.gold[0]].sum(), torch.tensor(float(len(tokens[example.gold[0]])))
    if isinstance(objective, CandidateErrors):
        return torch.tensor([float(int(means.argmax()) not in example.gold), 1.0])
    weight = torch.tensor(objective.class_weights[example.gold[0]] if objective is WEIGHTED else 1.0)
    return -weight * means.log_softmax(0)[example.gold[0]], weight


ANSWERS = {
    "one token": [(1, 1), (1, 1), (1, 1)],
    "several tokens": [(3, 2), (1, 4), (2, 2)],
    "other candidates": [(3, 2), (1,), (2, 1, 4)],
}
CASES = [*product([*BUILT_IN, Margins(), Certainty()], ANSWERS)]
CASES.remove((WEIGHTED, "other candidates"))  # they need the same candidates in all rows


def random_rows(answers, odd):
    """Random examples with these candidates, and perhaps one without a label and one with two right candidates."""
    generator = random.Random(1)
    examples = [random_example(generator, i, 5, own, i % len(own)) for i, own in enumerate(ANSWERS[answers])]
    return examples + [EncodedExample(7 + i, examples[0].sequences, gold) for i, gold in enumerate(((), (0, 1))) if odd]


def random_logits(batch):
    """Logits of a batch at three points."""
    return 2 * torch.randn(3, len(batch.logit_positions), VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("objective", "answers"), CASES, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_the_losses_of_rows_are_those_of_each_row_alone(objective, answers):
    # without a label a row has no weight; two right candidates are fine
    examples = random_rows(answers, odd=objective in BUILT_IN)
    batch = pack(examples)
    logits = random_logits(batch)
    sizes = [len(pack([example]).logit_positions) for example in examples]
    expected = torch.stack(
        [
            torch.stack(
                [torch.stack([*plain_loss(objective, *one)]) for one in zip(point.split(sizes), examples, strict=True)]
            )
            for point in logits
        ]
    )
    inputs = [(logits, False)]
    if not objective.needs_vocabulary(batch):  # scores without the normalizer, which cancels
        inputs.append((logits[..., batch.choice_ids], True))
    assert len(inputs) == (2 if answers == "one token" and isinstance(objective, CandidateObjective) else 1)
    for given, selected in inputs:
        totals, weights, *_ = objective.row_losses(given, batch, selected)
        torch.testing.assert_close(torch.stack([totals, weights.expand_as(totals)], dim=-1), expected)
        for point, own in zip(given, expected, strict=True):
            torch.testing.assert_close(objective.row_losses(point, batch, selected).sum(), own.sum(dim=0))


@pytest.mark.parametrize(
    ("objective", "answers"),
    [case for case in CASES if isinstance(case[0], CandidateObjective) and case[0].differentiable],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_a_loss_of_scores_is_to_first_order_a_sum_over_positions(objective, answers):
    batch = pack(random_rows(answers, odd=objective in BUILT_IN))
    logits = random_logits(batch)[0].requires_grad_()
    totals = objective.row_losses(logits[None], batch, False).totals
    (expected,) = torch.autograd.grad(totals.sum(), logits, retain_graph=True)
    found = objective.linearized(logits.detach(), batch).row_losses(logits[None], batch, False)
    check_positions(objective, found, batch)
    for total in (found.totals, found.by_position):
        (own,) = torch.autograd.grad(total.sum(), logits, retain_graph=True)
        torch.testing.assert_close(own, expected)
    # as in a batch of candidates of one token alone, whose loss is not taken to first order
    alone = torch.tensor(batch.num_logits) == 1
    assert alone.any() == (answers != "several tokens")
    assert torch.equal(found.totals[:, alone], totals[:, alone])


class Halved(CandidateCrossEntropy):
    """A user's objective that changes the losses of its base class."""

    def row_losses(self, logits, batch, selected):
        losses = super().row_losses(logits, batch, selected)
        return losses._replace(totals=losses.totals / 2)


@pytest.mark.parametrize("objective", [CandidateErrors(), Halved(), AnswerLikelihood(), Certainty()], ids=described)
def test_other_losses_are_not_taken_to_first_order(objective):
    batch = pack(random_rows("several tokens", odd=False))
    assert objective.linearized(random_logits(batch)[0], batch) is None


@pytest.mark.parametrize("answers", ANSWERS)
def test_the_losses_of_positions_are_those_of_the_gold_tokens_after_them(answers):
    examples = random_rows(answers, odd=True)
    batch = pack(examples)
    logits = random_logits(batch)
    expected, ends = torch.zeros(logits.shape[:-1]), [0]
    for example in examples:
        first, end = ends[-1], ends[-1] + 1  # all candidates have the position before them in common
        for slot, sequence in enumerate(example.sequences):
            positions, end = [first, *range(end, end + sequence.num_answer - 1)], end + sequence.num_answer - 1
            if example.gold[:1] == (slot,):
                for position, token in zip(positions, sequence.ids[-sequence.num_answer :], strict=True):
                    expected[:, position] = -logits[:, position].log_softmax(-1)[:, token]
        ends.append(end)
    losses = AnswerLikelihood().row_losses(logits, batch, False)
    found = losses.by_position
    torch.testing.assert_close(found, expected)
    of_rows = torch.stack([found[:, start:end].sum(dim=1) for start, end in pairwise(ends)], dim=1)
    torch.testing.assert_close(of_rows, losses.totals)


@pytest.mark.parametrize("objective", [CandidateErrors(), Margins(), Certainty()], ids=described)
@pytest.mark.parametrize("answers", [(1, 1), (2, 3)])
def test_an_objective_without_derivative_or_of_the_user_has_an_estimate(objective, answers):
    examples, model = short_examples(answers), tuned_model()
    found = estimate_at(model, batch_loss(model, examples, objective), scale=0.5)
    assert found.finite
    assert all(part.isfinite().all() for part in found.gradient.values())
    logits = needed_logits(model.parts, pack(examples))
    total, weight = objective.row_losses(logits, pack(examples), False).sum()
    assert found.loss == pytest.approx(float(total / weight), rel=1e-4)
    if not isinstance(objective, CandidateErrors):  # the errors may be the same at all points
        assert flat(found.gradient).norm() > 0


class OwnScores(CandidateCrossEntropy):
    losses_from_scores = Margins.losses_from_scores


class OwnLogits(AnswerLikelihood):
    row_losses = Certainty.row_losses


class OwnLogitsOfCandidates(CandidateCrossEntropy):
    needs_vocabulary = LogitObjective.needs_vocabulary
    row_losses = Certainty.row_losses


class Doubled(AnswerLikelihood):
    def row_losses(self, logits, batch, selected):
        totals, weights, *_ = super().row_losses(logits, batch, selected)
        return RowLosses(2 * totals, weights)


class PlainDoubled(LogitObjective):
    def row_losses(self, logits, batch, selected):
        totals, weights, *_ = AnswerLikelihood().row_losses(logits, batch, selected)
        return RowLosses(2 * totals, weights)


@pytest.mark.parametrize(
    ("own", "plain"),
    [
        (OwnScores(), Margins()),
        (OwnLogits(), Certainty()),
        (OwnLogitsOfCandidates(), Certainty()),
        (Doubled(), PlainDoubled()),
    ],
    ids=described,
)
@pytest.mark.parametrize("answers", [(1, 1), (2, 3)])
def test_one_method_of_a_built_in_objective_can_be_replaced(own, plain, answers):
    """What the other methods of the built-in one compute is then not what is minimized."""
    examples, model = short_examples(answers), tuned_model()
    found, expected = (estimate_at(model, batch_loss(model, examples, each), queries=2) for each in (own, plain))
    assert found.gradient.keys() == expected.gradient.keys()
    assert_same_estimate(found, expected)
    assert flat(found.gradient).norm() > 0


@pytest.mark.parametrize("returned", ["number", "sums", "points", "weight", "arrays", "device"])
def test_what_a_users_objective_returns_is_checked(returned, examples):
    class Own(CandidateObjective):
        def losses_from_scores(self, scores, batch):
            own = RowLosses(scores.new_zeros(batch.num_examples), torch.ones(batch.num_examples))
            rows = RowLosses(scores.new_zeros(*scores.shape[:-1], batch.num_examples), own.weights)
            return {
                "number": -scores.sum(),
                "sums": own.sum(),
                "points": own,
                "weight": rows._replace(weights=1.0),
                "arrays": RowLosses(*(each.numpy() for each in rows[:2])),
                "device": rows._replace(weights=rows.weights.to("meta")),
            }[returned]

    model, loss = tiny_loss(examples, objective=Own())
    error = slzo_error(LayerOutputPerturbation(queries=2).estimate, EstimatorContext(model.tensors, loss, 0, 0))
    assert re.search(
        r"losses_from_scores\(\) returned .*must return RowLosses with a total for each point and example", error
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool])
def test_losses_of_other_types_become_float32(dtype, examples):
    class Own(CandidateObjective):
        def losses_from_scores(self, scores, batch):
            totals = torch.ones(*scores.shape[:-1], batch.num_examples, dtype=dtype)
            return RowLosses(totals, torch.ones(batch.num_examples, dtype=dtype))

    model, loss = tiny_loss(examples, objective=Own())
    found = LayerOutputPerturbation(queries=2).estimate(EstimatorContext(model.tensors, loss, 0, 0))
    assert found.loss == 1.0


@pytest.mark.parametrize("returned", ["number", "total", "rows"])
def test_what_a_users_objective_returns_for_positions_is_checked(returned, examples):
    class Own(AnswerLikelihood):
        def row_losses(self, logits, batch, selected):
            found = super().row_losses(logits, batch, selected)
            wrong = {"number": 1.0, "total": found.totals.sum(), "rows": found.totals}
            return found._replace(by_position=wrong[returned])

    model, loss = tiny_loss(examples, objective=Own())
    error = slzo_error(LayerOutputPerturbation().estimate, EstimatorContext(model.tensors, loss, 0, 0))
    expected = (
        r"data\.objective \S*Own: row_losses\(\) returned by_position .*; it must return RowLosses whose by_position"
    )
    assert re.match(expected, error)


def test_changed_totals_without_their_positions_are_refused(examples):
    """The estimator would measure the positions alone, and ignore the change."""

    class Own(AnswerLikelihood):
        def row_losses(self, logits, batch, selected):
            found = super().row_losses(logits, batch, selected)
            return found._replace(totals=found.totals + logits.square().mean())

    model, loss = tiny_loss(examples, objective=Own())
    error = slzo_error(LayerOutputPerturbation().estimate, EstimatorContext(model.tensors, loss, 0, 0))
    assert re.match(
        r"data\.objective \S*Own: row_losses\(\) returned by_position that does not add up to totals; it", error
    )


def test_scores_that_are_not_numbers_are_no_errors(examples):
    """The best of them would be any candidate; the loss says that the model is broken."""
    model, loss = tiny_loss(examples, objective=CandidateErrors())
    (name, tensor), *_ = model.tensors.items()
    assert torch.isfinite(loss.at([UNPERTURBED])).all()
    broken = {name: torch.full_like(tensor.master, torch.nan)}
    assert loss.at([Point(broken, 1.0)]).isnan().all()
