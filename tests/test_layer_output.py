"""Perturbing the output of the tuned layer: against plain forward passes, and against autograd."""

import copy

import pytest
import torch
from helpers import FAMILIES, described, layer_forward, plain_losses, plain_scores, tiny_loss, tiny_model
from torch.nn import functional as F

from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.zo.estimators import LayerOutputPerturbation, Request
from slzo.zo.layer_output import PackedLayerOutput
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy

pytestmark = pytest.mark.fast


def first_shifted(sequence):
    """The first position of a sequence that predicts an answer token."""
    return len(sequence.ids) - sequence.num_answer - 1


def plain_row_losses(model, layer, examples, shifts, objective):
    """What each example adds to the loss, with the layer's output shifted at each sequence's answer positions.

    ``shifts`` has, for each example and candidate, the shift of the positions that predict the answer, shape (answer, width).
    """
    found = []
    for example, own in zip(examples, shifts, strict=True):
        scores = []
        for sequence, shift in zip(example.sequences, own, strict=True):

            def add(module, inputs, output, sequence=sequence, shift=shift):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden, start = hidden.clone(), first_shifted(sequence)
                hidden[0, start : start + len(shift)] += shift
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = model.get_submodule(layer).register_forward_hook(add)
            (tokens,) = plain_scores(model, type(example)(0, (sequence,), (0,)))
            handle.remove()
            scores.append(tokens)
        gold = example.gold[0]
        if isinstance(objective, AnswerLikelihood):
            found.append(-scores[gold].sum())
        else:
            means = torch.stack([tokens.mean() for tokens in scores])
            found.append(F.cross_entropy(means[None], torch.tensor([gold])))
    return torch.stack(found)


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_at_a_shifted_output(family, layer, objective, examples):
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parts = ModelParts(tiny_model(family, scale=1.5), onednn=False)
    forward = layer_forward(parts, layer)
    batch = pack(examples)
    output = PackedLayerOutput(forward, batch, forward.prefix(batch), objective, "answer")
    torch.manual_seed(1)
    shifts = 0.3 * torch.randn(3, len(output.row), output.width)
    losses = output.losses(shifts)
    assert torch.equal(output.applied(shifts), shifts)
    where = {int(position): number for number, position in enumerate(output.positions)}
    for number in range(3):
        of_examples, sequences = [], iter(sequences_of(batch))
        for example in examples:
            own = []
            for sequence in example.sequences:
                positions = next(sequences)[-sequence.num_answer :]
                own.append(shifts[number][[where[position] for position in positions]])
            of_examples.append(own)
        expected = plain_row_losses(model, f"{parts.layers_path}.{layer}", examples, of_examples, objective)
        torch.testing.assert_close(losses[number], expected.float(), rtol=2e-4, atol=2e-4)


def sequences_of(batch):
    """Packed positions of the candidates' sequences, in the order of the candidates."""
    last = batch.needed[batch.token_needed[batch.candidate_length.cumsum(0) - 1]]
    return [positions.tolist() for positions in batch.layout.sequences_up_to(last)]


def gradient_from_answers(model, layer, examples, names):
    """The gradient of the cross-entropy with the layer's output detached at all positions that predict no answer token."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    losses = []
    for example in examples:
        scores = []
        for sequence in example.sequences:

            def detach(module, inputs, output, sequence=sequence):
                hidden = output[0] if isinstance(output, tuple) else output
                start = first_shifted(sequence)
                hidden = torch.cat([hidden[:, :start].detach(), hidden[:, start:]], dim=1)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = reference.get_submodule(layer).register_forward_hook(detach)
            (tokens,) = plain_scores(reference, type(example)(0, (sequence,), (0,)))
            handle.remove()
            scores.append(tokens.mean())
        losses.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([example.gold[0]])))
    torch.stack(losses).mean().backward()
    return {name: parameters[name].grad for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_mean_is_the_gradient(family, examples):
    model, loss = tiny_loss(examples, family)
    expected = gradient_from_answers(model.parts.model, f"{model.parts.layers_path}.2", examples, model.tensors.names)
    estimator = LayerOutputPerturbation(queries=50, scale=0.02)
    estimates = [estimator.estimate(Request(model.tensors, loss, 0, step)) for step in range(40)]
    assert estimates[0].loss == pytest.approx(float(plain_losses(model.parts.model, examples)[0]), rel=1e-5)
    for name, wanted in expected.items():
        found = torch.stack([one.gradient[name] for one in estimates]).double()
        error = found.std(dim=0) / len(found) ** 0.5
        distance = (
            ((found.mean(dim=0) - wanted) / error.clamp(min=1e-7 * float(wanted.abs().max()))).square().mean().sqrt()
        )
        assert distance < 1.6, name  # 1 if the differences are noise
        cosine = F.cosine_similarity(found.mean(dim=0).flatten(), wanted.double().flatten(), dim=0)
        assert cosine > 0.9, name
