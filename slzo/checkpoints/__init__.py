"""Checkpoints and the log of steps: their file formats, and how they are read and written."""
