"""Train one layer with several learning rates (and eps) for the same steps from the same weights, and recommend one."""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore, check_results
from slzo.experiments.sweep_cells import complete_cells, sweep_settings
from slzo.report.score_change import MIN_PROGRESS
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import is_worker, rank_zero_print
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from slzo.zo.estimators import Estimator
from slzo.zo.optim import OptimizerOptions
from slzo.zo.trial import Trial


@dataclass(frozen=True)
class RatePlan:
    """Options of a sweep of rates; see :func:`slzo.commands.sweep.sweep` for their meaning.

    If ``lrs`` is ``None``, there are seven, a factor of sqrt(10) apart, around the options' own.
    """

    lrs: Sequence[float] | None
    eps: Sequence[float] | None
    steps: int
    seeds: Sequence[int]

    def check(self, estimator: Estimator, optimizer: OptimizerOptions) -> None:
        """Check the plan.

        Raises:
            SlzoError: An option is out of range, the estimator has no eps, or the scheduler replaces the learning rates.
        """
        if self.eps is not None and estimator.perturbs != "weights":
            raise SlzoError(f"eps {list(self.eps)}: {estimator.describe()} has no eps; leave it out")
        for name, values in (("lrs", self.lrs), ("eps", self.eps)):
            if values is not None and (not values or any(not 0 < value < math.inf for value in values)):
                raise SlzoError(f"{name} {list(values)}: give numbers above 0, like [1e-4, 3e-4, 1e-3]")
        if (self.lrs is None or len(set(self.lrs)) > 1) and not optimizer.follows_rate:
            raise SlzoError(
                f"model.lr_scheduler {optimizer.settings['scheduler']['class']}: sets the rate itself, so all lrs would be the "
                "same; leave it out, or give one rate in lrs"
            )
        check_at_least("steps", self.steps, advice="40 is enough to compare rates")
        if not self.seeds:
            raise SlzoError("seeds []: give at least one seed")

    def values(
        self, own: Callable[[], tuple[float, float | None]]
    ) -> tuple[Collection[float], Collection[float | None]]:
        """Return the learning rates and the sizes of the perturbation, in rising order.

        ``own`` returns those of the options; it is called only if they are needed.
        """
        lr, eps = own() if self.lrs is None or self.eps is None else (0.0, 0.0)
        rates = [lr * 10 ** (power / 2) for power in range(-3, 4)] if self.lrs is None else self.lrs
        return sorted(set(rates)), [eps] if self.eps is None else sorted(set(self.eps))


@dataclass(frozen=True)
class RateResult:
    """Result of one pair of learning rate and eps.

    Attributes:
        lr: Learning rate.
        eps: Size of the perturbation; ``None`` for an estimator without one.
        loss: Dev loss after the trial, mean over seeds; infinite if a trial diverged.
        metric: Dev metric after the trial, mean over seeds.
        diverged: How a trial diverged; empty if none did.
    """

    lr: float
    eps: float | None
    loss: float
    metric: float
    diverged: str


PER_CELL_SETTINGS = {"model.optimizer.lr": None, "model.eps": None}
"""Settings that vary between cells. They are in the names of the cells, so those of the folder leave them out."""


def sweep_rates(trials: LayerTrials, plan: RatePlan, choose_layer: Callable[[], int | None], folder: Path) -> None:
    """Run the trials that are not finished, recommend a pair and write it to ``folder``.

    Raises:
        SlzoError: The folder holds other results.
    """
    settings = sweep_settings(trials) | {"steps": plan.steps}
    check_results(folder, settings | PER_CELL_SETTINGS)  # before the layer is chosen, which may take long
    settings["model.layer"] = layer = choose_layer()
    store = CellStore(folder, settings | PER_CELL_SETTINGS)

    def train(eps: float | None, lr: float, seed: int) -> dict[str, Any]:
        return asdict(trials.run(layer, steps=plan.steps, seed=seed, lr=lr, eps=eps))

    rates, sizes = plan.values(partial(_own_step, trials, store, layer))
    loss = trials.data.selection_metric.loss_name
    cells = product(sizes, rates, dict.fromkeys(plan.seeds))  # smallest eps and learning rate first
    complete_cells(store, {_cell_name(*cell): partial(train, *cell) for cell in cells}, loss)
    if is_worker():
        return
    tried, before = _results(store, rates, sizes, plan.seeds, loss)
    best, words = recommend(tried, before, loss)
    content = {
        "recommendation": None if best is None else {"lr": best.lr, "eps": best.eps},
        "reason": words,
        "settings": settings,
        "tried": [vars(pair) | ({"loss": None, "metric": None} if pair.diverged else {}) for pair in tried],
    }
    write_json(store.folder / "rates.json", content)
    rank_zero_print(f"\n{words}")
    if best is not None:  # the optimizer's other options stay as they are configured
        eps_option = "" if best.eps is None else f"--model.eps {best.eps:.6g} "
        # with a given rate, a rule may choose another layer than with a measured one
        layer_option = "" if layer is None else f"--model.layer {layer} "
        rank_zero_print(f"\nOptions    {layer_option}{eps_option}--model.optimizer.lr {best.lr:.6g}")
    rank_zero_print(f"Files      {store.folder}")


def _own_step(trials: LayerTrials, store: CellStore, layer: int | None) -> tuple[float, float | None]:
    """Return learning rate and eps of the options; they are measured once for all processes on the folder.

    Another machine, or another number of threads, would measure slightly different ones, and train all cells again.
    """
    name = f"own-lr-{trials.options.optimizer.lr}-eps-{trials.options.step.eps}"
    store.complete({name: lambda: dict(zip(("lr", "eps"), trials.own_step(layer), strict=True))})
    found = store.result(name)
    return found["lr"], found["eps"]


def _cell_name(eps: float | None, lr: float, seed: int) -> str:
    return f"lr-{lr}-{'' if eps is None else f'eps-{eps}-'}seed-{seed}"


def _results(
    store: CellStore, rates: Collection[float], sizes: Collection[float | None], seeds: Sequence[int], what: str
) -> tuple[list[RateResult], float]:
    """Print and return the result of each pair, and return the dev loss before training. ``what`` is what the loss is called."""
    found = []
    for eps, lr in product(sizes, rates):
        done = [Trial.from_dict(store.result(_cell_name(eps, lr, seed))) for seed in dict.fromkeys(seeds)]
        diverged = next((trial.diverged for trial in done if trial.diverged), "")
        loss = math.inf if diverged else statistics.fmean(trial.scores[-1].loss for trial in done)
        metric = statistics.fmean(trial.scores[-1].metric for trial in done)
        found.append(RateResult(lr, eps, loss, metric, diverged))
        result = f"diverged: {diverged}" if diverged else f"{what} {loss:.4f}, metric {metric:.4f}"
        rank_zero_print(f"lr {lr:.3g}{'' if eps is None else f', eps {eps:.3g}'}: {result}")
    return found, done[0].scores[0].loss


def recommend(tried: Sequence[RateResult], before: float, what: str) -> tuple[RateResult | None, str]:
    """Return the pair to use, and the reason in words.

    The pair with the lowest dev loss wins. The reason says so if its rate is at an edge of the grid. There is no recommendation
    if no pair improved on ``before``, the dev loss before training, by a share of at least ``MIN_PROGRESS``. ``what`` is what the
    loss is called.
    """
    good = [pair for pair in tried if not pair.diverged]
    if not good:
        lowest = min(pair.lr for pair in tried)
        return None, f"Every rate diverged, down to lr {lowest:.3g}: try smaller ones."
    best = min(good, key=lambda pair: pair.loss)
    if best.loss > before - MIN_PROGRESS * abs(before):
        return None, (
            f"No rate lowered the {what} of {before:.4f} in these steps (best: lr {best.lr:.3g}, {best.loss:.4f}): try other "
            "rates or more steps."
        )
    eps = "" if best.eps is None else f" and eps {best.eps:.3g}"
    words = f"Use lr {best.lr:.3g}{eps}: {what} {before:.4f} -> {best.loss:.4f}."
    rates = sorted({pair.lr for pair in tried})
    if len(rates) > 1 and best.lr == rates[-1]:
        words += " It is the largest rate of the grid: larger ones may be better still."
    elif len(rates) > 1 and best.lr == rates[0]:
        words += " It is the smallest rate of the grid: smaller ones may be better still."
    diverged = [pair.lr for pair in tried if pair.eps == best.eps and pair.diverged]
    if diverged:
        words += f" From lr {min(diverged):.3g} on training diverges."
    return best, words
