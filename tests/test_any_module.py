"""The step on any torch module: a small convolutional network and an encoder, no language model and no tokens."""

import subprocess
import sys

import pytest
import torch
from helpers import cnn, described, flat, image_loss, images, page_code
from torch import nn
from torch.nn import functional as F

from slzo.utils.errors import SlzoError
from slzo.zo import ClosureLoss, EstimatorContext, TunedTensors, take_step
from slzo.zo.estimators import FZOO, LOZO, SPSA, Backprop, EvolutionStrategy, OneSided


class Encoder(nn.Module):
    """Rows of pixels as a sequence, its states averaged."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, pixels):
        return self.head(self.inner(pixels[:, 0]).mean(dim=1))


@pytest.mark.parametrize("make", [cnn, Encoder])
def test_a_classifier_learns_by_the_lines_of_the_page(make):
    model = make().eval()
    batch, (held_x, held_y) = images(), images(seed=1)
    exec(page_code("docs/extending.md", "step"), {"torch": torch, "F": F, "model": model, "loader": [batch] * 150})
    with torch.no_grad():
        assert F.cross_entropy(model(batch[0]), batch[1]) < 0.3
        assert (model(held_x).argmax(dim=1) == held_y).float().mean() > 0.85
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_needs_torch_only():
    code = (
        "import sys; import slzo.zo, slzo.zo.estimators; "
        "assert not {'transformers', 'lightning', 'torchmetrics', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"num_queries": 0}, {"queries_at_once": 0}])
@pytest.mark.parametrize("estimator", [SPSA(), OneSided(), EvolutionStrategy()], ids=described)
def test_a_number_out_of_range_is_named(estimator, wrong):
    tuned, loss = image_loss(cnn(), images())
    ((name, value),) = wrong.items()
    with pytest.raises(SlzoError, match=f"^{name} {value}: must be "):
        estimator.estimate(EstimatorContext(tuned, loss, 0, 0, **wrong))


@pytest.mark.parametrize(
    "estimator", [SPSA(), OneSided(), FZOO(), LOZO(), EvolutionStrategy(), Backprop()], ids=described
)
def test_every_estimator_takes_a_step(estimator):
    model = cnn()
    x, y = images()
    tuned, loss = image_loss(model, (x, y))
    optimizer = torch.optim.SGD(tuned.masters, lr=1e-3)
    before = flat(dict(model.named_parameters()))
    context = EstimatorContext(tuned, loss, seed=0, step=0, eps=1e-3, num_queries=2)
    estimate, norm = take_step(context, estimator, optimizer, measure_update=True)
    assert estimate.loss == pytest.approx(float(F.cross_entropy(model(x), y)), rel=0.05)
    moved = float((flat(dict(model.named_parameters())) - before).norm())
    assert moved == pytest.approx(norm, rel=1e-4)
    assert moved > 0


def test_the_gradient_is_that_of_autograd():
    model = cnn()
    x, y = images()
    tuned, loss = image_loss(model, (x, y))
    plain = F.cross_entropy(model(x), y)
    expected = dict(zip(tuned.names, torch.autograd.grad(plain, model.parameters()), strict=True))
    value, gradient = loss.gradient()
    assert value == pytest.approx(float(plain))
    torch.testing.assert_close(gradient, expected)


def test_a_model_in_bfloat16_learns_from_its_masters():
    model, (x, y) = cnn().bfloat16(), images()
    tuned, loss = image_loss(model, (x.bfloat16(), y))
    before = flat(tuned.clone_masters())
    take_step(EstimatorContext(tuned, loss, seed=0, step=0, eps=1e-2), SPSA(), torch.optim.SGD(tuned.masters, lr=1e-6))
    assert not torch.equal(flat(tuned.named_masters()), before)


def test_a_model_in_float64_is_refused():
    """Its masters would round the weights."""
    with pytest.raises(SlzoError, match=r"is float64, and masters are float32; convert the module to float32$"):
        image_loss(cnn().double(), images())


def test_a_step_that_fails_leaves_the_weights_and_no_gradient():
    def fails():
        raise KeyboardInterrupt

    model = cnn()
    tuned, _ = image_loss(model, images())
    before = flat(tuned.clone_masters())
    context = EstimatorContext(tuned, ClosureLoss(tuned, fails), seed=0, step=0, eps=1.0)
    with pytest.raises(KeyboardInterrupt):
        take_step(context, SPSA(), torch.optim.SGD(tuned.masters, lr=1.0))
    assert torch.equal(flat(dict(model.named_parameters())), before)
    assert all(master.grad is None for master in tuned.masters)


def test_a_loss_that_is_no_number_is_named():
    tuned, _ = image_loss(cnn(), images())
    context = EstimatorContext(tuned, ClosureLoss(tuned, lambda: torch.ones(2)), seed=0, step=0, eps=1.0)
    with pytest.raises(SlzoError, match=r"^the closure returned a tensor of shape \(2,\); return the mean loss"):
        take_step(context, SPSA(), torch.optim.SGD(tuned.masters, lr=1.0))


@pytest.mark.parametrize("estimator", [SPSA(), Backprop()], ids=described)
@pytest.mark.parametrize("wrong", [None, "loss", {"loss": 1.0}, torch.ones(2), (torch.ones(()), 1)], ids=repr)
def test_a_closure_that_returns_no_loss_is_told_so(estimator, wrong):
    tuned, _ = image_loss(cnn(), images())
    context = EstimatorContext(tuned, ClosureLoss(tuned, lambda: wrong), seed=0, step=0, eps=1.0)
    with pytest.raises(SlzoError, match=r"^the closure returned .*; return the mean loss, of shape \(\)$"):
        take_step(context, estimator, torch.optim.SGD(tuned.masters, lr=1.0))


def test_a_closure_may_return_a_number():
    tuned, loss = image_loss(cnn(), images())
    of_numbers = ClosureLoss(tuned, lambda: float(loss.closure()))
    first, second = (SPSA().estimate(EstimatorContext(tuned, each, seed=0, step=0)) for each in (loss, of_numbers))
    assert first.loss == second.loss
    with pytest.raises(SlzoError, match=r"^the loss depends on no tuned tensor"):
        of_numbers.gradient()


def test_an_optimizer_of_the_modules_own_parameters_is_refused():
    """It would change nothing: the masters are other tensors."""
    model = cnn()
    tuned, loss = image_loss(model, images())
    context = EstimatorContext(tuned, loss, seed=0, step=0)
    with pytest.raises(SlzoError, match=r"^take_step: the optimizer has parameters of the module; .*tuned.masters"):
        take_step(context, SPSA(), torch.optim.SGD(model.parameters(), lr=1.0))
    take_step(context, SPSA(), torch.optim.SGD(tuned.masters[:1], lr=1.0))  # some of them


def test_what_cannot_be_tuned_is_refused():
    for wrong in (list(cnn().parameters()), cnn(), cnn().named_parameters()):
        with pytest.raises(SlzoError, match=r"^model\.scope: TunedTensors got a \w+; give a dictionary of tensors"):
            TunedTensors(wrong)
    with pytest.raises(SlzoError, match=r"^tensor 'steps' is of torch\.int64; tune tensors of floating-point types"):
        ClosureLoss(TunedTensors({"steps": torch.arange(3)}), lambda: 1.0)
