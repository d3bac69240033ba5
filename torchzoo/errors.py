"""Errors that mean "the request was wrong", told apart from a defect by the command line."""


class TorchzooError(Exception):
    """A request that can't be served; the message says what came and what was expected."""


class UnknownNameError(TorchzooError, ValueError):
    """A name that the zoo does not have; the message suggests the nearest ones."""


class CatalogueError(TorchzooError, ValueError):
    """A malformed row of the catalogue; the message names the row."""


class WeightsError(TorchzooError, ValueError):
    """Weights that are missing, damaged or don't fit; the message says which and why."""
