"""Step sizes from forward passes: how far to look, and how far to go."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch.optim import Optimizer

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Loss, Point
from slzo.zo.optim import gradient_power
from slzo.zo.tuned import TunedTensors

# The first step is to lower the loss by this share of it, if the slope held: shares around it came within 3% of the best of five
# constant rates on SmolLM2-135M (layers 28 and 29) and Gemma 3 270M (layer 17), whose best rates differ by a factor of 100.
_SHARE = 0.045
# A perturbation is to change the loss by this share of it: far above rounding, and near enough for a straight line.
_EPS_SHARE = {"float32": 0.01, "half": 0.03}
HALF = (torch.bfloat16, torch.float16)
"""Types in which rounding hides the curvature."""
_FIRST_EPS, _LARGEST_EPS = 1e-3, 1.0
_LOOKS = 3
# A mean loss above this many times that at the weights is beyond the straight line.
_TOO_FAR = 2.0
_LOOK_DIRECTIONS, _DIRECTIONS = 2, 8
_MEMORY = 20.0
# Share of the rate at which the curvature along random directions eats up what a step wins.
_CURVATURE_SHARE = 0.3
# Where some matrices begin at 0 and multiply others (LoRA), slopes are small at first and grow with every step: the rate stays
# below that at which the first step moves an element of the others by this share of their size. SmolLM2-135M, layer 28: dev loss
# 0.593 on SST-2 after 100 steps (best constant rate that was tried: 0.620); twice as much diverged on COPA.
_SHARE_BESIDE_ZEROS = 0.1
# A slope above this many times the usual one is taken for so much: along a few directions the loss explodes, and one step there
# undoes many. Of slopes that are normally distributed it is 1 in 400.
_FAR = 3.0
# Steps after which the share is half of it, and falls with their number, for noise to average out (Robbins and Monro, 1951). With
# 0.03 and the root of the steps, three runs of 320 steps on movie reviews ended 1 to 3 points lower.
_HALF_STEPS = 100
# Directions of the measurement are drawn as of this step, which no training reaches: those of training stay as they are.
_PROBE_STEP = 2**40


@dataclass
class AutoStep:
    r"""A learning rate that follows the loss and its slopes (Polyak's step, 1987, for directional derivatives).

    A step :math:`-\eta s z` along a direction z with slope s lowers the loss L by about :math:`\eta s^2`. That shall be a share
    :math:`\kappa` of L, whatever the model's scale. Along random directions of mean curvature c it also raises the loss, by
    :math:`\eta^2 s^2 c / 2`, so the rate stays well below :math:`1 / c`:

    .. math:: \eta_t = \min(\kappa \, \bar L_t \, / \, \overline{s^2}_t, \; 0.3 / c) \, / \, (1 + t / 100)

    with running means over about 20 steps; c is that of the beginning, and taken to grow as the mean squared slope does. Slopes
    that shrink as the loss flattens out make the rate grow, batches that disagree make it smaller, and it falls with the number
    of steps for noise to average out. LoRA's matrices have a third limit, see ``largest``.

    Attributes:
        eps: Size of the perturbation.
        loss: Running mean of the loss.
        square: Running mean of the squared slopes.
        curvature: Mean second derivative of the loss along random directions, before training; 0 where it is not known.
        weight: Steps that the means stand for.
        steps: Steps taken.
        factor: What the rate is multiplied by; halved when training goes wrong.
        evaluations: Batch evaluations that the measurement took.
        lowest: The lowest loss there can be; ``loss`` is the distance to it.
        largest: What the rate may be at most, where matrices that are 0 multiply others; 0 where there are none.
        first_square: Mean squared slope before training; 0 where it is not known, or where slopes are to grow
            (``largest``).
    """

    eps: float
    loss: float
    square: float
    curvature: float = 0.0
    weight: float = float(_DIRECTIONS)
    steps: int = 0
    factor: float = 1.0
    evaluations: int = 0
    lowest: float = 0.0
    largest: float = 0.0
    first_square: float = 0.0

    @classmethod
    def measure(
        cls,
        tuned: TunedTensors,
        loss: Loss,
        seed: int,
        eps: float | None = None,
        half: bool = False,
        lowest: float = 0.0,
    ) -> Self:
        """Look along some random directions from where the masters are; 17 to 29 evaluations of the batch.

        The eps that is found changes the loss by a hundredth of it, and nowhere does the curvature change it more than the slope:
        further away the loss is no straight line.

        Args:
            tuned: What is tuned; its live weights are at the masters, before and after.
            loss: Of a batch.
            seed: Of the directions.
            eps: Size of the perturbation; ``None`` to find one.
            half: The model computes in half precision: three hundredths then, and no curvature.
            lowest: The lowest loss there can be.

        Raises:
            SlzoError: The loss is not finite or not above the lowest, or does not change at any distance.
        """
        look, given = _Look(tuned, loss, seed, lowest), eps
        try:
            here = look.here()
            _check(here)
            if eps is None:
                eps = _find_eps(look, here, _EPS_SHARE["half" if half else "float32"])
            mean, square = look.at(eps, _DIRECTIONS)
        finally:
            tuned.restore()
        _check(mean)
        if square == 0:
            advice = (
                "give a larger one, or leave it out"
                if given is not None
                else "use model.dtype float32, or another scope"
            )
            raise SlzoError(
                f"model.eps {eps:g}: no direction changes the loss of {mean:.4g}, rounding hides it; {advice}"
            )
        curvature = 0.0 if half else 2 * (mean - here) / eps**2  # in half precision it drowns in rounding
        if given is None and curvature > 0:
            eps = min(eps, float(f"{2 * math.sqrt(square) / curvature:.2g}"))
        largest = _SHARE_BESIDE_ZEROS * _size_beside_zeros(tuned) / math.sqrt(square)
        first = 0.0 if largest > 0 else square
        return cls(
            eps,
            mean,
            square,
            curvature,
            evaluations=look.evaluations,
            lowest=lowest,
            largest=largest,
            first_square=first,
        )

    @property
    def slope(self) -> float:
        """Root mean square of the slopes."""
        return math.sqrt(self.square)

    @property
    def promise(self) -> float:
        """Share of the loss that the first step is to lower it by, if the slope held."""
        return self._before_falling() * self.square / max(self.loss, 1e-30)

    def clip_factor(self, estimate: Estimate) -> float:
        """Factor, at most 1, that brings slopes far above the usual ones down to the limit."""
        square, limit = _mean_square(estimate), _FAR**2 * self.square
        return math.sqrt(limit / square) if 0 < limit < square else 1.0

    def update(self, estimate: Estimate) -> None:
        """Take a finite estimate's loss and slopes, these up to the limit, into the running means."""
        square, limit = _mean_square(estimate), _FAR**2 * self.square
        if limit > 0:
            square = min(square, limit)
        self.steps += 1
        self.weight = min(self.weight + 1, _MEMORY)
        self.loss += (estimate.loss - self.lowest - self.loss) / self.weight
        self.square += (square - self.square) / self.weight

    def rate(self, optimizer: Optimizer, estimator: Estimator) -> float:
        r"""The learning rate.

        Optimizers and estimators that divide the gradient by its size move every element by about the rate: it is then the
        length that plain gradient descent would move an element, :math:`\eta` times the slope.

        Args:
            optimizer: Whose rate it is.
            estimator: Of the gradient.

        Raises:
            SlzoError: No rate is known for this optimizer.
        """
        power, share = gradient_power(optimizer)
        power = 0 if estimator.normalizes else power
        share = share * self.factor / (1 + self.steps / _HALF_STEPS)
        return share * self._before_falling() * (self.slope if power == 0 else 1.0)

    def set_rate(self, optimizer: Optimizer, estimator: Estimator) -> None:
        """Give an optimizer its learning rate for the next step."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(optimizer, estimator)

    def describe(self, sets_rate: bool = True) -> str:
        """What was measured, in a line; and what the first step is to bring, where it sets the rate."""
        curvature = f"{self.curvature:.3g}" if self.curvature != 0 else "not known"
        line = (
            f"Step size: eps {self.eps:.2g}, loss {self.loss:.4g}, slopes {self.slope:.3g} (root mean square), "
            f"curvature {curvature}, {self.evaluations} evaluations"
        )
        if not sets_rate:
            return line
        less = "" if self.promise > 0.99 * _SHARE else f", by {_SHARE:.1%} if nothing limited the rate"
        return f"{line}; the first step is to lower the loss by {self.promise:.2%}{less}"

    def _before_falling(self) -> float:
        """The rate of plain gradient descent, were it the first step."""
        rate = _SHARE * max(self.loss, 0.0) / max(self.square, 1e-30)
        if self.curvature > 0:
            grown = max(1.0, self.square / self.first_square) if self.first_square > 0 else 1.0
            rate = min(rate, _CURVATURE_SHARE / (grown * self.curvature))
        if self.largest > 0:
            rate = min(rate, self.largest)
        return rate

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, for checkpoints."""
        return asdict(self)


def _mean_square(estimate: Estimate) -> float:
    return statistics.fmean(slope * slope for slope in estimate.projected_grad)


@dataclass
class _Look:
    tuned: TunedTensors
    loss: Loss
    seed: int
    lowest: float
    evaluations: int = 0

    def here(self) -> float:
        """Loss without a perturbation; the live weights must be at the masters."""
        self.evaluations += 1
        return float(self.loss.at([Point({}, 0.0)])[0]) - self.lowest

    def at(self, eps: float, directions: int) -> tuple[float, float]:
        """Mean loss and mean squared slope at a distance along some directions."""
        losses, squares = [], []
        for query in range(directions):
            z = self.tuned.draw(self.seed, _PROBE_STEP, query)
            high, low = self.loss.at([Point(z, eps), Point(z, -eps)]).tolist()
            losses.append((high + low) / 2 - self.lowest)
            squares.append(((high - low) / (2 * eps)) ** 2)
        self.evaluations += 2 * directions
        return statistics.fmean(losses), statistics.fmean(squares)


def _find_eps(look: _Look, here: float, share: float) -> float:
    """The distance that changes the loss by a share of it; two significant digits."""
    eps = _FIRST_EPS
    for _ in range(_LOOKS):
        loss, square = look.at(eps, _LOOK_DIRECTIONS)
        change = eps * math.sqrt(square) if math.isfinite(square) else math.inf
        if not math.isfinite(change) or not loss < _TOO_FAR * here:
            eps /= 30
        else:
            _check(loss)
            if share / 3 < change / loss < 3 * share:
                return float(f"{eps * share * loss / change:.2g}")
            eps = eps * 30 if change == 0 else eps * min(30.0, max(1 / 30, share * loss / change))
        eps = min(eps, _LARGEST_EPS)
    return float(f"{eps:.2g}")


def _size_beside_zeros(tuned: TunedTensors) -> float:
    """Root mean square of the matrices that are tuned, where some others among them are 0; else 0."""
    matrices = [master.detach() for master in tuned.masters if master.dim() > 1]
    others = [master for master in matrices if master.any()]
    if len(others) in (0, len(matrices)):
        return 0.0
    return math.sqrt(sum(float(m.square().sum()) for m in others) / sum(m.numel() for m in others))


def _check(loss: float) -> None:
    if not math.isfinite(loss):
        raise SlzoError(
            f"model.eps or model.optimizer.lr auto: the loss is {loss} before training; use model.dtype bfloat16 or float32, or "
            "a smaller model.eps"
        )
    if loss <= 0:
        raise SlzoError(
            f"model.eps or model.optimizer.lr auto: the loss is {loss:.4g}, and a share of it needs one above 0; give numbers "
            "instead of auto"
        )
