"""Fingerprint of a run's rows and tokenizer, to detect a resume with other rows or another tokenizer."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slzo.data.batch import Row
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize

# vocabularies can agree where merges or normalization do not
_PROBE = "It's 3.14 o'clock:\n\tÜber-naïve tokenizers don't agree, do they?  (yes/no) 東京 🙂"
_RESTORE = "restore the rows and data options, or set data.allow_changed_rows to true to use these rows"


@dataclass(frozen=True)
class DataFingerprint:
    """Fingerprint of the data of a run.

    Attributes:
        tokenizer: Hash of the vocabulary and of the tokens of a fixed text.
        rows: Hash of every encoded row, by split; int32, shape (rows,).
    """

    tokenizer: str
    rows: Mapping[str, Tensor]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Sequence[Row]]) -> Self:
        """Compute the fingerprint."""
        return cls(hash_tokenizer(tokenizer), {name: _hash_rows(rows) for name, rows in splits.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, for checkpoints."""
        return {"tokenizer": self.tokenizer, "rows": dict(self.rows)}

    def hashes(self) -> dict[str, str]:
        """Return one hash for the tokenizer and one for the rows of each split, to compare processes or results."""
        rows = {f"{split} rows": str(hash(tuple(own.tolist()))) for split, own in self.rows.items()}
        return {"tokenizer": self.tokenizer, **rows}

    def check(self, saved: Mapping[str, Any], splits: Mapping[str, Sequence[Row]]) -> None:
        """Check that ``splits`` and the tokenizer are those of a checkpoint, for which :meth:`to_dict` returned ``saved``.

        Raises:
            SlzoError: Rows or tokenizer differ; the message names the first row that differs.
        """
        check_tokenizer(self.tokenizer, saved)
        for name, own in self.rows.items():
            before = saved["rows"].get(name, own)
            common = min(len(own), len(before))
            different = (own[:common] != before[:common]).nonzero()
            if len(different):
                number = int(different[0])
                raise SlzoError(
                    f"ckpt_path: row {number} of the {name} rows, {splits[name][number].example.location}, is not that of the "
                    f"checkpoint's run; {_RESTORE}"
                )
            if len(own) != len(before):
                raise SlzoError(
                    f"ckpt_path: the checkpoint's run had {pluralize(len(before), f'{name} row')}, and now there are {len(own)}; "
                    f"{_RESTORE}"
                )


def check_tokenizer(own: str, saved: Mapping[str, Any]) -> None:
    """Check that a tokenizer, given by its hash, is that of a checkpoint.

    Raises:
        SlzoError: The tokenizers differ.
    """
    if own != saved["tokenizer"]:
        raise SlzoError(
            "ckpt_path: the tokenizer of model.model is not that of the checkpoint's run; restore it, or set "
            "data.allow_changed_rows to true to use this one"
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and of the tokens of a fixed text, independent of the version of transformers."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]]
    return _digest([json.dumps(known)], 16).hex()


def are_trained_rows(rows: Sequence[Row], saved: Mapping[str, Any]) -> bool:
    """Return whether ``rows`` are the training rows of a checkpoint, for which :meth:`DataFingerprint.to_dict` gave ``saved``."""
    return torch.equal(_hash_rows(rows), saved["rows"]["train"])


def are_drawn_alike(rows: Sequence[Row], saved: Mapping[str, Any]) -> bool:
    """Return whether held-out ``rows`` are those of a checkpoint's run, or more or fewer of the same; ``saved`` as above."""
    own, before = (set(hashes.tolist()) for hashes in (_hash_rows(rows), saved["rows"]["test"]))
    return own <= before or before <= own


def _hash_rows(rows: Sequence[Row]) -> Tensor:
    hashes = (_digest((repr(part) for part in _parts(row)), 4) for row in rows)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in hashes], dtype=torch.int32)


def _parts(row: Row) -> tuple[Any, ...]:
    """What training and scoring depend on."""
    example = row.example
    columns = json.dumps(dict(example.columns), default=_describe)
    return example.id, row.encoded.sequences, row.prompt, example.gold, example.references, example.group, columns


def _describe(value: object) -> str:
    """Describe a value that JSON cannot hold, without its address, which differs between processes."""
    return re.sub("0x[0-9a-fA-F]+", "", repr(value))


def _digest(texts: Iterable[str], size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for text in texts:
        digest.update(text.encode())
    return digest.digest()
