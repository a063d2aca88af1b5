"""What a run folder holds as one page that opens without a network; no torch here."""
