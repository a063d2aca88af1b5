"""Seeds that depend on what they are for, and on nothing else."""

import hashlib
import os


def derive_seed(*parts: int | str) -> int:
    """63-bit seed from numbers and names.

    A hash, so that neighbouring steps, epochs or tensors have unrelated streams, and the result is the same on every machine
    and after every resume.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def global_seed() -> int:
    """The seed that ``seed_everything`` set; 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
