"""Compare answers with references.

Answers are normalized and compared as in the SQuAD 1.1 evaluation: lower case, no punctuation, no articles.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_of(completion: object) -> str:
    """Return a completion's text: the completion itself, or the contents of its messages if the row is a conversation."""
    if isinstance(completion, str):
        return completion
    turns = completion if isinstance(completion, Sequence) else ()
    return "\n".join(str(turn["content"]) for turn in turns if isinstance(turn, Mapping) and "content" in turn)


def normalize_answer(text: str) -> str:
    """Convert to lower case, remove ASCII punctuation and English articles, and put one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals a reference after normalization; an empty prediction matches only empty texts."""
    return max((float(_equal(prediction, text)) for text in references), default=float(not prediction.strip()))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of word precision and recall, 0 to 1, the best over the references."""
    return max((_pair_f1(prediction, text) for text in references), default=float(not prediction.strip()))


def _equal(prediction: str, reference: str) -> bool:
    if not prediction.strip() or not reference.strip():
        return not prediction.strip() and not reference.strip()
    return normalize_answer(prediction) == normalize_answer(reference)


def _pair_f1(prediction: str, reference: str) -> float:
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not predicted or not expected:
        return float(_equal(prediction, reference))
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))
