"""Evaluation: programs over the same engine and rewards as training."""
