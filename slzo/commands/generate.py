"""``slzo generate``."""

from functools import partial

from slzo.prompting.choice import probabilities
from slzo.prompting.pair import check_prompt, load_pair
from slzo.prompting.prompts import read_prompts
from slzo.prompting.stream import room_for_prompt, write_continuation
from slzo.tasks.base import Example
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.errors import SlzoError

_NEW_TOKENS = 64


def generate(
    ckpt_path: str,
    prompt: str | None = None,
    prompts: str | None = None,
    max_new_tokens: int = _NEW_TOKENS,
    untuned: bool = True,
    candidates: list[str] | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    r"""Answer prompts with the untuned and the tuned model, one below the other.

    For a classification task it shows the probability of each of its answers, otherwise a text. A model that was tuned on
    conversations gets each prompt as the user's turn in its chat template. Both run on the CPU; slzo predict also uses GPUs.

    Args:
        ckpt_path: Folder of a run, checkpoint, exported folder (adapter, merged or delta), or last or best of the newest run in
            runs.
        prompt: The text to continue, up to where the answer begins. Spaces at its ends are removed, and a long prompt is cut, as
            in slzo predict.
        prompts: File with prompts: one per line, or JSON Lines with the field prompt, and messages for a conversation, such as
            slzo predict writes.
        max_new_tokens: Length of each text, in tokens.
        untuned: Show the untuned model too.
        candidates: Answers to compare, each with its leading space, such as [" yes", " no"]; by default those of the task that
            the model was tuned on, if all of its rows have the same; [] for a text.
        base: Base model of an exported folder, if the one that it names cannot be loaded.
        trust_remote_code: Run model code that comes with a Hub repository.
    """
    if (prompt is None) == (prompts is None):
        raise SlzoError("prompt: give either one prompt with --prompt, or a file of prompts with --prompts")
    asked = [Example("prompt", prompt, ())] if prompt is not None else read_prompts(str(prompts))
    if candidates is not None and len(set(candidates)) < len(candidates):
        raise SlzoError(f"candidates {candidates}: two are equal; give different answers")
    if candidates is not None and len(candidates) == 1:
        raise SlzoError(
            f"candidates {candidates}: one answer alone has probability 1; give two or more, or [] for a text"
        )
    check_at_least("max_new_tokens", max_new_tokens)
    pair = load_pair(ckpt_path, base=base, untuned=untuned, trust_remote_code=trust_remote_code)
    known = pair.candidates if candidates is None else tuple(candidates)
    if known and pair.chat is not None:
        raise SlzoError("candidates: the model was tuned on conversations, whose answers are texts; leave them out")
    if known and max_new_tokens != _NEW_TOKENS:
        rank_zero_warn("max_new_tokens does not change the probabilities of answers; --candidates '[]' gives a text")
    room = None
    if not known:
        with next(iter(pair.models.values()))() as model:
            room = room_for_prompt(model, max_new_tokens)
    for number, example in enumerate(asked):
        text = example.prompt
        rank_zero_print(f"\n{text}" if number else text)
        check_prompt(example)
        ids = () if known else pair.tokens_of(example, room)
        for name, use in pair.models.items():
            rank_zero_print(f"--- {name}")
            with use() as model:
                if known:
                    shares = probabilities(model, pair.tokenizer, text, known, pair.prompt_length)
                    rank_zero_print(
                        ", ".join(f"{answer.strip()} {share:.3f}" for answer, share in zip(known, shares, strict=True))
                    )
                else:
                    write = partial(rank_zero_print, end="")
                    write_continuation(model, pair.tokenizer, ids, max_new_tokens, write, pair.stop, pair.lead)
