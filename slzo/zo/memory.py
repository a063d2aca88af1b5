"""What a run takes in memory, estimated before its model is loaded: arithmetic only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from slzo.models.quantization import Quantization
from slzo.models.shape import ModelShape
from slzo.zo.estimators import Estimator
from slzo.zo.optim import OptimizerChoice
from slzo.zo.tuned import TunedTensors

# Python, torch, transformers and Lightning on a CPU, measured: 400 MiB after the imports, about 500 with rows and a run.
PROGRAM_BYTES = 512 * 2**20
# Live tensors of a layer's width per token at the widest place: gate, its activation, up, their product; and those of the
# hidden width: what enters and leaves, the normed states, queries, keys and values, gathered and not.
_INNER_COPIES, _HIDDEN_COPIES = 4, 8
# float32 copies of the largest tuned tensor while it is found out what rounding left of a direction
_ROUNDING_COPIES = 3
# float32 logits, their exponentials, and what they were before
_LOGIT_COPIES = 3


@dataclass(frozen=True)
class Workload:
    """What goes through the model at once.

    Attributes:
        tokens: Of the largest forward pass.
        vocabulary_rows: Positions of it whose whole-vocabulary logits are computed.
        cached_tokens: Tokens whose states the cache would hold with room for all.
        prompt_tokens: Tokens of prompts to generate from, whose keys and values below the tuned layers it would hold too.
        answer_tokens: Tokens of the prompts and answers that are generated together.
    """

    tokens: int
    vocabulary_rows: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what takes them.

    Attributes:
        parts: Of a running training, the frozen weights among them.
        loading: Most while the model is loaded.
        mapped: Of ``parts``, weights that stay in their files: the system reads them again if it takes their pages away.
    """

    parts: Mapping[str, int]
    loading: int
    mapped: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.loading, sum(self.parts.values()))

    @property
    def needed(self) -> int:
        """What must be there: the peak without what stays in files."""
        return sum(self.parts.values()) - self.mapped


@dataclass(frozen=True)
class MemoryInputs:
    """What a plan is made of.

    Attributes:
        shape: The model.
        dtype: Of its weights.
        quantization: Of its frozen layers.
        tuned: Bytes of tuning, by what takes them; see :func:`tuning_bytes`.
        full_layers: Layers that are tuned.
        start: First of them.
        workload: Tokens.
        cache_bytes: Budget of the prefix cache.
        cache_dtype: Type of the states in it.
        on_cpu: Whether program, weights and cache share one memory.
        away: Frozen layers that ``model.device_map`` has put elsewhere; one at a time is here, where it runs here.
        where: Where the layers are, in words; empty if all are here.
    """

    shape: ModelShape
    dtype: torch.dtype
    quantization: Quantization | None
    tuned: Mapping[str, int]
    full_layers: int
    start: int
    workload: Workload
    cache_bytes: int
    cache_dtype: torch.dtype | None = None
    on_cpu: bool = True
    away: int = 0
    where: str = ""

    @property
    def beside_weights(self) -> int:
        """Bytes of everything but the weights."""
        return sum(size for name, size in self.plan().parts.items() if name != "weights")

    def plan(self) -> MemoryPlan:
        """The estimate."""
        shape, work = self.shape, self.workload
        weights = shape.weight_bytes(self.dtype, self.quantization, self.full_layers)
        same = shape.stored_dtype == self.dtype and shape.stored_method is None
        stored = shape.stored_bytes or 0
        layer = (shape.linear + shape.layer_rest) * self.dtype.itemsize
        elsewhere = layer * max(0, self.away - 1)
        weights -= elsewhere
        mapped = weights if same and self.quantization is None and self.on_cpu else 0
        parts = {"program": PROGRAM_BYTES if self.on_cpu else 0, "weights": weights, **self.tuned}
        if self.start > 0 and self.on_cpu:
            size = (self.cache_dtype or self.dtype).itemsize
            parts["prefix cache"] = min(self.cache_bytes, work.cached_tokens * shape.hidden * size)
            wide = shape.hidden + self.start * shape.key_values
            parts["kept prompts"] = min(self.cache_bytes - parts["prefix cache"], work.prompt_tokens * wide * size)
        answers = work.answer_tokens * shape.num_layers * shape.key_values * self.dtype.itemsize
        parts["keys and values of answers"] = answers
        width = _INNER_COPIES * shape.inner + _HIDDEN_COPIES * shape.hidden
        parts["activations"] = work.tokens * width * self.dtype.itemsize
        parts["logits"] = work.vocabulary_rows * shape.vocabulary * 4 * _LOGIT_COPIES
        loading = 0
        if self.on_cpu and not (same and self.quantization is None):  # the files are read beside what is made of them
            whole = shape.weight_bytes(self.dtype, self.quantization)
            # the files of layers on disk are not read then
            loading = PROGRAM_BYTES + (stored + whole) * (whole - elsewhere) // whole
        return MemoryPlan({name: int(size) for name, size in parts.items() if size > 0}, loading, mapped)

    def alternatives(self) -> Iterator[tuple[str, "MemoryPlan"]]:
        """Options that take less memory, each with its plan."""
        if self.dtype == torch.float32:
            yield "model.dtype bfloat16", replace(self, dtype=torch.bfloat16).plan()
        if self.quantization is None and self.shape.stored_method is None:
            yield "model.quantization int8", replace(self, quantization="int8").plan()
            yield "model.quantization nf4", replace(self, quantization="nf4").plan()
        most = self.shape.num_layers - self.full_layers
        if self.quantization is None and self.away < most:
            yield "model.device_map auto", replace(self, away=most).plan()
        if self.cache_bytes:
            yield "model.engine.cache_gb 0", replace(self, cache_bytes=0).plan()
        half = replace(
            self.workload, tokens=self.workload.tokens // 2, vocabulary_rows=self.workload.vocabulary_rows // 2
        )
        yield f"data.tokens_per_pass {half.tokens}", replace(self, workload=half).plan()


def tuning_bytes(
    tensors: TunedTensors, estimator: Estimator, num_queries: int, queries_at_once: int, optimizer: OptimizerChoice
) -> dict[str, int]:
    """What tuning takes beside the model, by what takes it."""
    masters = 4 * tensors.num_elements
    named = tensors.named_masters()
    moved = 4 * sum(named[name].numel() for name in tensors.names_of_step(0, 0))
    at_once = estimator.directions_at_once(num_queries, queries_at_once)
    # the first direction becomes the gradient; later queries are drawn beside it
    # of a rounded direction what was applied is the gradient, and the direction stays beside it
    rounded = any(tensor.live.dtype != torch.float32 for _, tensor in tensors.items())
    held = moved * (at_once + (num_queries > at_once or rounded)) if moved <= tensors.hold_bytes else moved
    largest = max(master.numel() for master in tensors.masters)
    return {
        "masters": masters,
        "directions and gradient": held,
        "base weights, bases and masks": sum(b.numel() * b.element_size() for b in tensors.buffers()),
        f"{optimizer.name} state": int(masters * optimizer.state_copies),
        "rounding": _ROUNDING_COPIES * 4 * largest if rounded else 0,
    }
