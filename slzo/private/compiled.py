"""What ``torch.compile`` makes of a module, which has no public name."""


def is_compiled(module: object) -> bool:
    """Return whether a module comes from ``torch.compile``, or Lightning has replaced its steps by compiled ones."""
    # importing the class takes a second
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiler_ctx", None) is not None
