"""Plugins of the test suite: the claim ledger, and pytester for the tests of it."""

pytest_plugins = ["torchzoo.testing.ledger", "pytester"]
