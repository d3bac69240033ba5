"""Experiments on activations."""
