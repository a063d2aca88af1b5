"""What ``torch.compile`` makes of a module, which has no public name."""

from torch._dynamo import OptimizedModule


def is_compiled(module: object) -> bool:
    """Return whether a module comes from ``torch.compile``, or Lightning has replaced its steps by compiled ones."""
    return isinstance(module, OptimizedModule) or getattr(module, "_compiler_ctx", None) is not None
