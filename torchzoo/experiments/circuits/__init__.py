"""Experiments on probabilistic circuits."""
