"""Sphinx: the pages of this folder, and the reference from the docstrings. `make docs` writes site/."""

import re

import parloop

project = "parloop"
author = "The parloop maintainers"
version = release = parloop.__version__
REPOSITORY = "https://github.com/parloop/parloop"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "parloop"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True


def link_to_repository(app, document, source):
    """Links to files of the repository that are not pages lead to GitHub."""
    up = re.escape("../" * (document.count("/") + 1))
    source[0] = re.sub(rf"\]\({up}(?!\.\.)([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", source[0])


def setup(app):
    app.connect("source-read", link_to_repository)
