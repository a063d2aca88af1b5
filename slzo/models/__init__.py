"""Loading models and running them in parts."""
