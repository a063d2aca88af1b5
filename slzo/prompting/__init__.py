"""Prompt the tuned and the untuned model with the same texts, from a run, a checkpoint or an exported folder."""
