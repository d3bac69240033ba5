"""Experiments of the splatting family."""
