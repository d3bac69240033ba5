"""Sphinx configuration; the API pages and the gallery are written from the catalogue."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

from torchzoo.version import __version__

project = "torchzoo"
author = "The torchzoo authors"
copyright = "The torchzoo authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "returns_style"), ("Source", "notes_style")]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torchzoo"
# A name in backticks that several classes have as an attribute is no link.
suppress_warnings = ["myst.header", "ref.python"]


def setup(app):
    app.connect("builder-inited", lambda _: generate.write_all(Path(__file__).parent / "generated"))
