"""Compare the time of one training step: published MeZO, MeZO on one layer, two forward passes, and slzo.

    python tools/benchmark_step.py --task sst2 --data_dir DIR --dtype float32 --threads 1 --json FILE
    python tools/benchmark_step.py --device cuda --dtype bfloat16                # on a GPU: seconds and peaks only

All variants get the same random batches of real rows, in alternation, in one process. ``mezo`` and ``mezo-layer`` are those of
``published_step.py``:

* mezo: every candidate is a separate sequence, left-padded to a multiple of 8; log-softmax over the whole vocabulary at all
  positions; three perturbation passes and one update pass over all parameters, each of which draws z again.
* mezo-layer: the same, but only one layer is perturbed and updated, as in the Dominant-Layer paper.
* forward2: two plain forward passes on one sequence per example; ``forward2-onednn`` runs their linear layers through oneDNN.
* spsa: the step of ``SPSA`` with a warm prefix cache; ``spsa-cold`` is the same without a cache.
* default: the step of ``LayerOutputPerturbation`` and AdamW in the layer that the default rule chooses, with a warm prefix cache.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measuring import Clock, clock_of, in_new_process, median_seconds, prepare_process, timed
from options import option, parse
from published_step import EPS, LEARNING_RATE, encoded_rows, pad_left, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.batches.packing import PackedBatch, pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.linear import with_onednn
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.models.startup_check import split_and_verify
from slzo.private.modules import onednn_linear
from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from slzo.utils.runtime import peak_memory_gb
from slzo.zo.estimators import SPSA, Estimator, LayerOutputPerturbation
from slzo.zo.objectives import LOSS_OBJECTIVES, LogitObjective
from slzo.zo.scopes import LayerScope
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel

_PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm")
_ATTENTION = "aten::_scaled_dot_product"


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    task: str = option("movie_reviews", "task name")
    data_dir: str | None = option(None, "folder with the task's rows (see data.data_dir)")
    model: str = option("smollm2-135m", "built-in name, folder, .gguf file or Hub id")
    layer: int = option(11, "tuned layer")
    threads: int = option(1, "torch threads")
    batch_size: int = option(16, "rows per step")
    batches: int = option(7, "random batches, each timed once with each variant")
    seed: int = option(0, "seed of the batches")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights")
    device: Literal["cpu", "cuda"] = option("cpu", "device of the model")
    default_layer: int = option(28, "tuned layer of default")
    cpu_time: bool = option(False, "CPU time instead of time; for one thread next to other jobs")
    ablations: bool = option(False, "also time slzo with each optimization changed")
    no_memory: bool = option(False, "do not measure peak memory")
    json: Path | None = option(None, "write the figures to this file")


# ---- the step of the package --------------------------------------------------------------------------------------------


class SlzoStep:
    """The work of ``ZOModule.training_step``, without Lightning."""

    def __init__(
        self,
        parts: ModelParts,
        layer: int,
        objective: LogitObjective,
        share_prompts: bool = True,
        estimator: Estimator | None = None,
        **engine: Any,
    ) -> None:
        self.objective = objective
        self.share_prompts = share_prompts
        self.model = TunedModel.from_scope(parts, LayerScope(), layer, engine=Engine(**engine))
        self.parts, self.forward, self.tuned = parts, self.model.forward, self.model.tensors
        estimator = SPSA() if estimator is None else estimator
        self.stepper = Stepper(self.model, objective, estimator, StepOptions(EPS))
        optimizer = torch.optim.SGD if estimator.along_directions else torch.optim.AdamW
        self.optimizer = optimizer(self.tuned.masters, lr=LEARNING_RATE)
        self.step = 0

    def pack(self, examples: Sequence[EncodedExample]) -> PackedBatch:
        """Pack rows as the data loader does; generation and choice tasks train on the gold answer only."""
        if self.objective.only_gold:
            examples = [EncodedExample(e.index, (e.sequences[e.gold[0]],), (0,)) for e in examples]
        return pack(examples, share_prompts=self.share_prompts).to(self.parts.model.device)

    def __call__(self, examples: Sequence[EncodedExample]) -> tuple[float, float]:
        """Take one step; return both losses of ``SPSA``, or the loss twice."""
        estimate = self.stepper.step(TrainBatch(self.pack(examples), ()), self.step, self.optimizer).estimate
        self.step += 1
        return estimate.loss_plus, estimate.loss_minus

    def head_ids(self, batch: PackedBatch) -> Tensor | None:
        """Return the tokens whose logits are needed; ``None`` for the whole vocabulary."""
        return batch.choice_ids if self.forward.selects(self.objective, batch) else None

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
            run("perturb", partial(self.tuned.write, direction, scale))
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
        logits = self.parts.head(final.index_select(0, batch.needed), ids)
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
    head_inputs = torch.randn(batch.needed.numel(), head.in_features, dtype=dtype)
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


# ---- the comparison -----------------------------------------------------------------------------------------------------


@dataclass
class Timings:
    """Seconds of each variant and step, and of the parts of slzo's step."""

    clock: Clock
    seconds: dict[str, list[float]] = field(default_factory=dict)
    parts: list[dict[str, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    operations: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def add(self, variant: str, function: Callable[[], Any]) -> Any:
        """Add the time of one step."""

        def run() -> Any:
            result = function()
            wait_for_device()
            return result

        wait_for_device()
        seconds, result = timed(run, self.clock)
        self.seconds.setdefault(variant, []).append(seconds)
        return result


def wait_for_device() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def loaded(options: Options) -> Any:
    """Load the model on its device."""
    model: Any = load_model(options.model, options.dtype)
    return model.to(options.device)


def load_rows(options: Options) -> tuple[list[EncodedExample], LogitObjective]:
    """Return tokenized training rows of the task, and the loss that the task is trained with."""
    rows = encoded_rows(options.model, options.task, options.data_dir, 1000)
    return rows, LOSS_OBJECTIVES[get_task(options.task).kind]()


def draw_batches(rows: list[EncodedExample], options: Options) -> list[list[EncodedExample]]:
    """Return random batches without replacement."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    count = min(options.batches, len(order) // options.batch_size)
    return [[rows[i] for i in order[b * options.batch_size : (b + 1) * options.batch_size]] for b in range(count)]


SWITCHES: dict[str, dict[str, Any]] = {
    "without shared prompts": {"share_prompts": False},
    "without candidate rows": {"candidate_logits": False},
    "paired always": {"paired": True},
    "paired never": {"paired": False},
    "without oneDNN": {"onednn": False},
    "without packing": {"packed": False},
}


def compare(options: Options) -> Timings:
    """Run all variants in alternation."""
    rows, objective = load_rows(options)
    batches = draw_batches(rows, options)
    plain = loaded(options)
    unmap(plain)
    parts = split_and_verify(loaded(options))
    warm = SlzoStep(parts, options.layer, objective, cache_gb=8.0)
    cold = SlzoStep(parts, options.layer, objective, cache_gb=0.0)
    default = SlzoStep(parts, options.default_layer, objective, estimator=LayerOutputPerturbation(), cache_gb=8.0)
    switched = {}
    for name, switch in (SWITCHES if options.ablations else {}).items():
        of_parts = {each: value for each, value in switch.items() if each in ("packed", "onednn")}
        own = split_and_verify(loaded(options), **of_parts) if of_parts else parts
        switched[name] = SlzoStep(own, options.layer, objective, cache_gb=8.0, **switch)
    timings = Timings(clock_of(options.cpu_time))
    for number, examples in enumerate(batches):
        for step in (warm, default, *switched.values()):
            step.forward.prefix(step.pack(examples))
        run_published(options, plain, parts.layers_path, examples, objective.only_gold, number, timings)
        for name, step in {"spsa": warm, "spsa-cold": cold, "default": default, **switched}.items():
            timings.add(name, partial(step, examples))
        if options.device != "cpu":  # the rest is measured on a CPU only
            continue
        timings.parts.append(warm.breakdown(examples, timings.clock))
        batch = warm.pack(examples)
        timings.tokens.append(batch.num_tokens)
        seconds, operations = product_seconds(warm, batch, timings.clock)
        timings.product.append(seconds)
        timings.operations.append(operations)
        timings.shares.append(shares_of_step(warm, examples, timings.clock))
        print(
            f"batch {number + 1} of {len(batches)}: "
            + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in timings.seconds.items())
        )
    return timings


def run_published(
    options: Options,
    plain: nn.Module,
    layers_path: str,
    examples: list[EncodedExample],
    only_gold: bool,
    number: int,
    timings: Timings,
) -> None:
    """Time the chosen variants that do not use slzo."""
    everything = list(plain.parameters())
    of_layer = list(plain.get_submodule(f"{layers_path}.{options.layer}").parameters())
    padded = pad_left(examples, only_gold).to(options.device)
    single = pad_left(examples, only_gold=True).to(options.device)

    def forward_twice(model: nn.Module) -> None:
        for _ in range(2):
            model(input_ids=single.input_ids, attention_mask=single.attention_mask)

    steps: dict[str, Callable[[], Any]] = {
        "mezo": lambda: published_step(plain, everything, padded, only_gold, number),
        "mezo-layer": lambda: published_step(plain, of_layer, padded, only_gold, number),
        "forward2": lambda: forward_twice(plain),
    }
    if options.dtype == "float32":
        steps["forward2-onednn"] = lambda: forward_twice(with_onednn(plain))
    for name, step in steps.items():
        timings.add(name, step)


@torch.no_grad()
def memory_of(options: Options, what: str) -> float:
    """Return the peak memory in GiB after plain inference, or after slzo steps on the same batch; run it in a new process."""
    prepare_process(options.threads)
    rows, objective = load_rows(options)
    examples = draw_batches(rows, options)[0]
    model = loaded(options)
    if what == "inference":
        batch = pad_left([EncodedExample(e.index, (e.sequences[0],), (0,)) for e in examples], only_gold=True)
        batch = batch.to(options.device)
        for _ in range(3):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    else:
        step = SlzoStep(split_and_verify(model), options.layer, objective, cache_gb=1.0)
        for _ in range(3):
            step(examples)
    return peak_memory_gb(torch.device(options.device))


def report_of_parts(timings: Timings) -> dict[str, Any]:
    """Print the parts of a step on a CPU; return them for the JSON file."""
    parts = {part: statistics.fmean(p[part] for p in timings.parts) for part in timings.parts[0]}
    whole = sum(parts.values())
    print("slzo step: " + ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in parts.items()))
    suffix = sum(p["suffix"] + p["head"] for p in timings.parts)
    rate = 2 * sum(timings.operations) / suffix / 1e9
    print(
        f"suffix and head: {rate:.0f} GFLOP/s of their matrix products, {statistics.fmean(timings.tokens):.0f} tokens per batch"
    )
    alone = sum(timings.operations) / sum(timings.product) / 1e9
    print(f"the products alone: {alone:.0f} GFLOP/s; suffix and head reach {rate / alone:.0%} of it")
    shares = {name: statistics.fmean(share[name] for share in timings.shares) for name in timings.shares[0]}
    print("shares of a step, by the profiler: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return {
        "breakdown_s": parts,
        "tokens": timings.tokens,
        "suffix_gflops": rate,
        "product_gflops": alone,
        "shares": shares,
    }


def report(options: Options, timings: Timings, memory: dict[str, float]) -> dict[str, Any]:
    """Print the tables; return the content of the JSON file."""
    median = {name: statistics.median(values) for name, values in timings.seconds.items()}
    mean = {name: statistics.fmean(values) for name, values in timings.seconds.items()}
    where = f"batch {options.batch_size}, layer {options.layer}, {options.model}"
    print(f"\n{options.task}, {options.dtype}, {options.threads} thread(s), {where}")
    print(f"{'variant':24s} {'median s':>9s} {'mean s':>9s} {'min s':>8s} {'max s':>8s} {'x spsa (median, mean)':>22s}")
    for name, values in timings.seconds.items():
        ratios = f"{median[name] / median['spsa']:10.2f} {mean[name] / mean['spsa']:10.2f}"
        print(f"{name:24s} {median[name]:9.3f} {mean[name]:9.3f} {min(values):8.3f} {max(values):8.3f} {ratios:>22s}")
    of_parts = report_of_parts(timings) if timings.parts else {}
    for name, peak in memory.items():
        print(f"peak memory {name}: {peak:.3f} GiB")
    if memory:
        print(f"peak memory of slzo over inference: {memory['slzo'] / memory['inference']:.2f}")
    variants = {
        name: {"median_s": median[name], "mean_s": mean[name], "seconds": values}
        for name, values in timings.seconds.items()
    }
    names = ("task", "dtype", "threads", "model", "layer", "default_layer", "batch_size", "device")
    return {
        **{name: getattr(options, name) for name in names},
        "torch": torch.__version__,
        "variants": variants,
        "ratios": {f"{name}/spsa": median[name] / median["spsa"] for name in median},
        **of_parts,
        "memory_gib": memory,
    }


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return 2 after a user error."""
    options = parse(Options, __doc__, argv)
    prepare_process(options.threads)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SlzoError("--device cuda: torch finds no GPU; leave it out")
        load_rows(options)  # before long work
        kinds = () if options.no_memory else ("inference", "slzo")
        memory = {what: in_new_process(memory_of, options, what) for what in kinds}
        result = report(options, compare(options), memory)
    except SlzoError as error:
        print(f"benchmark_step: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
