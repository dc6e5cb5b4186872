"""Training loops around one op, one technique or one trainer each: ``python -m clustops.examples.<name>``."""
