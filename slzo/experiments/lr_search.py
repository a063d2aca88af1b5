"""Tries learning rates (and eps) for a few steps each, from the same weights with the same rows and directions."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.store import CellStore
from slzo.experiments.trial import Trial, Workbench, default_folder, experiment_settings

# A change of the dev loss below this share of it is no progress.
_MIN_PROGRESS = 0.005


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Attributes:
        lrs: Learning rates, rising.
        eps: Sizes of the perturbation, rising.
        steps: Steps of each trial.
        seeds: Each pair is tried with each of them.
    """

    lrs: tuple[float, ...]
    eps: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Tried:
    """One pair of settings and what came of it.

    Attributes:
        lr: Learning rate.
        eps: Size of the perturbation.
        loss: Dev loss after the trial, mean over seeds; infinite if a trial diverged.
        metric: Dev metric after it.
        diverged: How it diverged, or empty.
    """

    lr: float
    eps: float
    loss: float
    metric: float
    diverged: str


def lr_search(
    bench: Workbench,
    find_layer: Callable[[], int],
    *,
    lrs: Sequence[float] | None,
    eps: Sequence[float] | None,
    steps: int,
    seeds: Sequence[int] | None,
    output: str | None,
) -> None:
    """Do what is not done yet, recommend a pair and write it; arguments as :meth:`slzo.trainer.ZOTrainer.lr_search`.

    Raises:
        SlzoError: An option is out of range, or the folder holds other results.
    """
    module = bench.module
    seeds = [module.noise_seed or 0] if seeds is None else seeds
    grid = make_grid(lrs, eps, steps, seeds, module.optimizer_choice.lr, module.step_options.eps)
    layer = module.layer
    if module.scope.needs_layer and layer is None:
        layer = find_layer()
    settings = experiment_settings(module, bench.datamodule) | {"steps": steps, "layer": layer}
    store = CellStore(output or default_folder("lr_searches", bench), settings)
    tried = search(bench, store, grid, layer)
    best, words = recommend(tried, loss_before(store, grid))
    write_search(store.folder, tried, best, words, settings)
    say(f"\n{words}")
    if best is not None:
        say(f"\nOptions    {as_options(best)}")
    say(f"Files      {store.folder}")


def make_grid(
    lrs: Sequence[float] | None,
    eps: Sequence[float] | None,
    steps: int,
    seeds: Sequence[int],
    lr: float,
    own_eps: float,
) -> Grid:
    """Check the options; without rates, powers of the square root of ten around the configured one.

    Args:
        lrs: Learning rates to try.
        eps: Sizes of the perturbation to try; ``None`` for the configured one.
        steps: Steps of each trial.
        seeds: Seeds.
        lr: The configured learning rate.
        own_eps: The configured size.

    Raises:
        SlzoError: One is out of range.
    """
    rates = [lr * 10 ** (power / 2) for power in range(-3, 4)] if lrs is None else lrs
    sizes = [own_eps] if eps is None else eps
    for name, values in (("lrs", rates), ("eps", sizes)):
        if not values or any(not 0 < value < math.inf for value in values):
            raise SlzoError(f"{name} {list(values)}: give numbers above 0, like [1e-4, 3e-4, 1e-3]")
    if steps < 1:
        raise SlzoError(f"steps {steps}: must be at least 1; 40 tells rates apart")
    if not seeds:
        raise SlzoError("seeds []: give at least one seed")
    return Grid(tuple(sorted(set(rates))), tuple(sorted(set(sizes))), steps, tuple(dict.fromkeys(seeds)))


def search(bench: Workbench, store: CellStore, grid: Grid, layer: int | None) -> list[Tried]:
    """Run the trials that are not finished, the most careful first; returns all."""
    found = []
    for eps in grid.eps:
        for lr in grid.lrs:
            trials = [_trial(bench, store, grid, layer, lr, eps, seed) for seed in grid.seeds]
            found.append(_summary(lr, eps, trials))
            say(_line(found[-1]))
    return found


def loss_before(store: CellStore, grid: Grid) -> float:
    """Dev loss before training; every trial has it."""
    return Trial.from_dict(store.result(_name(grid.lrs[0], grid.eps[0], grid.seeds[0]))).scores[0].loss


def _name(lr: float, eps: float, seed: int) -> str:
    return f"lr-{lr:.4g}-eps-{eps:.4g}-seed-{seed}"


def _trial(
    bench: Workbench, store: CellStore, grid: Grid, layer: int | None, lr: float, eps: float, seed: int
) -> Trial:
    name = _name(lr, eps, seed)
    known = store.result(name)
    if known is not None:
        return Trial.from_dict(known)
    trial = bench.trial(layer, steps=grid.steps, seed=seed, lr=lr, eps=eps)
    store.save(name, trial.to_dict())
    return trial


def _summary(lr: float, eps: float, trials: Sequence[Trial]) -> Tried:
    diverged = next((trial.diverged for trial in trials if trial.diverged), "")
    losses = [trial.scores[-1].loss for trial in trials]
    metrics = [trial.scores[-1].metric for trial in trials]
    return Tried(lr, eps, math.inf if diverged else statistics.fmean(losses), statistics.fmean(metrics), diverged)


def _line(tried: Tried) -> str:
    result = (
        f"diverged: {tried.diverged}" if tried.diverged else f"dev loss {tried.loss:.4f}, metric {tried.metric:.4f}"
    )
    return f"lr {tried.lr:.3g}, eps {tried.eps:.3g}: {result}"


def recommend(tried: Sequence[Tried], before: float) -> tuple[Tried | None, str]:
    """The pair to use, and why, in words.

    The lowest dev loss wins. A rate that wins at the edge of the grid says that the grid should reach further; if nothing
    made progress there is no recommendation.

    Args:
        tried: All pairs.
        before: Dev loss before training.
    """
    good = [pair for pair in tried if not pair.diverged]
    if not good:
        lowest = min(pair.lr for pair in tried)
        return None, f"Every rate diverged, down to lr {lowest:.3g}: try smaller ones."
    best = min(good, key=lambda pair: pair.loss)
    if best.loss > (1 - _MIN_PROGRESS) * before:
        return None, (
            f"No rate lowered the dev loss of {before:.4f} in these steps (best: lr {best.lr:.3g}, {best.loss:.4f}): try other "
            "rates or more steps."
        )
    words = f"Use lr {best.lr:.3g} and eps {best.eps:.3g}: dev loss {before:.4f} -> {best.loss:.4f}."
    rates = sorted({pair.lr for pair in tried})
    same_eps = [pair for pair in tried if pair.eps == best.eps]
    if len(rates) > 1 and best.lr == rates[-1]:
        words += " It is the largest rate of the grid: larger ones may be better still."
    elif len(rates) > 1 and best.lr == rates[0]:
        words += " It is the smallest rate of the grid: smaller ones may be better still."
    diverged = [pair.lr for pair in same_eps if pair.diverged]
    if diverged:
        words += f" From lr {min(diverged):.3g} on training diverges."
    return best, words


def write_search(
    folder: Path, tried: Sequence[Tried], best: Tried | None, words: str, settings: dict[str, Any]
) -> None:
    """Write lr_search.json."""
    pairs = [{**vars(pair), "loss": None if pair.diverged else pair.loss} for pair in tried]
    chosen = None if best is None else {"lr": best.lr, "eps": best.eps}
    content = {"recommendation": chosen, "why": words, "settings": settings, "tried": pairs}
    (folder / "lr_search.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def as_options(best: Tried) -> str:
    """The recommendation as options of the command line; the optimizer's others stay as they are configured."""
    return f"--model.eps {best.eps:.6g} --model.optimizer.lr {best.lr:.6g}"
