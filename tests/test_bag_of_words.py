"""The accuracy of a linear model on the words of the prompts."""

import random
import re
import sys
from itertools import pairwise

import numpy as np
import pytest

from slzo.evaluation.bag_of_words import WordsReference, bag_of_words
from slzo.tasks.base import Example

CLASSES = (" bad", " good")


def rows(*texts, candidates=CLASSES):
    """Rows of texts; before a colon the indices of their classes, without it no label."""
    parts = [text.rpartition(":") for text in texts]
    return [Example(str(n), text, candidates, tuple(map(int, gold))) for n, (gold, _, text) in enumerate(parts)]


TRAIN = rows("0:a dull film", "1:a warm film", "0:a poor one", "1:a fine one")


def negated(count, seed):
    """Rows whose class depends on two words, and some of whose labels are wrong."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        negation, word = generator.randrange(2), generator.randrange(2)
        noise = generator.choices(["A", "film", "plot", "cast", "scene", "end"], k=generator.randrange(3, 9))
        noise.insert(generator.randrange(len(noise)), ("not ", "")[negation] + ("dull", "warm")[word])
        label = (negation == word) ^ (generator.random() < 0.15)
        found.append(f"{int(label)}:{' '.join(noise)}")
    return rows(*found)


def words(prompt, pairs=True):
    """The words of two letters or more, and their pairs."""
    single = re.findall(r"\w\w+", prompt.lower())
    return single + [" ".join(pair) for pair in pairwise(single)] * pairs


def plain_scores(train, held_out, pairs=True, penalty=10.0):
    """Accuracy and macro F1, with the logarithm of the counts, smooth inverse document frequencies and unit length by hand."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    texts = [words(example.prompt, pairs) for example in train]
    known = sorted({word for text in texts for word in text})
    rarity = np.log((1 + len(texts)) / (1 + np.array([sum(word in text for text in texts) for word in known]))) + 1

    def features(examples):
        own = [words(example.prompt, pairs) for example in examples]
        counts = np.array([[text.count(word) for word in known] for text in own], dtype=float)
        values = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * rarity
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    model = linear_model.LogisticRegression(C=penalty, max_iter=1000)
    model.fit(features(train), [example.gold[0] for example in train])
    gold, predicted = [example.gold[0] for example in held_out], model.predict(features(held_out))
    metrics = pytest.importorskip("sklearn.metrics")
    return metrics.accuracy_score(gold, predicted), metrics.f1_score(gold, predicted, average="macro")


def test_the_scores_are_those_of_a_plain_computation():
    train, held_out = negated(60, 2), negated(80, 3)
    found = bag_of_words(train, held_out)
    assert found == WordsReference(*map(pytest.approx, plain_scores(train, held_out)))
    # the rows tell the choices apart
    assert found.accuracy < 1
    assert plain_scores(train, held_out, pairs=False)[0] != found.accuracy
    assert plain_scores(train, held_out, penalty=1.0)[0] != found.accuracy
    assert found.macro_f1 != found.accuracy


@pytest.mark.parametrize(
    ("held_out", "accuracy"),
    [
        (["1:so warm"], 1.0),
        (["0:so warm"], 0.0),
        (["0:so dull", "0:so poor", "0:so warm"], 2 / 3),  # a class is not among them
        (["0:so dull", "no label", "so warm", "not labelled either"], 1.0),
        (["01:so warm", "10:so dull", "0:so fine", "1:so fine"], 3 / 4),  # rows with two correct answers
    ],
)
def test_labelled_held_out_rows_count(held_out, accuracy):
    pytest.importorskip("sklearn")
    found = bag_of_words(TRAIN, rows(*held_out))
    assert (found.accuracy, found.problem) == (pytest.approx(accuracy), "")


def test_training_rows_without_a_label_or_a_class():
    pytest.importorskip("sklearn")
    held_out = rows("0:so dull", "1:so warm")
    assert bag_of_words([*TRAIN, *rows("a film", "so dull")], held_out) == WordsReference(1.0, 1.0)
    three = (*CLASSES, " fair")
    train = rows("0:a dull film", "1:a warm film", candidates=three)
    found = bag_of_words(train, rows("1:so warm", "2:so so", candidates=three))
    assert found.accuracy == 0.5
    assert found.macro_f1 == pytest.approx(1 / 3)  # no row of class 2 is found


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ([*TRAIN, *rows("0:a film", candidates=(" bad", " fair"))], TRAIN),
        (TRAIN, [*TRAIN, *rows("0:a film", candidates=(" bad", " fair"))]),
        (TRAIN, rows("0:a film", candidates=(" good", " bad"))),
        (TRAIN, rows("a film")),
        (rows("a film"), TRAIN),
        (TRAIN, []),
        ([], TRAIN),
    ],
)
def test_without_common_classes_there_is_no_reference(train, held_out):
    assert bag_of_words(train, held_out) == WordsReference()


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["0:a dull film", "0:a poor one"], "all training rows have the same class"),
        (["0:?", "1:!"], "empty vocabulary"),
    ],
)
def test_rows_that_cannot_be_fitted_are_a_problem(texts, problem):
    pytest.importorskip("sklearn")
    found = bag_of_words(rows(*texts), TRAIN)
    assert found.accuracy is None
    assert problem in found.problem


def test_without_scikit_learn_the_problem_names_the_package(monkeypatch):
    for name in ("sklearn", "sklearn.feature_extraction.text"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bag_of_words(TRAIN, TRAIN) == WordsReference(problem="needs scikit-learn: pip install scikit-learn")


def test_a_scikit_learn_that_cannot_be_imported_does_not_end_the_run(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise ValueError("numpy.dtype size changed")

    monkeypatch.setitem(sys.modules, "sklearn", Broken())
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", Broken())
    assert bag_of_words(TRAIN, TRAIN) == WordsReference(
        problem="scikit-learn cannot be imported: numpy.dtype size changed"
    )
