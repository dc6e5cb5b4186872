"""Training loops around the contrastive loss, one technique each: ``python -m clustops.examples.<name>``."""
