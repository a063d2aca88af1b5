"""What each row adds to a loss, for the objectives of slzo and of a user."""

import random
from itertools import product

import pytest
import torch
from helpers import (
    batch_loss,
    described,
    estimate_at,
    flat,
    random_example,
    short_examples,
    tiny_loss,
    tuned_model,
)

from slzo.batches.encoded import EncodedExample
from slzo.batches.losses import LossSum
from slzo.batches.packing import pack
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import LayerOutputPerturbation, Request
from slzo.zo.objectives import (
    AnswerLikelihood,
    CandidateCrossEntropy,
    CandidateErrors,
    CandidateObjective,
    LogitObjective,
)
from tiny import VOCABULARY

pytestmark = pytest.mark.fast


class Margins(CandidateObjective):
    """A user's objective of scores: by how much each wrong candidate is closer than 1 to the right one."""

    def of_scores(self, scores, batch):
        right = scores[batch.right][batch.candidate_example]  # one in each example
        wrong = (1 + scores - right).relu()[~batch.right]
        return LossSum(wrong.sum(), torch.tensor(float(batch.num_examples)))


class Certainty(LogitObjective):
    """A user's objective of logits, with another weight for each example."""

    def of_logits(self, logits, batch, selected):
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return LossSum(entropy.sum(), torch.tensor(float(batch.needed.numel())))


WEIGHTED = CandidateCrossEntropy([1.0, 5.0])
BUILT_IN = [CandidateCrossEntropy(), WEIGHTED, AnswerLikelihood(), CandidateErrors()]


def plain_loss(objective, logits, example):
    """Total and weight of an example alone, from the logits before its answer tokens."""
    batch = pack([example])
    if objective not in BUILT_IN:
        return objective.of_logits(logits, batch, False)
    tokens = logits.log_softmax(-1)[batch.token_needed, batch.token_id].split(batch.candidate_length.tolist())
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


@pytest.mark.parametrize(
    ("objective", "answers"), CASES, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_the_losses_of_rows_are_those_of_each_row_alone(objective, answers):
    generator = random.Random(1)
    examples = [random_example(generator, i, 5, own, i % len(own)) for i, own in enumerate(ANSWERS[answers])]
    if objective in BUILT_IN:  # without a label it has no weight; two right candidates are fine
        examples += [EncodedExample(7 + i, examples[0].sequences, gold) for i, gold in enumerate(((), (0, 1)))]
    batch = pack(examples)
    logits = 2 * torch.randn(3, len(batch.needed), VOCABULARY, generator=torch.Generator().manual_seed(0))
    sizes = [len(pack([example]).needed) for example in examples]
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
        totals, weights = objective.of_rows(given, batch, selected)
        torch.testing.assert_close(torch.stack([totals, weights.expand_as(totals)], dim=-1), expected)
        for point, own in zip(given, expected, strict=True):
            torch.testing.assert_close(torch.stack([*objective.of_logits(point, batch, selected)]), own.sum(dim=0))


@pytest.mark.parametrize("objective", [CandidateErrors(), Margins(), Certainty()], ids=described)
@pytest.mark.parametrize("answers", [(1, 1), (2, 3)])
def test_an_objective_without_derivative_or_of_the_user_has_an_estimate(objective, answers):
    examples, model = short_examples(answers), tuned_model()
    found = estimate_at(model, batch_loss(model, examples, objective), scale=0.5)
    assert found.finite
    assert all(part.isfinite().all() for part in found.gradient.values())
    logits = model.parts.logits(pack(examples), 0, None)
    total, weight = objective.of_logits(logits, pack(examples), False)
    assert found.loss == pytest.approx(float(total / weight), rel=1e-4)
    if not isinstance(objective, CandidateErrors):  # the errors may be the same at all points
        assert flat(found.gradient).norm() > 0


@pytest.mark.parametrize("returned", ["sums", "number"])
def test_what_a_users_objective_returns_is_checked(returned, examples):
    class Own(CandidateObjective):
        def of_scores(self, scores, batch):
            total, weight = -scores.sum(), torch.tensor(float(batch.num_examples))
            return (total, weight) if returned == "sums" else total

    model, loss = tiny_loss(examples, objective=Own())
    request = Request(model.tensors, loss, 0, 0)
    if returned == "sums":
        assert LayerOutputPerturbation(queries=2).estimate(request).finite
        return
    with pytest.raises(SlzoError, match=r"of_scores\(\) returned .*must return a LossSum"):
        LayerOutputPerturbation(queries=2).estimate(request)
