"""Check that a model run in parts computes the same as the whole model: in depth on a tiny twin, briefly on the model itself.

A few dozen tokens exercise in the twin (:mod:`slzo.models.twin`) what takes thousands of tokens in the model: windows, chunks
and the original length of rotary embeddings. The twin runs in float32, so that rounding hides no error.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import DistError

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import PackedBatch, pack
from slzo.models.attention import packed_attention_forward
from slzo.models.decoder_layers import find_decoder_layers, refusal
from slzo.models.logits import final_states
from slzo.models.parts import Limits, ModelParts
from slzo.models.placement import ON_MAIN_DEVICE, Placement
from slzo.models.quantization import method_of
from slzo.models.twin import rope_entries, tiny_twin
from slzo.private.models import attention_of, can_replace_attention
from slzo.utils.errors import SlzoError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# They say nothing about the model: another process has ended, a disk or the memory is full.
_NOT_OF_THE_MODEL = (DistError, SlzoError, OSError, MemoryError, torch.OutOfMemoryError)
# Measured on twins of 150 model types: at most 2e-5 where the parts are right, at least 8e-4 where they are wrong.
_TWIN_TOLERANCE = 1e-4
# Number of roundings of a value in one layer: norms, attention, MLP and the two sums of the residual stream.
_ROUNDINGS = 10
# Some quantizations also round activations, scaled by the largest value of the batch: LLM.int8 differed by 0.06.
_QUANTIZED_TOLERANCE = 0.1
# Upper bound of every tolerance: rounding does not explain a larger error.
_MAX_TOLERANCE = 0.25

# Number of prompt tokens and of tokens in each answer, for each made-up row. For the model itself:
_FEW: _Rows = ((5, (1,)), (4, (1,)), (6, (2,)))
# For a twin: a shared prompt, and rows longer than windows and chunks but within the original length of rotary embeddings:
_SHORT: _Rows = ((9, (3, 2)), (5, (2,)), (11, (2,)))
# For a twin: rows within that length and rows beyond it:
_LONG: _Rows = ((9, (3, 2)), (28, (2,)), (11, (2,)), (38, (1, 1)))
# Row that is changed to test whether it affects the others. Not the first row: its first token pads shorter sequences.
_CHANGED = 1


def split_and_verify(
    model: PreTrainedModel, packed: bool = True, onednn: bool | None = None, placement: Placement = ON_MAIN_DEVICE
) -> ModelParts:
    """Split a model into parts and check that they compute the same as the whole model.

    The arguments are those of :class:`ModelParts`. If packed attention gives wrong results, the model keeps its own attention
    and runs with padding, after a warning.

    Raises:
        SlzoError: The architecture cannot be run in parts; the model is then unchanged.
    """
    find_decoder_layers(model)
    own_attention = attention_of(model)
    packed = packed and can_replace_attention(model)
    try:
        # before the attention is replaced, so that a feature that packed attention lacks shows up as a difference
        expected = _plain_logits(model, _FEW)
    except _NOT_OF_THE_MODEL:
        raise
    except Exception as failure:  # the code of a model may raise any
        reason = f"a plain forward pass failed ({one_line(failure)})"
        if getattr(model, "hf_quantizer", None) is not None:
            raise SlzoError(
                f"model.quantization: {reason}; choose another quantization, or use the model without one"
            ) from failure
        raise refusal(model, reason) from failure
    if not expected.isfinite().all():
        raise SlzoError(
            "model.model: the logits of a plain forward pass are infinite or NaN; its weights may be damaged, or too large for "
            f"model.dtype {str(model.dtype).removeprefix('torch.')}"
        )
    twin = _Twin(model)
    cause: Exception | None = None
    reason = ""
    for without_padding in (True, False) if packed else (False,):
        try:
            longest = twin.longest(without_padding)
            parts = ModelParts(model, without_padding, onednn, placement)
            selects_tokens = _check_model(parts, expected)
            parts.limits = Limits(longest, selects_tokens, parts.packed or twin.allows_left_padding())
        except _NOT_OF_THE_MODEL:
            raise
        except _MismatchError as wrong:
            cause, reason = None, str(wrong)
        except Exception as failure:
            cause, reason = failure, f"running its layers failed: {one_line(failure)}"
        else:
            if packed and not without_padding:
                name = type(model).__name__
                warnings.warn(
                    f"{name} does not run correctly without padding ({reason}); padding is used", stacklevel=2
                )
            return parts
        if own_attention != attention_of(model):
            model.set_attn_implementation(own_attention)
    raise refusal(model, f"run in parts, {reason}") from cause


class _MismatchError(Exception):
    """The parts and the whole model give different results."""


class _Twin:
    """The tiny twin of a model, with the logits of its plain forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel | None = None
        self.reason = ""
        self.original_length = _original_length(model)
        try:
            self.model = tiny_twin(model)
            self.expected = {rows: _plain_logits(self.model, rows) for rows in (_LONG, _SHORT)}
            self.attention = attention_of(self.model)
        except _NOT_OF_THE_MODEL:
            raise
        except Exception as failure:
            self.model = None
            self.reason = f"no tiny model of this type can be made for the check: {one_line(failure)}"

    def longest(self, packed: bool) -> int | None:
        """Return the longest sequence that the parts compute correctly in any batch; ``None`` for no limit."""
        if self.model is None:
            if packed:
                raise _MismatchError(self.reason)
            return self.original_length
        try:
            parts = ModelParts(self.model, packed, onednn=False)
            if packed and not parts.packed:
                return None  # the model itself cannot run packed either
            if packed:
                _check_calls(parts)
            self._check(parts, _SHORT)
            try:
                self._check(parts, _LONG)
            except _MismatchError:
                if self.original_length is None:
                    raise
                return self.original_length
            return None
        finally:
            if self.attention != attention_of(self.model):
                self.model.set_attn_implementation(self.attention)

    @torch.no_grad()
    def allows_left_padding(self) -> bool:
        """Whether left padding leaves the results of the model's own attention unchanged; ``False`` if this cannot be tested."""
        if self.model is None:
            return False
        short, long = (example.sequences[0].ids for example in _examples(self.model, ((5, (1,)), (20, (1,)))))
        padding = len(long) - len(short)
        ids = torch.tensor([[0] * padding + list(short), list(long)], device=self.model.device)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            positions = {}
        try:
            plain = self.model(input_ids=ids[:1, padding:], use_cache=False).logits[0, -1]
            padded = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[0, -1]
        except _NOT_OF_THE_MODEL:
            raise
        except Exception:
            return False
        return bool((padded - plain).abs().max() <= _TWIN_TOLERANCE * plain.abs().max())

    def _check(self, parts: ModelParts, rows: _Rows) -> None:
        problem = "a tiny model of this type gives different logits"
        for layer in range(parts.num_layers):
            _compare(parts, rows, layer, self.expected[rows], _TWIN_TOLERANCE, problem)
        _check_leaks(parts)


_Rows = tuple[tuple[int, tuple[int, ...]], ...]


def _check_model(parts: ModelParts, expected: Tensor) -> bool:
    """Compare a few logits; return whether the head can be run for some tokens of the vocabulary."""
    problem = "its logits differ from those of a plain forward pass"
    final, logits = _compare(parts, _FEW, parts.num_layers // 2, expected, _tolerance(parts), problem)
    _check_leaks(parts)
    return _selects_tokens(parts, final, logits)


def _tolerance(parts: ModelParts) -> float:
    """Return the relative error of logits that rounding explains; rounding errors add up like a random walk.

    In float32, a sum over the hidden size rounds at each addend. In half precision, it is kept in float32 and rounded once.
    """
    config, dtype = parts.model.config.get_text_config(decoder=True), parts.model.dtype
    addends = config.hidden_size if dtype == torch.float32 else 1
    walk = torch.finfo(dtype).eps * (_ROUNDINGS * parts.num_layers * addends) ** 0.5
    if method_of(parts.model) is not None:
        walk = max(walk, _QUANTIZED_TOLERANCE)
    return min(max(walk, _TWIN_TOLERANCE), _MAX_TOLERANCE)


@torch.no_grad()
def _check_leaks(parts: ModelParts) -> None:
    """Check that NaN in one row, where it enters the second layer, does not reach the others; this works in every dtype."""
    if parts.num_layers < 2:
        return
    batch = pack(_examples(parts.model, _FEW)).to(parts.model.device)
    hidden = parts.run(batch, 0, 1)
    changed = slice(batch.example_tokens[0], sum(batch.example_tokens[: _CHANGED + 1]))
    hidden[changed] = torch.nan
    seen = parts.run(batch, 1, parts.num_layers, hidden).isfinite().flatten(1).all(dim=1)
    seen[changed] = True
    if not seen.all():
        raise _MismatchError("rows of a batch affect each other")


@torch.no_grad()
def _check_calls(parts: ModelParts) -> None:
    """Check that each attention layer computes attention once in a pass, since its keys and values are kept by layer."""
    batch, called = pack(_examples(parts.model, _FEW)).to(parts.model.device), []

    def attend(
        layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        called.append(layer)
        return packed_attention_forward(layer, query, key, value, None, packed_layout=batch.layout, **options)

    parts.run(batch, 0, parts.num_layers, attend=attend)
    if len(set(called)) < len(called):
        raise _MismatchError("a layer computes attention several times")


def _original_length(model: PreTrainedModel) -> int | None:
    """Return the length beyond which rotary embeddings depend on the longest sequence of a batch, ``None`` if they never do."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [
        entry.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        for entry in rope_entries(rope)
        if entry.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((length for length in lengths if length), default=None)


def _examples(model: PreTrainedModel, rows: _Rows) -> list[EncodedExample]:
    """Make rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.config.get_text_config(decoder=True).vocab_size, 1000)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(size, (length,), generator=generator).tolist())

    examples = []
    for number, (prompt, answers) in enumerate(rows):
        beginning = draw(prompt)
        sequences = tuple(EncodedSequence(beginning + draw(length), length) for length in answers)
        examples.append(EncodedExample(number, sequences, ()))
    return examples


@torch.no_grad()
def _plain_logits(model: PreTrainedModel, rows: _Rows) -> Tensor:
    """Return the logits that predict each answer token, from one plain forward pass per sequence; (R, vocabulary), float32."""
    answers = []
    for sequence in (sequence for example in _examples(model, rows) for sequence in example.sequences):
        logits = model(input_ids=torch.tensor([sequence.ids], device=model.device), use_cache=False).logits[0]
        answers.append(logits[-sequence.num_answer - 1 : -1].float())
    return torch.cat(answers)


@torch.no_grad()
def _compare(
    parts: ModelParts, rows: _Rows, layer: int, expected: Tensor, tolerance: float, problem: str
) -> tuple[Tensor, Tensor]:
    """Run random rows in two parts, below ``layer`` and from it on, and compare the logits; return final states and logits."""
    batch = pack(_examples(parts.model, rows)).to(parts.model.device)
    below = parts.run(batch, 0, layer) if layer else None
    final = final_states(parts, batch, layer, below)[0]
    logits = parts.head(final)
    error = largest_difference(parts, expected, batch, logits)
    if not error <= tolerance:  # also true for NaN
        raise _MismatchError(f"{problem}, relative error {error:.2g}")
    return final, logits


@torch.no_grad()
def largest_difference(parts: ModelParts, expected: Tensor, batch: PackedBatch, logits: Tensor) -> float:
    """Return the largest difference between the logits of a batch and ``expected``, relative to the largest expected one.

    For a mixture of experts in half precision it is the median over the rows of logits instead of the maximum, because rounding
    can route a token to another expert.
    """
    differences = (logits[batch.token_logit] - expected).abs().amax(dim=1)
    routed = parts.model.dtype != torch.float32 and any("expert" in name for name, _ in parts.model.named_parameters())
    return float((differences.median() if routed else differences.max()) / expected.abs().max())


@torch.no_grad()
def _selects_tokens(parts: ModelParts, final: Tensor, logits: Tensor) -> bool:
    """Return whether the head gives the same logits for selected tokens as ``logits``, those of all tokens."""
    ids = torch.arange(3, 12, 4, device=final.device)
    try:
        few = parts.head(final, ids)
    except _NOT_OF_THE_MODEL:
        raise
    except Exception:
        return False
    if few.shape[-1] != len(ids):  # code of its own that reads the weight of the whole head
        return False
    return bool((few - logits[:, ids]).abs().max() <= _tolerance(parts) * logits.abs().max())
