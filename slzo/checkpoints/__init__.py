"""Checkpoints and the log of steps: their formats, whole files only."""
