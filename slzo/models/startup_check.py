"""Whether a model in parts computes what the whole one does: on a tiny twin in depth, on the model itself with short rows.

The twin (:mod:`slzo.models.twin`) shows within a few dozen tokens what rows of thousands would: windows, chunks, the length that
rotary embeddings were made for. It is in float32, where rounding hides nothing.
"""

import inspect
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.parts import ModelParts, attention_of, find_decoder_layers, refusal
from slzo.models.quantization import method_of
from slzo.models.twin import tiny_twin

# Measured on twins of 150 model types: at most 2e-5 where the parts are right, at least 8e-4 where they are wrong.
_TWIN_TOLERANCE = 1e-4
# Roundings of one value on its way through a layer: norms, attention, MLP and the two sums of the residual stream.
_ROUNDINGS = 10
# Some quantizations round activations too, with the largest of the whole batch: LLM.int8 differed by 0.06.
_QUANTIZED_TOLERANCE = 0.1
# What no arithmetic excuses: beyond it half of the largest logit is another.
_MOST = 0.25

# Prompt and answers of each made-up row. For the model itself:
_FEW: "_Rows" = ((5, (1,)), (4, (1,)), (6, (2,)))
# for a twin a shared prompt, windows and chunks crossed, all within the length its rotary embeddings were made for:
_SHORT: "_Rows" = ((9, (3, 2)), (5, (2,)), (11, (2,)))
# and beyond it, beside rows that are within:
_LONG: "_Rows" = ((9, (3, 2)), (28, (2,)), (11, (2,)), (38, (1, 1)))
# Row that is changed to see whether the others notice. Not the first: its first token fills up shorter sequences.
_CHANGED = 1

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def split_and_verify(
    model: PreTrainedModel, packed: bool = True, onednn: bool | None = None, compile: bool = False
) -> ModelParts:
    """The parts of a model, checked to compute together what the whole does.

    Arguments are those of :class:`ModelParts`, but a model that does not run right with packed attention keeps its own and is
    padded, with a warning.

    Raises:
        SlzoError: The architecture cannot be run in parts; the model is as it was.
    """
    find_decoder_layers(model)
    own_attention = attention_of(model)
    packed = packed and model._can_set_attn_implementation()
    try:
        # before any attention is exchanged, so that a feature that ours lacks shows as a difference
        expected = _plain_logits(model, _FEW)
    except _FAILURES as failure:
        raise refusal(model, f"a plain forward pass failed ({_first_words(failure)})") from failure
    twin = _Twin(model)
    cause: Exception | None = None
    reason = ""
    for without_padding in (True, False) if packed else (False,):
        try:
            longest = twin.longest(without_padding)
            parts = ModelParts(model, without_padding, onednn, compile)
            _check_model(parts, expected)
            parts.longest = longest
            parts.pads_left = parts.packed or twin.pads_left()
        except _WrongError as wrong:
            cause, reason = None, str(wrong)
        except _FAILURES as failure:
            cause, reason = failure, f"running its layers failed: {_first_words(failure)}"
        else:
            if packed and not without_padding:
                name = type(model).__name__
                warnings.warn(f"{name} does not run right without padding ({reason}): padding is used", stacklevel=2)
            return parts
        if own_attention != attention_of(model):
            model.set_attn_implementation(own_attention)
    raise refusal(model, f"run in parts, {reason}") from cause


class _WrongError(Exception):
    """The parts do not compute what the whole does."""


class _Twin:
    """A model's tiny twin, and what the whole of it computes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel | None = None
        self.reason = ""
        self.original = _original_length(model)
        try:
            self.model = tiny_twin(model)
            self.expected = {rows: _plain_logits(self.model, rows) for rows in (_LONG, _SHORT)}
            self.attention = attention_of(self.model)
        except _FAILURES as failure:
            self.model, self.reason = (
                None,
                f"no tiny model of its kind can be made to try it on: {_first_words(failure)}",
            )

    def longest(self, packed: bool) -> int | None:
        """Longest sequence that the parts compute rightly beside any others, ``None`` for no limit.

        Raises:
            _WrongError: They do not for short ones.
        """
        if self.model is None:
            if packed:
                raise _WrongError(self.reason)
            return self.original
        try:
            parts = ModelParts(self.model, packed, onednn=False)
            if packed and not parts.packed:
                return None  # as the model itself
            self._check(parts, _SHORT)
            try:
                self._check(parts, _LONG)
            except _WrongError:
                if self.original is None:
                    raise
                return self.original
            return None
        finally:
            if self.attention != attention_of(self.model):
                self.model.set_attn_implementation(self.attention)

    @torch.no_grad()
    def pads_left(self) -> bool:
        """Whether padding before a sequence is as good as none with the model's own attention; no if it cannot be said."""
        if self.model is None:
            return False
        alone, beside = (example.sequences[0].ids for example in _examples(self.model, ((5, (1,)), (20, (1,)))))
        filled = len(beside) - len(alone)
        ids = torch.tensor([[0] * filled + list(alone), list(beside)], device=self.model.device)
        mask = torch.ones_like(ids)
        mask[0, :filled] = 0
        places = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            places = {}
        try:
            plain = self.model(input_ids=ids[:1, filled:], use_cache=False).logits[0, -1]
            padded = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits[0, -1]
        except _FAILURES:
            return False
        return bool((padded - plain).abs().max() <= _TWIN_TOLERANCE * plain.abs().max())

    def _check(self, parts: ModelParts, rows: "_Rows") -> None:
        for layer in range(parts.num_layers):
            error = largest_difference(parts, self.expected[rows], rows, layer)
            if not error <= _TWIN_TOLERANCE:  # NaN is refused too
                raise _WrongError(
                    f"a tiny model of its kind gives other logits than the whole, relative error {error:.2g}"
                )
        _check_leaks(parts)


_Rows = tuple[tuple[int, tuple[int, ...]], ...]


def _check_model(parts: ModelParts, expected: Tensor) -> None:
    error = largest_difference(parts, expected)
    if not error <= _tolerance(parts):
        raise _WrongError(f"its logits differ from the whole model's, relative error {error:.2g}")
    _check_leaks(parts)


def _tolerance(parts: ModelParts) -> float:
    """Relative error of logits that comes from rounding: it adds up like a random walk.

    Sums over the hidden size round at each addend in float32; in half precision they are kept in float32 and rounded once.
    """
    config, dtype = parts.model.config.get_text_config(decoder=True), parts.model.dtype
    addends = config.hidden_size if dtype == torch.float32 else 1
    walk = torch.finfo(dtype).eps * (_ROUNDINGS * parts.num_layers * addends) ** 0.5
    if method_of(parts.model) is not None:
        walk = max(walk, _QUANTIZED_TOLERANCE)
    return min(max(walk, _TWIN_TOLERANCE), _MOST)


@torch.no_grad()
def _check_leaks(parts: ModelParts) -> None:
    """Change one row into NaN where it enters the second layer; in any type of numbers, the others must not see it."""
    if parts.num_layers < 2:
        return
    batch = pack(_examples(parts.model, _FEW)).to(parts.model.device)
    hidden = parts.run(batch, 0, 1)
    changed = slice(batch.example_tokens[0], sum(batch.example_tokens[: _CHANGED + 1]))
    hidden[changed] = torch.nan
    seen = parts.run(batch, 1, parts.num_layers, hidden).isfinite().flatten(1).all(dim=1)
    seen[changed] = True
    if not seen.all():
        raise _WrongError("rows of a batch see each other")


def _first_words(failure: Exception) -> str:
    return " ".join(str(failure).split())[:200] or type(failure).__name__


def _original_length(model: PreTrainedModel) -> int | None:
    """Length beyond which rotary embeddings depend on the longest sequence of a batch; ``None`` if they do not."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    lengths = [
        kind.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((length for length in lengths if length), default=None)


def _examples(model: PreTrainedModel, rows: _Rows) -> list[EncodedExample]:
    """Rows of made-up tokens."""
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
    """Logits that predict each answer token, one whole forward pass per sequence, shape (R, vocabulary), float32."""
    found = []
    for sequence in (sequence for example in _examples(model, rows) for sequence in example.sequences):
        logits = model(input_ids=torch.tensor([sequence.ids], device=model.device), use_cache=False).logits[0]
        found.append(logits[-sequence.num_answer - 1 : -1].float())
    return torch.cat(found)


@torch.no_grad()
def largest_difference(parts: ModelParts, expected: Tensor, rows: _Rows = _FEW, layer: int | None = None) -> float:
    """Largest difference between the logits of parts, cut before a layer, and ``expected``, relative to the largest of these.

    The head for some of the tokens is tried too; where it fails or differs it is not used. Of a mixture of experts in half
    precision, whose router sends a token elsewhere after rounding, it is the median over the rows of logits.
    """
    batch = pack(_examples(parts.model, rows)).to(parts.model.device)
    layer = parts.num_layers // 2 if layer is None else layer
    final = parts.run(batch, layer, parts.num_layers, parts.run(batch, 0, layer) if layer else None)
    final = final.index_select(0, batch.needed)
    logits, scale = parts.head(final), expected.abs().max()
    ids = torch.arange(3, 12, 4, device=final.device)
    try:
        few = parts.head(final, ids)
        parts.selects &= bool((few - logits[:, ids]).abs().max() <= _tolerance(parts) * scale)
    except _FAILURES:
        parts.selects = False
    differences = (logits[batch.token_needed] - expected).abs().amax(dim=1)
    routed = parts.model.dtype != torch.float32 and any("expert" in name for name, _ in parts.model.named_parameters())
    return float((differences.median() if routed else differences.max()) / scale)
