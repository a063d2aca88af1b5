"""Answers to many prompts at once, greedy or sampled.

Prompts are run packed, a common beginning once. Decoding then feeds one token per unfinished row; keys and values lie in
buffers of rows of similar length, so that little padding is attended to, and a finished row leaves the buffers at once.

Shapes used here: ``H`` heads, ``G`` key-value heads, ``D`` head size, ``T`` prompt tokens of a chunk, ``n`` unfinished rows,
``m`` of them in one buffer of width ``W``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample, prompt_alone
from slzo.batches.layout import PackedLayout, group_by_length
from slzo.batches.losses import LossSum, add_up, answer_loss, no_loss
from slzo.batches.packing import TokenBatch, pack
from slzo.batches.sharing import chunk_by_tokens, share_beginnings
from slzo.data.encoding import newline_token
from slzo.evaluation.sampling import Sampling
from slzo.models.attention import (
    LAYOUT_ARGUMENT,
    VIRTUAL_ARGUMENT,
    masked_attention,
    packed_attention_forward,
    use_attention,
    with_virtual_tokens,
)
from slzo.models.parts import ModelParts

MAX_NEW_TOKENS = 50
"""Longest answer, in tokens (MeZO)."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where an answer ends.

    Attributes:
        stop: Texts that end it, beside the EOS token.
        max_new_tokens: Its most tokens, >= 1.
    """

    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Without what ended it, stripped.
        num_tokens: Tokens that were generated for it, the one that ended it left out.
    """

    text: str
    num_tokens: int


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        answers: New tokens of each prompt, the stop token left out.
        gold: Summed loss of the gold answers' tokens, if they were asked for.
    """

    answers: list[list[int]]
    gold: LossSum | None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ("\n",)) -> set[int]:
    """The tokens that end an answer: EOS, and each of these texts that is one token of its own."""
    return {
        token for token in (tokenizer.eos_token_id, *(_token(tokenizer, text) for text in stop)) if token is not None
    }


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ("\n",)) -> str:
    """The answer in generated tokens: the text before the first of the texts that end one, stripped."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))].strip()


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The one token that a text is wherever it stands, ``None`` if there is none."""
    return newline_token(tokenizer) if text == "\n" else tokenizer.get_added_vocab().get(text)


def ends_with(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether generated tokens end in a text that ends an answer and is more than one token; ``None`` if no text is."""
    texts = [text for text in stop if _token(tokenizer, text) is None]
    if not texts:
        return None
    longest = max(len(text.encode()) for text in texts) + 1

    def ended(ids: Sequence[int]) -> bool:
        tail = str(tokenizer.decode(list(ids[-longest:]), skip_special_tokens=True))
        return any(text in tail for text in texts)

    return ended


@torch.no_grad()
def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefill_tokens: int = 1024,
    gold: Sequence[EncodedExample] | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling | None = None,
) -> Generation:
    """Continuations of prompts.

    Args:
        parts: The model with its live weights.
        prompts: Token ids, at least one each.
        stops: Tokens that end an answer, see :func:`stop_tokens`.
        max_new_tokens: Longest answer, >= 1.
        prefill_tokens: Prompt tokens per forward pass.
        gold: Gold answers after their prompts, one example per prompt; their loss is taken in the same passes.
        ended: Whether an answer's tokens so far end it, see :func:`ends_with`; a model that pads does not ask.
        sampling: Draws the tokens, one key per prompt; ``None``: the likeliest are taken.
    """
    if not parts.packed or parts.compile:
        loss = None if gold is None else _separate_loss(parts, gold, prefill_tokens)
        return Generation(_generate_padded(parts, prompts, stops, max_new_tokens, sampling), loss)
    device = parts.model.device
    answers: list[list[int]] = [[] for _ in prompts]
    buffers = [_Buffer.of(rows, prompts, max_new_tokens, device) for rows in group_by_length(prompts)]
    with _attention(parts):
        tokens, loss = _prefill(parts, prompts, buffers, prefill_tokens, gold, sampling)
        for step in range(max_new_tokens):
            finished = {row for row, token in tokens.items() if token in stops}
            for row in tokens.keys() - finished:
                answers[row].append(tokens[row])
            if ended is not None:
                finished |= {row for row in tokens.keys() - finished if ended(answers[row])}
            for buffer in buffers:
                buffer.remove(finished)
            buffers = [buffer for buffer in buffers if buffer.rows]
            rows = [row for buffer in buffers for row in buffer.rows]
            if not rows or step == max_new_tokens - 1:
                break
            newest = torch.tensor([answers[row][-1] for row in rows], device=device)
            decoding = _Decoding(buffers)
            hidden = _run(parts, newest, decoding.positions, decoding.attend)
            tokens = dict(zip(rows, _pick(parts.head(hidden), rows, step + 1, sampling), strict=True))
            for buffer in buffers:
                buffer.lengths += 1
    return Generation(answers, loss)


@dataclass
class _Buffer:
    """Keys and values of rows of similar length.

    Attributes:
        rows: Row numbers, in the order of the buffer's slots; a finished row is replaced by the last one.
        lengths: Tokens held for each slot, shape (m,), int64.
        width: Tokens that there is room for (W).
        keys: Per attention layer, shape (slots, G, W, D).
        values: Like keys.
    """

    rows: list[int]
    lengths: Tensor
    width: int
    keys: dict[nn.Module, Tensor] = field(default_factory=dict)
    values: dict[nn.Module, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[int], prompts: Sequence[Sequence[int]], num_new: int, device: torch.device) -> Self:
        """An empty buffer for some of the prompts, the longest first, and as many new tokens each."""
        lengths = [len(prompts[row]) for row in rows]
        return cls(rows, torch.tensor(lengths, device=device), lengths[0] + num_new)

    def fill(self, layer: nn.Module, slot: int, key: Tensor, value: Tensor) -> None:
        """Put a prompt's keys and values, shape (G, length, D), into a slot."""
        for store, states in ((self.keys, key), (self.values, value)):
            if layer not in store:
                heads, _, size = states.shape
                store[layer] = states.new_zeros(len(self.rows), heads, self.width, size)
            store[layer][slot, :, : states.shape[1]] = states

    def remove(self, finished: set[int]) -> None:
        """Free the slots of finished rows."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot] not in finished:
                continue
            last = len(self.rows) - 1
            if slot != last:
                for store in (self.keys, self.values):
                    for states in store.values():
                        states[slot] = states[last]
                self.rows[slot] = self.rows[last]
                self.lengths[slot] = self.lengths[last]
            self.rows.pop()
            self.lengths = self.lengths[:last]


_Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], tuple[Tensor, None]]
"""What attention layers find in place of a packed layout: layer, query, key, value and options to output (1, tokens, H, D)."""


@dataclass
class _Recording:
    """Packed attention that keeps the keys and values."""

    layout: PackedLayout
    states: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        self.states[layer] = (key[0], value[0])
        return packed_attention_forward(layer, query, key, value, None, packed_layout=self.layout, **options)


class _Decoding:
    """One new token per row attends to what its buffer holds, and to itself."""

    def __init__(self, buffers: list[_Buffer]) -> None:
        self.buffers = buffers
        self.positions = torch.cat([buffer.lengths for buffer in buffers])
        self.used = [int(buffer.lengths.max()) + 1 for buffer in buffers]
        self.slots = [torch.arange(len(buffer.rows), device=buffer.lengths.device) for buffer in buffers]
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        sizes = [len(buffer.rows) for buffer in self.buffers]
        outputs = []
        own = (states[0].transpose(0, 1).split(sizes) for states in (query, key, value))
        virtual = options[VIRTUAL_ARGUMENT]
        masks = self._window_masks(options["sliding_window"], 0 if virtual is None else virtual.num_tokens)
        for buffer, used, slots, mask, q, k, v in zip(self.buffers, self.used, self.slots, masks, *own, strict=True):
            keys, values = buffer.keys[layer], buffer.values[layer]
            keys[slots, :, buffer.lengths] = k
            values[slots, :, buffer.lengths] = v
            # the heads that share keys become queries of one head: nothing has to be repeated
            grouped = q.reshape(len(slots), k.shape[1], -1, q.shape[-1])
            seen = keys[: len(slots), :, :used], values[: len(slots), :, :used]
            if virtual is not None:
                seen = with_virtual_tokens(virtual, layer, *seen)
            sinks = options["s_aux"]
            if sinks is not None:  # one for each query, as they are grouped
                sinks = sinks.view(1, k.shape[1], -1, 1)
            output = masked_attention(grouped, *seen, mask, options["scaling"], options["softcap"], sinks)
            outputs.append(output.flatten(1, 2))
        return torch.cat(outputs).unsqueeze(0), None

    def _window_masks(self, window: int | None, num_before: int) -> list[Tensor]:
        """Which tokens are seen, learned ones before the held ones, per buffer, shape (m, 1, 1, before + used), bool."""
        if window not in self._masks:
            masks = []
            for buffer, used in zip(self.buffers, self.used, strict=True):
                places = torch.arange(-num_before, used, device=buffer.lengths.device)
                distance = buffer.lengths[:, None] - places
                seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                masks.append(seen[:, None, None])
            self._masks[window] = masks
        return self._masks[window]


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Hands over to what came in with the inputs; the mask is a stand-in."""
    attend: _Attend = kwargs[LAYOUT_ARGUMENT]
    options = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux", VIRTUAL_ARGUMENT)}
    return attend(module, query, key, value, options)


@contextmanager
def _attention(parts: ModelParts) -> Iterator[None]:
    """The model's layers use this module's attention."""
    parts.prepare()
    before = parts.model.config.get_text_config(decoder=True)._attn_implementation
    use_attention(parts.model, "slzo_generate", _attention_forward)
    try:
        yield
    finally:
        parts.model.set_attn_implementation(before)


def _run(parts: ModelParts, ids: Tensor, positions: Tensor, attend: _Attend) -> Tensor:
    """Final hidden states of tokens in one row, shape (tokens, hidden)."""
    # the layout only travels through the model, from here to _attention_forward
    return parts.run(TokenBatch(ids, positions, cast("PackedLayout", attend)), 0, parts.num_layers)


def _pick(logits: Tensor, rows: Sequence[int], position: int, sampling: Sampling | None) -> list[int]:
    """The token of each row at a position of its answer, from logits (rows, vocabulary)."""
    return (logits if sampling is None else sampling.disturbed(logits, rows, position)).argmax(dim=-1).tolist()


def _prefill(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    buffers: list[_Buffer],
    max_tokens: int,
    gold: Sequence[EncodedExample] | None,
    sampling: Sampling | None,
) -> tuple[dict[int, int], LossSum | None]:
    """Fill the buffers with the prompts; returns the first new token of each row and the loss of the gold answers."""
    place = {row: (buffer, slot) for buffer in buffers for slot, row in enumerate(buffer.rows)}
    tokens: dict[int, int] = {}
    losses: list[LossSum] = []
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    for chunk in chunk_by_tokens([prompts[row] for row in order], max_tokens):
        rows = [order[number] for number in chunk]
        encoded = [_with_gold(row, prompts[row], None if gold is None else gold[row]) for row in rows]
        batch = share_beginnings(pack(encoded)).to(parts.model.device)
        recording = _Recording(batch.layout)
        hidden = _run(parts, batch.input_ids, batch.position_ids, recording.attend)
        logits = parts.head(hidden.index_select(0, batch.needed))
        if gold is not None:
            losses.append(answer_loss(logits, batch))
        last = batch.token_needed[batch.candidate_slot[batch.token_candidate] == 0]
        tokens.update(zip(rows, _pick(logits[last], rows, 0, sampling), strict=True))
        for row, positions in zip(rows, batch.layout.sequences_up_to(batch.needed[last]), strict=True):
            buffer, slot = place[row]
            for layer, (key, value) in recording.states.items():
                buffer.fill(layer, slot, key.index_select(1, positions), value.index_select(1, positions))
    return tokens, add_up(losses) if losses else None


def _with_gold(row: int, prompt: Sequence[int], gold: EncodedExample | None) -> EncodedExample:
    """The prompt as candidate 0, the gold answer after its prompt as candidate 1."""
    alone = prompt_alone(row, tuple(prompt))
    if gold is None or not gold.gold:
        return alone
    return EncodedExample(row, (*alone.sequences, gold.sequences[gold.gold[0]]), (1,))


def _separate_loss(parts: ModelParts, gold: Sequence[EncodedExample], max_tokens: int) -> LossSum:
    losses = []
    known = [example for example in gold if example.gold]
    for chunk in chunk_by_tokens([example.sequences[0].ids for example in known], max_tokens, share=False):
        batch = pack([known[number] for number in chunk]).to(parts.model.device)
        losses.append(answer_loss(parts.logits(batch), batch))
    return add_up(losses) if losses else no_loss(parts.model.device)


def _generate_padded(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new_tokens: int,
    sampling: Sampling | None,
) -> list[list[int]]:
    """For models whose attention cannot be exchanged: transformers' own generation, padded on the left."""
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    if not parts.pads_left and len(set(lengths)) > 1:  # padding would be seen: equal lengths together
        answers: dict[int, list[int]] = {}
        for length in set(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            own_sampling = None if sampling is None else sampling.of(rows)
            found = _generate_padded(parts, [prompts[row] for row in rows], stops, max_new_tokens, own_sampling)
            answers.update(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=parts.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)

    def _disturb(so_far: Tensor, logits: Tensor) -> Tensor:
        assert sampling is not None
        return sampling.disturbed(logits, range(len(prompts)), so_far.shape[1] - width)

    output = parts.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
        logits_processor=None if sampling is None else [_disturb],
    )
    return [list(takewhile(lambda token: token not in stops, new)) for new in output[:, width:].tolist()]
