"""Arithmetic of a memory plan: sizes in, bytes by purpose out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from slzo.models.quantization import Quantization
from slzo.models.shape import ModelShape
from slzo.zo.forward import MOST_FLOAT32
from slzo.zo.optim import OptimizerOptions
from slzo.zo.tuned import TunedTensors

# Python, torch, transformers and Lightning on a CPU: 400 MiB were measured after the imports, about 500 MiB during a run.
PROGRAM_BYTES = 512 * 2**20
# A fast tokenizer, per token of the vocabulary: 900 bytes (Qwen2.5), 1,090 (SmolLM2) and 1,280 (Gemma 3) were measured.
TOKENIZER_BYTES = 1200
# Live tensors per token where a layer takes most memory. With the MLP's width: gate, its activation, up, and their product. With
# the hidden width: input, output, normalized states, queries, keys and values, each before and after they are gathered.
_INNER_COPIES, _HIDDEN_COPIES = 4, 8
# Tensors per token of a layer that autograd keeps, besides keys and values. With the MLP's width: gate, its activation, and up.
# With the hidden width: states and normalized states, queries and attention output. Measured: 30 kB a token with SmolLM2, 75 kB
# with Qwen2.5-Coder-0.5B and 53 kB with Gemma 3, which has more norms; this gives 33, 80 and 42 kB.
_KEPT_INNER, _KEPT_HIDDEN = 3, 6
# float32 copies of the largest tuned tensor that TunedTensor.applied takes
_ROUNDING_COPIES = 3
# float32 logits, their exponentials, and the logits before they were converted
_LOGIT_COPIES = 3
# float32 states of a position that finding and measuring the directions of 8 tokens takes, see head_directions.py
_DIRECTION_COPIES = 40


@dataclass(frozen=True)
class Workload:
    """Numbers of tokens that a run processes at once or keeps.

    Attributes:
        tokens: Number of tokens in the largest forward pass.
        vocabulary_rows: Number of positions in that pass whose logits are computed for the whole vocabulary.
        cached_tokens: Number of tokens whose states the prefix cache would hold with enough room.
        prompt_tokens: Number of prompt tokens for which the cache would also hold keys and values below the tuned layers.
        answer_tokens: Number of tokens in the prompts and answers that are generated together.
        train_tokens: Number of tokens in the largest forward pass of training.
    """

    tokens: int
    vocabulary_rows: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    train_tokens: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Memory use in bytes, by purpose.

    Attributes:
        parts: Memory use during training by purpose, frozen weights included.
        loading: Peak while the model is loaded.
        mapped: The share of ``parts`` that are memory-mapped weights. The system may drop these pages and read them again.
    """

    parts: Mapping[str, int]
    loading: int
    mapped: int

    @property
    def total(self) -> int:
        """Peak memory use."""
        return max(self.loading, sum(self.parts.values()))

    @property
    def needed(self) -> int:
        """Memory that must be available: the use during training without memory-mapped weights."""
        return sum(self.parts.values()) - self.mapped


@dataclass(frozen=True)
class MemoryInputs:
    """Inputs of a memory plan.

    Attributes:
        shape: Sizes of the model.
        dtype: Type of its weights.
        quantization: Quantization of its frozen layers.
        tuned: Bytes that tuning takes, by purpose, see :func:`tuning_bytes`.
        full_layers: Number of tuned layers.
        start: The first tuned layer.
        workload: Numbers of tokens.
        cache_bytes: Budget of the prefix cache.
        on_cpu: Whether program, weights and cache share one memory.
        away: Number of frozen layers that ``model.device_map`` puts elsewhere. One of them at a time takes memory here.
        where: Where the layers are, in words; empty if all are here.
        num_shards: Number of processes that divide every layer; the weights of up to two layers are whole at a time.
        differentiated: Number of layers whose activations are kept for a backward pass.
        records: Whether the keys and values of the layers above the tuned one are kept during a step.
        num_processes: Number of processes of the run.
    """

    shape: ModelShape
    dtype: torch.dtype
    quantization: Quantization | None
    tuned: Mapping[str, int]
    full_layers: int
    start: int
    workload: Workload
    cache_bytes: int
    on_cpu: bool = True
    away: int = 0
    where: str = ""
    num_shards: int = 1
    differentiated: int = 0
    records: bool = False
    num_processes: int = 1

    @property
    def non_weight_bytes(self) -> int:
        """Bytes of everything except the weights."""
        return sum(size for name, size in self.plan().parts.items() if name != "weights")

    def plan(self) -> MemoryPlan:
        """Return the estimate."""
        shape = self.shape
        work = self.workload
        weights = shape.weight_bytes(self.dtype, self.quantization, self.full_layers)
        same = shape.stored_dtype == self.dtype and shape.stored_method is None
        stored = shape.stored_bytes or 0
        layer = (shape.linear + shape.layer_rest) * self.dtype.itemsize
        elsewhere = layer * max(0, self.away - 1)
        if self.num_shards > 1:
            frozen = shape.num_layers - self.full_layers
            # while a layer is gathered, its weights are there twice, as received and as tensors; and another one is still whole
            elsewhere = max(0, layer * (frozen - 3) - layer * shape.num_layers // self.num_shards)
        weights -= elsewhere
        mapped = weights if same and self.quantization is None and self.on_cpu else 0
        if self.num_shards > 1:
            mapped = min(mapped, shape.outside * self.dtype.itemsize)  # shares are copies
        program = PROGRAM_BYTES + TOKENIZER_BYTES * shape.vocabulary if self.on_cpu else 0
        parts = {"program": program, "weights": weights, **self.tuned}
        if self.num_processes > 1:
            # DistributedDataParallel allocates them for the masters, although slzo exchanges gradients itself
            parts["gradient buckets"] = self.tuned["masters"]
        if self.start > 0 and self.on_cpu:
            size = self.dtype.itemsize
            parts["prefix cache"] = min(self.cache_bytes, work.cached_tokens * shape.hidden * size)
            wide = shape.hidden + self.start * shape.key_values
            parts["kept prompts"] = min(self.cache_bytes - parts["prefix cache"], work.prompt_tokens * wide * size)
        width = _INNER_COPIES * shape.inner + _HIDDEN_COPIES * shape.hidden
        parts["activations"] = work.tokens * width * self.dtype.itemsize
        kept = _KEPT_INNER * shape.inner + _KEPT_HIDDEN * shape.hidden + shape.key_values
        of_step = {
            "activations for the derivative": work.train_tokens * self.differentiated * kept * self.dtype.itemsize
        }
        if self.records:
            above = shape.num_layers - self.start - 1
            whole = self.quantization is None and shape.stored_method is None and self.num_shards == 1 and not self.away
            if whole and self.dtype.itemsize == 2 and above <= MOST_FLOAT32:
                parts["float32 layers above"] = above * (shape.linear + shape.layer_rest) * 4
            of_step["keys and values above"] = work.train_tokens * above * shape.key_values * self.dtype.itemsize
            of_step["directions of tokens"] = work.vocabulary_rows * shape.hidden * 4 * _DIRECTION_COPIES
        # answers are generated before a derivative is computed, or between steps
        answers = work.answer_tokens * shape.num_layers * shape.key_values * self.dtype.itemsize
        parts |= of_step if sum(of_step.values()) > answers else {"keys and values of answers": answers}
        parts["logits"] = work.vocabulary_rows * shape.vocabulary * 4 * _LOGIT_COPIES
        loading = 0
        if self.on_cpu and self.num_shards > 1:
            # mapped files are copied layer by layer; otherwise the whole model is converted first
            copied = weights - mapped if mapped else shape.weight_bytes(self.dtype, self.quantization)
            loading = program + stored + copied
        elif self.on_cpu and not (same and self.quantization is None):
            # stored and converted weights are in memory together, except for layers that stay on disk
            converted = shape.weight_bytes(self.dtype, self.quantization)
            loading = program + (stored + converted) * (converted - elsewhere) // converted
        return MemoryPlan({name: int(size) for name, size in parts.items() if size > 0}, loading, mapped)

    def alternatives(self) -> Iterator[tuple[str, "MemoryPlan"]]:
        """Iterate over options that take less memory, each with its plan."""
        if self.dtype == torch.float32:
            yield "model.dtype bfloat16", replace(self, dtype=torch.bfloat16).plan()
        placed = bool(self.where)  # a device map is set, and quantization cannot be combined with it
        if not placed and self.quantization is None and self.shape.stored_method is None:
            # float32 weights that are mapped take less memory than quantized ones
            if self.dtype != torch.float32 or not self.plan().mapped:
                yield "model.quantization int8", replace(self, quantization="int8").plan()
                yield "model.quantization nf4", replace(self, quantization="nf4").plan()
            if self.num_processes == 1:
                most = self.shape.num_layers - self.full_layers
                yield 'model.device_map \'{"": "disk"}\'', replace(self, away=most).plan()
        if self.cache_bytes:
            yield "model.engine.cache_gb 0", replace(self, cache_bytes=0).plan()
        work = self.workload
        tokens = work.tokens // 2
        of_scoring = work.tokens > work.train_tokens  # the largest pass scores rows
        train = work.train_tokens if of_scoring else tokens
        half = replace(work, tokens=max(tokens, train), train_tokens=train, vocabulary_rows=work.vocabulary_rows // 2)
        option = "eval_batch_tokens" if of_scoring else "tokens_per_pass"
        yield f"data.{option} {tokens}", replace(self, workload=half).plan()


def tuning_bytes(
    tensors: TunedTensors, num_queries: int, queries_at_once: int, optimizer: OptimizerOptions
) -> dict[str, int]:
    """Return the bytes that tuning takes in addition to the model, by purpose."""
    masters = 4 * tensors.num_elements
    named = tensors.named_masters()
    moved = 4 * sum(named[name].numel() for name in tensors.names_of_step(0, 0))
    at_once = min(num_queries, queries_at_once)
    # The gradient takes the memory of the first direction, so later directions are in addition to it. With rounding the gradient
    # is a separate tensor, and all directions are in addition to it.
    rounded = any(tensor.live.dtype != torch.float32 for _, tensor in tensors.items())
    held = moved * (at_once + (num_queries > at_once or rounded)) if moved <= tensors.hold_bytes else moved
    largest = max(master.numel() for master in tensors.masters)
    return {
        "masters": masters,
        "best masters": masters if tensors.may_be_copied else 0,  # for a rollback
        "directions and gradient": held,
        "base weights, bases and masks": sum(buffer.nbytes for buffer in tensors.buffers()),
        f"{optimizer.name} state": int(masters * optimizer.state_copies),
        "rounding": _ROUNDING_COPIES * 4 * largest if rounded else 0,
    }
