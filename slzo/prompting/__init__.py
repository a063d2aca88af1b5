"""Ask the tuned and the untuned model the same, from a run, a checkpoint or an exported folder."""
