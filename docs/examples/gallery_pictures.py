"""The pictures of the gallery of variants (`docs/gallery.rst`), drawn by the page's own code.

    python docs/examples/gallery_pictures.py

The page's examples run as a reader would type them. Each section names a picture, then shows code
that ends with ``picture = ...``: one matrix of weights, or several. They become small SVG files in
`docs/figures`, and files that the page no longer names are removed.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parents[1]
PAGE, FIGURES = DOCS / "gallery.rst", DOCS / "figures"
NAMED = re.compile(r"^\.\. image:: figures/(gallery-[\w-]+\.svg)$", re.MULTILINE)
CELL, GAP, EDGE = 12, 18, 18  # pixels: a square, between two matrices, around them all
INK, GRID, TEXT, PAPER = "#08306b", "#b8b8b8", "#404040", "#ffffff"


def pictures(page: str) -> dict[str, str]:
    """Run a page's examples; return its pictures by their files' names."""
    before, *sections = NAMED.split(page)
    namespace: dict[str, object] = {}
    run(before, namespace)
    drawn = {}
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        namespace.pop("picture", None)
        run(text, namespace)
        drawn[name] = svg(different(np.asarray(namespace["picture"])))
    return drawn


def run(text: str, namespace: dict[str, object]) -> None:
    """Run the examples of a text. Whether they print what they should is for the tests to say."""
    with contextlib.redirect_stdout(io.StringIO()):
        for example in doctest.DocTestParser().get_examples(text):
            exec(compile(example.source, PAGE.name, "single"), namespace)


def different(weights: np.ndarray) -> list[np.ndarray]:
    """The matrices [..., queries, keys], or the first alone if all heads do the same."""
    matrices = list(weights.reshape(-1, *weights.shape[-2:]))
    return matrices[:1] if all(np.array_equal(each, matrices[0]) for each in matrices) else matrices


def svg(matrices: list[np.ndarray]) -> str:
    """Draw matrices of one shape side by side: queries down, keys across."""
    rows, columns = matrices[0].shape
    step = columns * CELL + GAP
    width, height = len(matrices) * step - GAP + 2 * EDGE, rows * CELL + 2 * EDGE
    top = EDGE - 5
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        f'<rect width="{width}" height="{height}" rx="4" fill="{PAPER}"/>',
        f'<g font-family="sans-serif" font-size="10" fill="{TEXT}">',
        f'<text x="{EDGE}" y="{top}">keys</text>',
        f'<text x="{-EDGE}" y="{top}" transform="rotate(-90)" text-anchor="end">queries</text></g>',
        f'<g fill="{INK}" stroke="{GRID}">',
    ]
    for number, matrix in enumerate(matrices):
        lines += squares(matrix, EDGE + number * step, EDGE)
    return "\n".join([*lines, "</g>", "</svg>", ""])


def squares(matrix: np.ndarray, left: int, top: int) -> list[str]:
    """A square for each weight, as dark as its share of the row's largest; hollow for none."""
    largest = np.maximum(matrix.max(axis=-1, keepdims=True), np.finfo(float).tiny)
    paths: dict[float, str] = {}
    for (row, column), share in np.ndenumerate(matrix / largest):
        # What is seen at all is told from what is not. The last digit must not hang on rounding.
        shade = 0 if share == 0 else round(0.12 + 0.88 * share + 1e-6, 2)
        square = f"M{left + column * CELL} {top + row * CELL}h{CELL}v{CELL}h-{CELL}z"
        paths[shade] = paths.get(shade, "") + square
    return [f'<path fill-opacity="{shade:.2f}" d="{paths[shade]}"/>' for shade in sorted(paths)]


def main() -> None:
    drawn = pictures(PAGE.read_text(encoding="utf-8"))
    for old in FIGURES.glob("gallery-*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, text in drawn.items():
        (FIGURES / name).write_text(text, encoding="utf-8")
    print(f"{len(drawn)} pictures in {FIGURES}")


if __name__ == "__main__":
    main()
