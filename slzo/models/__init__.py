"""Loading models and splitting them at a layer."""
