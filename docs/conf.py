"""How the documentation is built: ``python -m sphinx -W -b html docs docs/_build``, offline."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

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


class Recorded(SphinxDirective):
    """``.. recorded:: KIND`` shows what ``python -m bench KIND`` has left in the docs.

    Tables lie in ``docs/tables/KIND*.rst`` and plots in ``docs/figures/KIND*.svg``. Where nothing
    has been recorded yet, the page says so instead of pretending.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        docs = Path(self.env.srcdir)
        kind = self.arguments[0]
        tables = sorted(docs.glob(f"tables/{kind}*.rst"))
        figures = sorted(docs.glob(f"figures/{kind}*.svg"))
        lines: list[str] = []
        for figure in figures:
            name = re.sub(r"[-_]+", " ", figure.stem)
            lines += [f".. image:: /figures/{figure.name}", f"   :alt: {name}", "   :width: 100%", ""]
        for table in tables:
            self.env.note_dependency(str(table))
            lines += [*table.read_text(encoding="utf-8").splitlines(), ""]
        if not lines:
            lines = [f"Nothing has been recorded yet for ``python -m bench {kind}``."]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    app.add_directive("recorded", Recorded)
