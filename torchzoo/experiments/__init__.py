"""Experiments: each paper's headline claim, scaled down, against a baseline."""
