"""What can be done with a run's result, as commands."""

import shlex


def use_commands(checkpoint: str | None, has_config: bool) -> list[str]:
    """The commands for a checkpoint that was scored; none without one.

    Args:
        checkpoint: Its path.
        has_config: Whether the run's folder holds its options; without them no rows are known.
    """
    if checkpoint is None:
        return []
    rows = [("test",), ("predict", "--output", "predictions.jsonl")] if has_config else []
    ways = [*rows, ("export", "--output", "tuned-model"), ("generate", "--prompt", "TEXT")]
    return [shlex.join(["slzo", name, "--ckpt_path", checkpoint, *options]) for name, *options in ways]
