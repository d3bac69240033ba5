"""Data that is there without a network; imported by experiments, notebooks and tests only."""
