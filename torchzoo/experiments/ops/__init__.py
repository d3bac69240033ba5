"""Benchmarks of the operators against their peers: cases, contenders and what is asked for."""
