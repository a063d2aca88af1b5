"""Seeds that depend only on their purpose."""

import hashlib
import os


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from numbers and names; torch's generators on the CPU use its lower 32 bits.

    The seed is a hash, so that neighbouring steps, epochs or tensors have unrelated random streams. It is the same on every
    machine and after every resume.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def global_seed() -> int:
    """Return the seed that ``seed_everything`` set; 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
