"""One training step as published (MeZO, arXiv 2305.17333, ``large_models``) and its rows, for comparison only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slzo.batches.encoded import EncodedExample
from slzo.batches.layout import Movable
from slzo.data.encoding import Encoder
from slzo.data.sources import RowSource
from slzo.data.splits import draw_splits
from slzo.models.load import load_tokenizer
from slzo.tasks.registry import get_task

EPS = 1e-3
LEARNING_RATE = 3e-4


def encoded_rows(model: str, task: str, data_dir: str | None, count: int) -> list[EncodedExample]:
    """Return tokenized training rows of a task, in random order."""
    pool = RowSource(get_task(task), data_dir).read("train").examples
    rows = draw_splits(pool, pool[:1], num_train=count, num_dev=0, num_test=1, seed=0).train
    encoder = Encoder(load_tokenizer(model))
    return [encoder.encode(row, index) for index, row in enumerate(rows)]


def unmap(model: nn.Module) -> None:
    """Copy weights out of the files that they are mapped from: the published step changes them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@dataclass(frozen=True)
class PaddedBatch(Movable):
    """Left-padded sequences, shape (S, L): one per candidate (classification) or per gold answer."""

    input_ids: Tensor
    attention_mask: Tensor
    is_answer: Tensor
    num_candidates: int
    gold: Tensor


def pad_left(examples: Sequence[EncodedExample], only_gold: bool) -> PaddedBatch:
    """Make sequences as MeZO's collator does: one per candidate, padded on the left to a multiple of 8."""
    chosen = [
        sequence
        for example in examples
        for sequence in ([example.sequences[example.gold[0]]] if only_gold else example.sequences)
    ]
    width = -(-max(len(sequence.ids) for sequence in chosen) // 8) * 8
    ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    mask = torch.zeros(len(chosen), width, dtype=torch.int64)
    answer = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, sequence in enumerate(chosen):
        ids[row, width - len(sequence.ids) :] = torch.tensor(sequence.ids)
        mask[row, width - len(sequence.ids) :] = 1
        answer[row, width - sequence.num_answer :] = True
    gold = torch.tensor([example.gold[0] for example in examples])
    return PaddedBatch(ids, mask, answer, len(chosen) // len(examples), gold)


def published_loss(model: nn.Module, batch: PaddedBatch, only_gold: bool) -> Tensor:
    """Return MeZO's loss: log-softmax over the vocabulary at every position, of which the answers' positions are used."""
    # positions count real tokens, so that padding on the left does not shift them
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
    picked = log_probs.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.is_answer[:, 1:]
    if only_gold:
        return -(picked * mask).sum() / mask.sum()
    scores = (picked * mask).sum(dim=1) / mask.sum(dim=1)
    return F.cross_entropy(scores.view(-1, batch.num_candidates), batch.gold)


def _noise(parameter: nn.Parameter) -> Tensor:
    return torch.normal(mean=0, std=1, size=parameter.size(), dtype=parameter.dtype, device=parameter.device)


def published_step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: PaddedBatch,
    only_gold: bool,
    seed: int,
    lr: float = LEARNING_RATE,
) -> tuple[float, float]:
    """Take one MeZO step on the given parameters; return both losses."""

    def perturb(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            z = _noise(parameter)
            parameter.data = parameter.data + scale * z * EPS

    perturb(1)
    loss_plus = float(published_loss(model, batch, only_gold))
    perturb(-2)
    loss_minus = float(published_loss(model, batch, only_gold))
    perturb(1)
    projected_grad = (loss_plus - loss_minus) / (2 * EPS)
    torch.manual_seed(seed)
    for parameter in parameters:
        z = _noise(parameter)
        parameter.data = parameter.data - lr * (projected_grad * z)
    return loss_plus, loss_minus
