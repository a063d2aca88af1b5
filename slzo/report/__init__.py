"""Report a run: its summary, and one HTML page on a run folder that opens without a network."""
