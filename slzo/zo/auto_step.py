"""Measured step sizes: the size of the perturbation and the learning rate, from forward passes alone."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch.optim import Optimizer

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator
from slzo.zo.loss import Loss
from slzo.zo.optim import rate_rule
from slzo.zo.tuned import UNPERTURBED, Point, TunedTensors

# The first step should lower the loss by this share of it, if the loss were linear. Similar shares came within 3% of the best of
# five constant rates on SmolLM2-135M (layers 28 and 29) and Gemma 3 270M (layer 17), whose best rates differ by a factor of 100.
_SHARE = 0.045
# A perturbation should change the loss by this share of it: far more than rounding, and little enough for a linear loss.
_EPS_SHARE = {"float32": 0.01, "half": 0.03}
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Types in which rounding hides the curvature."""
_FIRST_EPS, _LARGEST_EPS = 1e-3, 1.0
_MAX_PROBES = 3
# A mean loss above this many times the loss at the weights is beyond the linear range.
_TOO_FAR = 2.0
_PROBE_DIRECTIONS, _DIRECTIONS = 2, 8
_MEAN_STEPS = 20.0
# Share of the rate at which the curvature along random directions cancels the gain of a step.
_CURVATURE_SHARE = 0.3
# If some matrices start at 0 and multiply others (LoRA), slopes are small at first and grow with every step. The rate is limited
# so that the first step moves an element of the other matrices by at most this share of their size. SmolLM2-135M, layer 28: dev
# loss 0.593 on SST-2 after 100 steps (0.620 with the best constant rate that was tried); twice the share diverged on COPA.
_NONZERO_SHARE = 0.1
# Slopes above this many times the usual one are clipped: along a few directions the loss explodes, and one step there undoes many
# others. One in 400 normally distributed slopes is clipped.
_CLIP_MULTIPLE = 3.0
# After this many steps the rate is halved. It falls with the number of steps, so that noise averages out (Robbins and Monro,
# 1951). With 0.03 and the square root of the steps, three runs of 320 steps on movie reviews ended 1 to 3 points lower.
_HALF_STEPS = 100
# The measurement draws its directions as if in this step, which no training reaches, so it does not use directions of training.
_PROBE_STEP = 2**40


@dataclass(kw_only=True)
class AutoRate(ABC):
    r"""A learning rate that is set before each step, and falls with the number of steps t as :math:`1 / (1 + t / 100)`.

    Attributes:
        steps: Steps so far.
        factor: Factor of the rate, halved at each rollback.
        eps: Size of the perturbation; ``None`` if the estimator perturbs no weights.
        evaluations: Batch evaluations that the measurement took.
    """

    steps: int = 0
    factor: float = 1.0
    eps: float | None
    evaluations: int = 0

    @property
    def divisor(self) -> float:
        """What the rate is divided by: 1 + t / 100, and twice as much after each rollback."""
        return (1 + self.steps / _HALF_STEPS) / self.factor

    @abstractmethod
    def rate(self, optimizer: Optimizer, estimator: Estimator, num_queries: int) -> float:
        """Return the learning rate for the step whose estimate was added last.

        Raises:
            SlzoError: No rate is known for this optimizer.
        """

    def add(self, estimate: Estimate) -> float:
        """Add a finite estimate: count its step. Return the factor, at most 1, that clips its gradient; 1 by default."""
        self.steps += 1
        return 1.0

    @property
    def means(self) -> dict[str, float]:
        """The values that the rate follows, for :meth:`restore_means`; none by default."""
        return {}

    def restore_means(self, means: Mapping[str, float]) -> None:  # noqa: B027  not every rate has some
        """Restore earlier ``means`` when the masters are rolled back; by default there are none."""

    @abstractmethod
    def describe(self, sets_rate: bool = True) -> str:
        """Describe the rate in one line; without ``sets_rate`` only what was measured."""


@dataclass
class AutoStep(AutoRate):
    r"""A learning rate that follows the loss and its slopes (Polyak's step, 1987, for directional derivatives).

    A step :math:`-\eta s z` along a direction z with slope s lowers the loss L by about :math:`\eta s^2`. The rate is chosen so
    that this is a share :math:`\kappa` of L. Along random directions of mean curvature c the step also raises the loss, by
    :math:`\eta^2 s^2 c / 2`, so the rate stays well below :math:`1 / c`:

    .. math:: \eta_t = \min(\kappa \, \bar L_t \, / \, \overline{s^2}_t, \; 0.3 / c) \, / \, (1 + t / 100)

    The means are running means over about 20 steps. c is measured before training and assumed to grow like the mean squared
    slope. The rate grows if slopes shrink as the loss flattens out, and shrinks if batches disagree. It falls with the number of
    steps, so that noise averages out. LoRA's matrices have a third limit, see ``largest``.

    Attributes:
        eps: Size of the perturbation.
        loss: Running mean of the loss above ``lowest``.
        square: Running mean of the squared slopes.
        curvature: Mean second derivative of the loss along random directions, before training; 0 if unknown.
        weight: Number of steps that the means are taken over.
        lowest: Lower bound of the loss.
        largest: Upper limit of the rate if some matrices are 0 and multiply others; 0 for no limit.
        first_square: Mean squared slope before training; 0 if unknown, or if ``largest`` is set, since slopes grow then.
    """

    eps: float
    loss: float
    square: float
    curvature: float = 0.0
    weight: float = float(_DIRECTIONS)
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
        smooth: bool = True,
    ) -> Self:
        """Measure the loss along random directions around the masters, with 17 to 29 evaluations of the batch.

        The measured eps changes the loss by about 1%. It is at most the distance at which the curvature changes the loss as much
        as the slope, because the loss is not linear beyond.

        Args:
            tuned: The tuned tensors. Their live weights equal the masters before and after.
            loss: Loss of a batch.
            seed: Seed of the directions.
            eps: Size of the perturbation; ``None`` to measure it.
            half: Whether the model computes in half precision. Then eps changes the loss by about 3%, and the curvature is not
                measured.
            lowest: Lower bound of the loss.
            smooth: Whether every change of the weights changes the loss, unlike a metric or a reward.

        Raises:
            SlzoError: The loss is not finite or not above ``lowest``, or does not change at any distance.
        """
        probe, given = _Probe(tuned, loss, seed, lowest), eps
        try:
            here = probe.here()
            _check(here, lowest)
            if eps is None:
                eps = _find_eps(probe, here, _EPS_SHARE["half" if half else "float32"])
            mean, square = probe.at(eps, _DIRECTIONS)
        finally:
            tuned.restore()
        _check(mean, lowest)
        if square == 0:
            raise SlzoError(f"model.eps {eps:g}: {_no_effect(mean, given is not None, smooth)}")
        curvature = 0.0 if half else 2 * (mean - here) / eps**2  # rounding hides it in half precision
        if given is None and curvature > 0:
            eps = min(eps, float(f"{2 * math.sqrt(square) / curvature:.2g}"))
        largest = _NONZERO_SHARE * _size_of_nonzero(tuned) / math.sqrt(square)
        return cls(
            eps,
            mean,
            square,
            curvature,
            evaluations=probe.evaluations,
            lowest=lowest,
            largest=largest,
            first_square=0.0 if largest > 0 else square,
        )

    @property
    def means(self) -> dict[str, float]:
        return {"loss": self.loss, "square": self.square, "weight": self.weight}

    def restore_means(self, means: Mapping[str, float]) -> None:
        if means:  # those of a run with another kind of rate are empty
            self.loss, self.square, self.weight = means["loss"], means["square"], means["weight"]

    @property
    def slope(self) -> float:
        """Root mean square of the slopes."""
        return math.sqrt(self.square)

    @property
    def first_gain(self) -> float:
        """Share of the loss that the first step removes, if the loss were linear."""
        return self._undivided_rate() * self.square / max(self.loss, 1e-30)

    def add(self, estimate: Estimate) -> float:
        """Add a finite estimate to the running means. Return the factor, at most 1, that clips its slopes.

        They are clipped to 3 times the usual size, also in the means, and so is the loss of such a step.
        """
        factor = super().add(estimate)
        square = statistics.fmean(slope * slope for slope in estimate.projected_grad)
        limit = _CLIP_MULTIPLE**2 * self.square
        if 0 < limit < square:
            factor, square = math.sqrt(limit / square), limit
        self.weight = min(self.weight + 1, _MEAN_STEPS)
        loss = estimate.loss - self.lowest
        if factor < 1:  # a loss that explodes along a direction must not raise the rate
            loss = min(loss, _CLIP_MULTIPLE * self.loss)
        self.loss += (loss - self.loss) / self.weight
        self.square += (square - self.square) / self.weight
        return factor

    def rate(self, optimizer: Optimizer, estimator: Estimator, num_queries: int) -> float:
        r"""Return the learning rate for the step whose estimate was added last.

        Optimizers and estimators that divide the gradient by its size move every element by about the rate. For them the rate is
        the distance that plain gradient descent would move an element: :math:`\eta` times the slope. The gradient of such an
        optimizer is a mean over ``num_queries`` directions, whose elements are smaller by the square root of their number.

        Raises:
            SlzoError: No rate is known for this optimizer.
        """
        normalizes, share = rate_rule(optimizer)
        slope = self.slope if normalizes or estimator.normalizes else 1.0
        if normalizes:
            slope /= math.sqrt(num_queries)
        return share / self.divisor * self._undivided_rate() * slope

    def describe(self, sets_rate: bool = True) -> str:
        """Describe the measurement in one line, with the expected gain of the first step if this sets the rate."""
        curvature = f"{self.curvature:.3g}" if self.curvature != 0 else "not known"
        line = (
            f"Step size: eps {self.eps:.2g}, loss {self.loss:.4g}, slopes {self.slope:.3g} (root mean square), "
            f"curvature {curvature}, {self.evaluations} evaluations"
        )
        if not sets_rate:
            return line
        less = "" if self.first_gain > 0.99 * _SHARE else f" ({_SHARE:.1%} without the limit on the rate)"
        return f"{line}; the first step should lower the loss by {self.first_gain:.2%}{less}"

    def _undivided_rate(self) -> float:
        """The rate of plain gradient descent, before it is divided by ``divisor``."""
        rate = _SHARE * max(self.loss, 0.0) / max(self.square, 1e-30)
        if self.curvature > 0:
            grown = max(1.0, self.square / self.first_square) if self.first_square > 0 else 1.0
            rate = min(rate, _CURVATURE_SHARE / (grown * self.curvature))
        if self.largest > 0:
            rate = min(rate, self.largest)
        return rate


def _no_effect(loss: float, given: bool, smooth: bool) -> str:
    """Return why no direction changes the loss, and what to do."""
    if not smooth:
        what = f"no direction changes the metric or reward (loss {loss:.4g})"
        return f"{what}; use more rows (data.batch_size), or give a larger model.eps"
    way = "give a larger value, or leave it out" if given else "use model.dtype float32, or another scope"
    return f"rounding hides the effect of every direction on the loss of {loss:.4g}; {way}"


@dataclass
class _Probe:
    tuned: TunedTensors
    loss: Loss
    seed: int
    lowest: float
    evaluations: int = 0

    def here(self) -> float:
        """Return the loss without a perturbation; the live weights must equal the masters."""
        self.evaluations += 1
        return float(self.loss.at([UNPERTURBED])[0]) - self.lowest

    def at(self, eps: float, directions: int) -> tuple[float, float]:
        """Return mean loss and mean squared slope at distance ``eps`` along some directions."""
        losses, squares = [], []
        for query in range(directions):
            # a step perturbs one subset of the tensors, and the measurement should see several
            step = _PROBE_STEP if self.tuned.subset is None else _PROBE_STEP + query
            z = self.tuned.draw(self.seed, step, query)
            high, low = self.loss.at([Point(z, eps), Point(z, -eps)]).tolist()
            self.tuned.restore(z)  # the next direction may not move these tensors
            losses.append((high + low) / 2 - self.lowest)
            squares.append(((high - low) / (2 * eps)) ** 2)
        self.evaluations += 2 * directions
        return statistics.fmean(losses), statistics.fmean(squares)


def _find_eps(probe: _Probe, here: float, share: float) -> float:
    """Return the distance that changes the loss by a share of it, with two significant digits."""
    eps = _FIRST_EPS
    for _ in range(_MAX_PROBES):
        loss, square = probe.at(eps, _PROBE_DIRECTIONS)
        change = eps * math.sqrt(square) if math.isfinite(square) else math.inf
        if not math.isfinite(change) or not loss < _TOO_FAR * here:
            eps /= 30
        else:
            _check(loss, probe.lowest)
            if share / 3 < change / loss < 3 * share:
                return float(f"{eps * share * loss / change:.2g}")
            eps = eps * 30 if change == 0 else eps * min(30.0, max(1 / 30, share * loss / change))
        eps = min(eps, _LARGEST_EPS)
    return float(f"{eps:.2g}")


def _size_of_nonzero(tuned: TunedTensors) -> float:
    """Return the root mean square of the tuned matrices that are not 0 if some others are; otherwise 0."""
    matrices = [master.detach() for master in tuned.masters if master.dim() > 1]
    nonzero = [master for master in matrices if master.any()]
    if len(nonzero) in (0, len(matrices)):
        return 0.0
    return math.sqrt(sum(float(m.square().sum()) for m in nonzero) / sum(m.numel() for m in nonzero))


def _check(above: float, lowest: float) -> None:
    """Check the loss above its lower bound."""
    if not math.isfinite(above):
        raise SlzoError(
            f"model.eps or model.optimizer.lr auto: the loss is {above} before training; use model.dtype bfloat16 or float32, or "
            "a smaller model.eps, or correct data.objective if it is your own"
        )
    if above > 0:
        return
    if lowest == 0:
        raise SlzoError(
            f"model.eps or model.optimizer.lr auto: the loss is {above:.4g}, and the measurement needs a loss above 0; give "
            "numbers instead of auto"
        )
    raise SlzoError(
        f"model.eps or model.optimizer.lr auto: the loss {above + lowest:.4g} is not above its lower bound {lowest:.4g}, so "
        "nothing is left to learn; raise data.objective.best of a reward, or give numbers instead of auto"
    )
