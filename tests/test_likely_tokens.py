"""The likely tokens of a vocabulary: exact without a shift, the softmax's derivative for them, and nothing for the others."""

import pytest
import torch
from helpers import batch_loss, described, estimate_at, tuned_model

from slzo.batches.losses import RowLosses, token_log_likelihoods
from slzo.batches.packing import pack
from slzo.models.logits import final_states
from slzo.zo import likely_tokens
from slzo.zo.estimators import Backprop, EstimatorContext
from slzo.zo.likely_tokens import LikelyTokens
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.packed_layer_output import PackedLayerOutput
from tiny import VOCABULARY

pytestmark = pytest.mark.fast


@pytest.fixture
def few(monkeypatch):
    """40 likely tokens of 320."""
    monkeypatch.setattr(likely_tokens, "NUM_LIKELY", 40)


def random_logits(batch, points=1):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(points, batch.logit_positions.numel(), VOCABULARY, generator=generator)


def kept(logits, likely):
    """Logits of each row's likely tokens, and that of the rest."""
    return likely.logits(logits, lambda own, ids: own[:, ids])


@pytest.mark.parametrize(("temperature", "least", "most"), [(1.0, 0.01, 0.6), (0.7, 0.001, 0.6), (2.0, 0.01, 0.9)])
def test_likelihoods_without_a_shift_are_exact(few, examples, temperature, least, most):
    batch = pack(examples)
    logits = random_logits(batch)
    likely = LikelyTokens.of(logits[0], batch, temperature)
    assert likely.ids.shape == (len(examples), 40)
    left_out = (likely.rest / temperature).exp().sum() / (logits[0] / temperature).exp().sum()
    assert least < float(left_out) < most
    found = token_log_likelihoods(kept(logits, likely), likely.batch, temperature)
    expected = (logits / temperature).log_softmax(-1)[..., batch.token_logit, batch.token_id]
    torch.testing.assert_close(found, expected)


def test_all_answer_tokens_of_a_row_are_likely_and_rows_do_not_mix(examples, monkeypatch):
    monkeypatch.setattr(likely_tokens, "NUM_LIKELY", 3)
    monkeypatch.setattr(likely_tokens, "_LEAST_MULTIPLE", 1)
    batch = pack(examples)
    logits = random_logits(batch)
    likely = LikelyTokens.of(logits[0], batch)
    assert likely.ids.shape[1] > 3
    found, expected = token_log_likelihoods(kept(logits, likely), likely.batch), token_log_likelihoods(logits, batch)
    torch.testing.assert_close(found, expected)
    first = 0
    for number, size in enumerate(likely.batch.num_logits):
        alone = LikelyTokens.of(logits[0, first : first + size], pack(examples[number : number + 1]))
        torch.testing.assert_close(alone.rest, likely.rest[first : first + size])
        used = likely.ids[number] if likely.surplus is None else likely.ids[number][~likely.surplus[number]]
        assert torch.equal(alone.ids[0], used)
        first += size


def test_the_derivative_is_that_of_the_softmax_for_likely_tokens(few, examples):
    batch = pack(examples)
    logits = random_logits(batch)
    likely = LikelyTokens.of(logits[0], batch)
    gradients = []
    for own in (
        lambda z: token_log_likelihoods(kept(z, likely), likely.batch),
        lambda z: token_log_likelihoods(z, batch),
    ):
        z = logits.clone().requires_grad_()
        gradients.append(torch.autograd.grad(own(z).sum(), z)[0].split(likely.batch.num_logits, dim=1))
    for found, expected, ids in zip(*gradients, likely.ids, strict=True):
        torch.testing.assert_close(found[..., ids], expected[..., ids])
        others = torch.ones(VOCABULARY, dtype=torch.bool)
        others[ids] = False
        assert not found[..., others].any()
        assert expected[..., others].abs().sum() < 0.7 * expected.abs().sum()


def test_the_tokens_of_a_row_do_not_depend_on_the_others(few, examples):
    batch, alone = pack(examples), pack(examples[3:4])
    logits = random_logits(batch)[0]
    likely = LikelyTokens.of(logits, batch)
    first = sum(likely.batch.num_logits[:3])
    own = LikelyTokens.of(logits[first : first + likely.batch.num_logits[3]], alone)
    assert torch.equal(own.ids[0], likely.ids[3])
    torch.testing.assert_close(own.rest, likely.rest[first : first + likely.batch.num_logits[3]])


def test_a_small_vocabulary_is_computed_whole(examples):
    batch = pack(examples)
    assert LikelyTokens.of(random_logits(batch)[0], batch) is None


@pytest.mark.parametrize("objective", [AnswerLikelihood(), CandidateCrossEntropy()], ids=described)
def test_losses_at_shifts_are_those_of_plain_logits(few, examples, objective, monkeypatch):
    """The logits of the other tokens are those without a shift, in a computation over the whole vocabulary."""
    model, batch = tuned_model(), pack(examples)
    parts, stop = model.parts, model.forward.span.stop
    loss = batch_loss(model, batch, objective)
    outputs = []

    def look(output):
        generator = torch.Generator().manual_seed(1)
        shifts = 0.5 * torch.randn(3, len(output.size), output.width, generator=generator)
        likely, hidden = output._unshifted.likely, output._unshifted.output
        assert likely is not None
        base = parts.head(final_states(parts, batch, stop, hidden)[0])
        is_likely = torch.zeros(base.shape, dtype=torch.bool)
        rows = torch.arange(len(examples)).repeat_interleave(torch.tensor(likely.batch.num_logits))
        is_likely[torch.arange(len(base))[:, None], likely.ids[rows]] = True
        expected = []
        for shift in shifts:
            moved = hidden.clone()
            moved[batch.logit_positions] += shift
            logits = torch.where(is_likely, parts.head(final_states(parts, batch, stop, moved)[0]), base)
            own = output._unshifted.objective.row_losses(logits[None], batch, False)
            expected.append(own.by_position)
        outputs.append((output.losses(shifts), torch.cat(expected)))
        return torch.zeros(len(output.size), output.width), len(shifts)

    loss.gradient_from_output(look)
    torch.testing.assert_close(*outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "objective", [AnswerLikelihood(), pytest.param(CandidateCrossEntropy(), marks=pytest.mark.slow)], ids=described
)
def test_the_mean_of_many_queries_is_near_the_gradient(few, examples, objective):
    """In the last layer. Of the probability 40 tokens leave out a tenth; all 320 leave out nothing."""
    model, batch = tuned_model(layer=3), pack(examples)
    expected = Backprop().estimate(EstimatorContext(model.tensors, batch_loss(model, batch, objective), 0, 0)).gradient
    found = estimate_at(model, batch_loss(model, batch, objective), queries=4000, scale=0.01).gradient
    one, other = (torch.cat([gradient[name].flatten() for name in expected]) for gradient in (found, expected))
    assert float(one @ other / (one.norm() * other.norm())) > 0.9


class OwnLogits(AnswerLikelihood):
    def row_losses(self, logits, batch, selected):
        assert logits.shape[-1] == VOCABULARY
        totals, weights, *_ = super().row_losses(logits, batch, selected)
        return RowLosses(totals, weights)


class OwnScores(CandidateCrossEntropy):
    def losses_from_scores(self, scores, batch):
        return super().losses_from_scores(scores, batch)


@pytest.mark.parametrize(
    ("objective", "temperature"),
    [(AnswerLikelihood(), 1.0), (CandidateCrossEntropy(), 1.0), (OwnScores(), 1.0), (OwnLogits(), None)],
    ids=lambda value: type(value).__name__,
)
def test_losses_say_whether_they_read_logits_themselves(objective, temperature, examples):
    batch = pack(examples)
    found = objective.row_losses(torch.zeros(1, batch.logit_positions.numel(), VOCABULARY), batch, False)
    assert found.likelihood_temperature == temperature


def test_an_own_objective_sees_the_whole_vocabulary_at_shifts(few, examples):
    model = tuned_model()
    assert estimate_at(model, batch_loss(model, examples, OwnLogits()), queries=2).finite


def test_likely_tokens_take_sixteen_queries(few, examples, monkeypatch):
    model, evaluated, losses = tuned_model(), [], PackedLayerOutput.losses
    monkeypatch.setattr(
        PackedLayerOutput, "losses", lambda self, shifts: evaluated.append(len(shifts)) or losses(self, shifts)
    )
    assert estimate_at(model, batch_loss(model, examples, AnswerLikelihood())).finite
    assert sum(evaluated) == 2 * 16
