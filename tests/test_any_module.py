"""The step on any torch module: a small convolutional network and an encoder, no language model and no tokens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slzo.utils.errors import SlzoError
from slzo.zo import ClosureLoss, Request, TunedTensors, take_step
from slzo.zo.estimators import FZO, LOZO, SPSA, Backprop, EvolutionStrategy, ForwardGradient, OneSided

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def images(count=64, seed=0):
    """Noise with a bright left or right half: two classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    pixels[labels == 0, :, :, :4] += 0.7
    pixels[labels == 1, :, :, 4:] += 0.7
    return pixels, labels


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 2)
    )


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
    code = re.search(r"<!-- tested: step -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(code, {"torch": torch, "F": F, "model": model, "loader": [batch] * 150})
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


@pytest.mark.parametrize(
    "estimator",
    [SPSA(), OneSided(), FZO(), LOZO(), EvolutionStrategy(), ForwardGradient(), Backprop()],
    ids=lambda kind: kind.describe(),
)
def test_every_estimator_takes_a_step(estimator):
    model = cnn().eval()
    x, y = images()
    tuned = TunedTensors(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(tuned.masters, lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    loss = ClosureLoss(model, tuned, lambda: F.cross_entropy(model(x), y))
    request = Request(tuned, loss, seed=0, step=0, eps=1e-3, num_queries=2)
    outcome = take_step(request, estimator, optimizer, measure_update=True)
    expected = float(F.cross_entropy(model(x), y))
    assert outcome.estimate.loss == pytest.approx(expected, rel=0.05)
    moved = sum(float((tensor - before[name]).square().sum()) for name, tensor in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(outcome.update_norm, rel=1e-4)
    assert moved > 0


def test_gradient_and_slope_are_those_of_autograd():
    model = cnn().eval()
    x, y = images()
    tuned = TunedTensors(dict(model.named_parameters()))
    loss = ClosureLoss(model, tuned, lambda: F.cross_entropy(model(x), y))
    expected = dict(
        zip(tuned.names, torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters()), strict=True)
    )
    value, gradient = loss.gradient()
    assert value == pytest.approx(float(F.cross_entropy(model(x), y)))
    for name, part in expected.items():
        torch.testing.assert_close(gradient[name], part)
    direction = tuned.draw(0, 0, 0)
    slope = sum(float((direction[name] * part).sum()) for name, part in expected.items())
    assert loss.slope(direction)[1] == pytest.approx(slope, rel=1e-3)


def test_a_model_in_bfloat16_learns_from_its_masters():
    model = cnn().eval().bfloat16()
    x, y = images()
    tuned = TunedTensors(dict(model.named_parameters()))
    before = tuned.copy_of_masters()
    optimizer = torch.optim.SGD(tuned.masters, lr=1e-6)
    loss = ClosureLoss(model, tuned, lambda: F.cross_entropy(model(x.bfloat16()), y))
    take_step(Request(tuned, loss, seed=0, step=0, eps=1e-2), SPSA(), optimizer)
    assert any(not torch.equal(before[name], master) for name, master in tuned.named_masters().items())


def test_a_step_that_fails_leaves_the_weights_and_no_gradient():
    model = cnn().eval()
    tuned = TunedTensors(dict(model.named_parameters()))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}

    def fails():
        raise KeyboardInterrupt

    request = Request(tuned, ClosureLoss(model, tuned, fails), seed=0, step=0, eps=1.0)
    with pytest.raises(KeyboardInterrupt):
        take_step(request, SPSA(), torch.optim.SGD(tuned.masters, lr=1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert all(master.grad is None for master in tuned.masters)


def test_a_loss_that_is_not_finite_moves_nothing():
    model = cnn().eval()
    tuned = TunedTensors(dict(model.named_parameters()))
    before = tuned.copy_of_masters()
    optimizer = torch.optim.SGD(tuned.masters, lr=1.0)
    request = Request(tuned, ClosureLoss(model, tuned, lambda: torch.tensor(float("nan"))), seed=0, step=0)
    outcome = take_step(request, SPSA(), optimizer, measure_update=True)
    assert not outcome.estimate.finite
    assert outcome.update_norm is None
    assert all(torch.equal(before[name], master) for name, master in tuned.named_masters().items())


def test_a_closure_has_no_parts_of_its_rows():
    model = cnn().eval()
    x, y = images()
    tuned = TunedTensors(dict(model.named_parameters()))
    loss = ClosureLoss(model, tuned, lambda: F.cross_entropy(model(x), y))
    with pytest.raises(SlzoError, match="leave divide_rows out"):
        SPSA(divide_rows=True).estimate(Request(tuned, loss, seed=0, step=0, num_queries=2))
