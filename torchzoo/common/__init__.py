"""Plain functions that at least two families use."""
