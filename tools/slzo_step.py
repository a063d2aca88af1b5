"""One training step of slzo without Lightning, its parts and their rates, for comparison only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measuring import Clock, median_seconds, timed
from published_step import EPS, LEARNING_RATE
from slzo.batches.encoded import EncodedExample
from slzo.batches.packing import PackedBatch, pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.private.modules import onednn_linear
from slzo.zo.estimators import SPSA, Estimator
from slzo.zo.objectives import LogitObjective
from slzo.zo.scopes import LayerScope
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned import Point
from slzo.zo.tuned_model import TunedModel

_PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm")
_ATTENTION = "aten::_scaled_dot_product"


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes, on one batch.

    Attributes:
        parts: Seconds of each part, run one by one.
        tokens: Number of tokens.
        product_seconds: Seconds of an evaluation's matrix products, run alone.
        operations: Their floating-point operations.
        shares: Shares of the time, see :func:`shares_of_step`.
    """

    parts: dict[str, float]
    tokens: int
    product_seconds: float
    operations: float
    shares: dict[str, float]


class SlzoStep:
    """The work of ``ZOModule.training_step``, without Lightning."""

    def __init__(
        self,
        parts: ModelParts,
        layer: int,
        objective: LogitObjective,
        estimator: Estimator | None = None,
        **engine: Any,
    ) -> None:
        self.objective = objective
        self.model = TunedModel.from_scope(parts, LayerScope(), layer, engine=Engine(**engine))
        self.parts, self.forward, self.tuned = parts, self.model.forward, self.model.tensors
        estimator = SPSA() if estimator is None else estimator
        self.stepper = Stepper(self.model, objective, estimator, StepOptions(EPS))
        optimizer = torch.optim.SGD if estimator.perturbs == "weights" else torch.optim.AdamW
        self.optimizer = optimizer(self.tuned.masters, lr=LEARNING_RATE)
        self.step = 0

    def pack(self, examples: Sequence[EncodedExample]) -> PackedBatch:
        """Pack rows as the data loader does; generation and choice tasks train on the gold answer only."""
        if self.objective.only_gold:
            examples = [EncodedExample(e.index, (e.sequences[e.gold[0]],), (0,)) for e in examples]
        return pack(examples).to(self.parts.model.device)

    def __call__(self, examples: Sequence[EncodedExample]) -> None:
        """Take one step."""
        self.stepper.step(TrainBatch(self.pack(examples), ()), self.step, self.optimizer)
        self.step += 1

    def head_ids(self, batch: PackedBatch) -> Tensor | None:
        """Return the tokens whose logits are needed; ``None`` for the whole vocabulary."""
        return None if self.objective.needs_vocabulary(batch) else batch.choice_ids

    def breakdown(self, examples: Sequence[EncodedExample], clock: Clock) -> dict[str, float]:
        """Return the seconds of each part of a step, run one by one."""
        spent = dict.fromkeys(("data", "prefix", "perturb", "suffix", "head", "update"), 0.0)

        def run(part: str, function: Callable[[], Any]) -> Any:
            seconds, result = timed(function, clock)
            spent[part] += seconds
            return result

        batch = run("data", lambda: self.pack(examples))
        hidden = run("prefix", lambda: self.forward.prefix(batch))
        direction = run("perturb", lambda: self.tuned.draw(0, self.step, 0))
        losses = []
        for scale in (EPS, -EPS):
            run("perturb", partial(self.tuned.write, Point(direction, scale)))
            final = run("suffix", lambda: self.parts.run(batch, self.forward.span.start, self.parts.num_layers, hidden))
            losses.append(run("head", partial(self._loss, batch, final)))

        def update() -> None:
            gradient: dict[str, Tensor] = {}
            self.tuned.accumulate(gradient, direction, (losses[0] - losses[1]) / (2 * EPS), (EPS, -EPS))
            self.tuned.set_grad(gradient)
            self.optimizer.step()
            self.tuned.zero_grad()
            self.tuned.restore()

        run("update", update)
        return spent

    def _loss(self, batch: PackedBatch, final: Tensor) -> float:
        ids = self.head_ids(batch)
        logits = self.parts.head(final.index_select(0, batch.logit_positions), ids)
        total, weight = self.objective.row_losses(logits, batch, selected=ids is not None).sum()
        return float(total / weight)


def product_seconds(step: SlzoStep, batch: PackedBatch, clock: Clock) -> tuple[float, float]:
    """Return seconds and floating-point operations of one evaluation's matrix products, suffix layers and needed logits.

    A plain loop over the weights in the order of the suffix, with inputs of the same shapes and slzo's kernel.
    """
    parts, dtype = step.parts, step.parts.model.dtype
    suffix = parts.layers[step.forward.span.start :]
    modules = [m for layer in suffix for m in layer.modules() if isinstance(m, nn.Linear)]
    inputs = {m.in_features: torch.randn(batch.num_tokens, m.in_features, dtype=dtype) for m in modules}
    head = parts.model.get_output_embeddings()
    ids = step.head_ids(batch)
    head_weight = head.weight if ids is None else head.weight[: len(ids)]
    head_inputs = torch.randn(batch.logit_positions.numel(), head.in_features, dtype=dtype)
    linear = onednn_linear if parts.onednn else F.linear

    def products() -> None:
        for module in modules:
            linear(inputs[module.in_features], module.weight, None)
        F.linear(head_inputs, head_weight)

    operations = 2.0 * batch.num_tokens * sum(m.weight.numel() for m in modules)
    return median_seconds(products, clock, 3), operations + 2.0 * head_inputs.shape[0] * head_weight.numel()


def attention_product_seconds(step: SlzoStep, batch: PackedBatch, clock: Clock) -> float:
    """Return the seconds of one evaluation's attention products (scores and values), in a plain loop over the suffix layers.

    Full squares are timed. Only their causal part, (L + 1) / 2L, is counted, because no kernel needs fewer operations.
    """
    config = step.parts.model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype, seconds = step.parts.model.dtype, 0.0

    def products(query: Tensor, key: Tensor, value: Tensor) -> None:
        (query @ key.transpose(-1, -2)) @ value

    for group in batch.layout.groups:
        count, length = group.shape
        own = (torch.randn(count, heads, length, size, dtype=dtype) for _ in range(3))
        seconds += median_seconds(partial(products, *own), clock, 3) * (length + 1) / (2 * length)
    return seconds * (step.parts.num_layers - step.forward.span.start)


def shares_of_step(step: SlzoStep, examples: Sequence[EncodedExample], clock: Clock) -> dict[str, float]:
    """Return shares of a step's time from torch's profiler: linear layers and head, fused attention (products and softmax), rest.

    ``outside products`` is the time outside the linear layers and attention's two products, which are timed alone.
    """
    batch = step.pack(examples)
    products = 2 * attention_product_seconds(step, batch, clock)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(examples)
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    whole = sum(spent.values())
    linear = sum(spent.get(name, 0) for name in _PRODUCTS) / whole
    attention = sum(seconds for name, seconds in spent.items() if name.startswith(_ATTENTION)) / whole
    rest = 1 - linear - attention
    return {
        "linear": linear,
        "attention": attention,
        "rest": rest,
        "outside products": rest + max(0.0, attention - products / whole),
    }


def profile_of(step: SlzoStep, examples: Sequence[EncodedExample], clock: Clock) -> Profile:
    """Profile a step on one batch, on a CPU."""
    batch = step.pack(examples)
    parts = step.breakdown(examples, clock)
    return Profile(parts, batch.num_tokens, *product_seconds(step, batch, clock), shares_of_step(step, examples, clock))
