"""The scores of a linear model on the words of the prompts, as a reference for classification tasks."""

from collections.abc import Sequence
from typing import NamedTuple

from slzo.data.classes import common_candidates
from slzo.evaluation.metrics import macro_f1
from slzo.tasks.base import Example
from slzo.utils.errors import one_line


class WordsReference(NamedTuple):
    """Accuracy and macro F1 on the held-out rows. Without them ``problem`` says why; empty if there is nothing to compare."""

    accuracy: float | None = None
    macro_f1: float | None = None
    problem: str = ""


def bag_of_words(train: Sequence[Example], held_out: Sequence[Example]) -> WordsReference:
    """Fit TF-IDF features of words and pairs of words with a logistic regression, and score the held-out rows.

    The model sees the prompts and labels of the training rows, and no language model. Where it is ahead, the task is about the
    words that a text contains.

    Returns:
        The scores, or the problem; neither if the rows have no common classes.
    """
    labelled = [[example for example in rows if example.gold] for rows in (train, held_out)]
    fitted, scored = labelled
    if not (fitted and scored) or common_candidates([*fitted, *scored]) is None:
        return WordsReference()
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return WordsReference(problem="needs scikit-learn: pip install scikit-learn")
    except Exception as error:  # one that was built for another NumPy raises ValueError
        return WordsReference(problem=f"scikit-learn cannot be imported: {one_line(error)}")
    classes = [example.gold[0] for example in fitted]
    if len(set(classes)) < 2:
        return WordsReference(problem="all training rows have the same class")
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    try:
        model.fit([example.prompt for example in fitted], classes)
    except ValueError as error:  # for example no words
        return WordsReference(problem=str(error))
    predicted = [int(index) for index in model.predict([example.prompt for example in scored])]
    right = sum(index in example.gold for index, example in zip(predicted, scored, strict=True))
    return WordsReference(right / len(scored), macro_f1(scored, predicted))
