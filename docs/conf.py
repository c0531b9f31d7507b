"""How the documentation is built: ``python -m sphinx -W -b html docs docs/_build``, offline."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "cuflash"
author = "cuflash contributors"
copyright = "cuflash contributors"
release = version = installed_version("cuflash")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "tables", "examples", "gallery/*.ipynb"]
default_role = "code"
templates_path: list[str] = []

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters sections say it, with shapes
numpydoc_show_class_members = False
# A name in backticks in a docstring's Returns section is a name, not a target to be found.
numpydoc_xref_param_type = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    # The plot_* scripts run while the pages are built; semantic_search.py, which wants a model's
    # weights, is shown as it stands (and run by its own tests).
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"gallery_pictures\.py",  # a tool, not an example
    "download_all_examples": False,
    "plot_gallery": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "cuflash"
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "install", "start")}  # they have no sections
html_theme_options = {
    "icon_links": [],
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_nav_level": 1,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
