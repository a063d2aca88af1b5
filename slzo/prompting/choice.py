"""Score the answers of a classification task to a prompt."""

import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slzo.data.encoding import Encoder
from slzo.models.load import max_positions
from slzo.tasks.base import Example
from slzo.utils.console import rank_zero_warn


@torch.no_grad()
def probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    candidates: Sequence[str],
    max_length: int | None = None,
) -> list[float]:
    """Return the probability of each candidate, as in prediction files: a softmax of the mean log-likelihoods of its tokens.

    Spaces at its ends are removed, as in training. If a prompt with a candidate has more than ``max_length`` tokens, or more than
    the model allows, it is cut on the left, after a warning.

    Raises:
        SlzoError: A candidate has no tokens of its own.
    """
    example = Example("prompt", prompt.strip(" "), tuple(candidates))
    scores = []
    positions = max_positions(model)
    known = [length for length in (positions, max_length) if length is not None]
    encoder = Encoder(tokenizer, min(known, default=sys.maxsize))
    encoded = encoder.encode(example, 0)
    if encoded.cut:
        limit = "that the model takes" if encoder.max_length == positions else "of its run (data.max_length)"
        rank_zero_warn(f"the prompt is longer than the {encoder.max_length} tokens {limit}, and is cut on the left")
    for sequence in encoded.sequences:
        ids = torch.tensor([list(sequence.ids)], device=model.device)
        answer = sequence.num_answer
        logits = model(input_ids=ids).logits[0, -answer - 1 : -1].float()
        scores.append(logits.log_softmax(dim=-1).gather(1, ids[0, -answer:, None]).mean())
    return torch.stack(scores).softmax(dim=0).tolist()
