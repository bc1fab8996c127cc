"""Sphinx configuration."""

import prmim_core  # noqa: F401  # fails here, with a clear message, rather than in every API page

project = "prmim"
author = "The prmim authors"
copyright = "2026, The prmim authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "prmim"
html_logo = "images/logo.svg"
html_favicon = "images/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

suppress_warnings = ["ref.python"]  # words of a shape, such as "channels", are no references
napoleon_google_docstring = False
add_module_names = False  # each page names its module once
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc sections say types together with shapes and units
