"""What the documentation says is true: its examples run and its tables are complete.

Examples are taken from the pages (`docs/**/*.rst`), from README.md and from every docstring of the
package. Each page runs on NumPy in one namespace that starts empty, as if a reader typed it from
the top. An example that needs more than NumPy says so in a comment before it (`.. needs: torch`);
it runs where that is there, and its test is skipped where it is not.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

import cuflash
from cuflash._attention.variants import registry

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"api", "gallery", "_build"}  # by Sphinx; their examples are the docstrings'
PAGES = ["README.md"] + [
    page.relative_to(ROOT).as_posix()
    for page in sorted((ROOT / "docs").rglob("*.rst"))
    if page.relative_to(ROOT / "docs").parts[0] not in GENERATED
]
PUBLIC = sorted(cuflash.__all__)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


# --- the examples of a page ---------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One block of a page: a doctest paragraph, or a block of plain Python."""

    source: str
    line: int  # of the block's first line, counted from 0
    needs: str  # "", or what the fixture `require` knows: "cuda", "torch", "jax"

    @property
    def is_doctest(self) -> bool:
        return self.source.lstrip().startswith(">>>")


def examples(text: str) -> list[Example]:
    """Every Python example of a reStructuredText or Markdown page, in order."""
    lines = text.splitlines()
    found, needs, row = [], "", 0
    while row < len(lines):
        line = lines[row]
        if match := re.fullmatch(r"\s*(?:\.\.|<!--) needs: ([\w-]+?)(?: -->)?", line):
            needs = match[1]
        begin, end = _block(lines, row)
        if end > begin:
            source = textwrap.dedent("\n".join(lines[begin:end]))
            found.append(Example(source, begin, needs))
            needs = ""
        row = max(end, row + 1)
    return found


def _block(lines: list[str], row: int) -> tuple[int, int]:
    """The lines [begin, end) of the example that starts at `row`; empty where none does."""
    line = lines[row]
    if line.lstrip().startswith(">>>"):
        end = _first(lines, row, lambda s: not s.strip())
        return row, end
    if line.strip() == "```python":
        return row + 1, _first(lines, row + 1, lambda s: s.strip() == "```")
    if line.strip() == ".. code-block:: python":
        indent = len(line) - len(line.lstrip())
        begin = _first(lines, row + 1, lambda s: bool(s.strip()) and s.strip()[0] != ":")
        end = _first(lines, begin, lambda s: bool(s.strip()) and len(s) - len(s.lstrip()) <= indent)
        return begin, end
    return row, row


def _first(lines, start, condition) -> int:
    return next((i for i in range(start, len(lines)) if condition(lines[i])), len(lines))


def run(example: Example, page: str, namespace: dict[str, object]) -> None:
    if not example.is_doctest:
        # Blank lines in front, so that a traceback shows the page's own line.
        exec(compile("\n" * example.line + example.source, page, "exec"), namespace)
        return
    parser = doctest.DocTestParser()
    test = parser.get_doctest(example.source + "\n", namespace, page, page, example.line)
    run_doctest(test, namespace)


def run_doctest(test: doctest.DocTest, namespace: dict[str, object]) -> None:
    said: list[str] = []
    test.globs = namespace  # the runner would otherwise keep a copy, and the next block miss it
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append, clear_globs=False)
    assert not said, "\n" + "".join(said)


def page_tests() -> list[tuple[str, str]]:
    """Each page once on NumPy alone, and once more for each library its examples also need."""
    tests = []
    for page in PAGES:
        needs = {example.needs for example in examples((ROOT / page).read_text(encoding="utf-8"))}
        tests += [(page, need) for need in sorted(needs)]
    return tests


@pytest.mark.parametrize(("page", "needs"), page_tests(), ids=lambda value: value or "numpy")
def test_page_examples_run(page, needs, require):
    if needs:
        require(needs)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for example in examples((ROOT / page).read_text(encoding="utf-8")):
        if example.needs in ("", needs):
            run(example, page, namespace)


def test_pages_hold_examples():
    """The reader above finds what is there: a page that lost its examples would pass unseen."""
    total = sum(len(examples((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES)
    assert total >= 40
    plain = ">>> 1 + 1\n2\n\n"
    block = ".. code-block:: python\n   :caption: c\n\n   x = 1\n\n   y\n\nb"
    assert examples("a\n\n" + plain + ".. needs: torch\n" + block) == [
        Example(">>> 1 + 1\n2", 2, ""),
        Example("x = 1\n\ny\n", 9, "torch"),
    ]


# --- docstrings ---------------------------------------------------------------------------------


def modules() -> list[str]:
    return ["cuflash"] + [
        found.name for found in pkgutil.walk_packages(cuflash.__path__, prefix="cuflash.")
    ]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("cuflash"):
            raise
        pytest.skip(f"{name} needs {error.name}")
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={}):
        skipped = [e for e in test.examples if doctest.SKIP in e.options]
        assert not skipped, f"{test.name}: an example that never runs is not an example"
        run_doctest(test, {"__name__": "__main__"})


def sections(docstring: str) -> dict[str, str]:
    """The sections of a numpydoc docstring by title."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section: str) -> list[str]:
    """The names that a Parameters section describes, in order, stars left out."""
    heads = re.findall(r"^(\S.*)$", section, flags=re.MULTILINE)
    return [name.strip(" *\\") for head in heads for name in head.split(":")[0].split(",")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_documented(name):
    function = getattr(cuflash, name)
    docstring = inspect.getdoc(function)
    assert docstring, f"{name} has no docstring"
    found = sections(docstring)
    parameters = list(inspect.signature(function).parameters)
    assert documented(found.get("Parameters", "")) == parameters
    assert ">>> " in found.get("Examples", ""), f"{name} shows no example"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_annotated(name):
    signature = inspect.signature(getattr(cuflash, name))
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare
    assert signature.return_annotation is not signature.empty


def test_api_page_lists_every_public_name():
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    listed = [
        n
        for block in re.findall(r":toctree: api\n(?:\s+:.*\n)*\n((?: +\w+\n)+)", page)
        for n in block.split()
    ]
    assert sorted(listed) == sorted(PUBLIC)


# --- the gallery of variants --------------------------------------------------------------------


def test_gallery_pictures_are_what_the_page_draws():
    """After a change of the page: python docs/examples/gallery_pictures.py."""
    script = ROOT / "docs/examples/gallery_pictures.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.pictures((ROOT / "docs/gallery.rst").read_text(encoding="utf-8"))
    committed = {
        path.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "docs/figures").glob("gallery-*.svg")
    }
    assert sorted(committed) == sorted(drawn)
    assert [name for name in drawn if committed[name] != drawn[name]] == []


def test_gallery_shows_every_keyword():
    page = (ROOT / "docs/gallery.rst").read_text(encoding="utf-8")
    keywords = [entry.keyword for entry in registry.ENTRIES]
    assert [keyword for keyword in keywords if f" {keyword}=" not in page] == []


# --- tables and links ---------------------------------------------------------------------------


def sources() -> list[Path]:
    wanted = [
        p
        for place in ("cuflash", "tests", "bench", "docs", ".ci")
        for p in (ROOT / place).rglob("*")
    ]
    suffixes = {".py", ".cu", ".cuh", ""}
    return [p for p in wanted if p.is_file() and p.suffix in suffixes and "_build" not in p.parts]


def test_environment_table_lists_every_variable():
    page = (ROOT / "docs" / "environment.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^   \* - ``(CUFLASH_[A-Z_]+)``", page, flags=re.MULTILINE)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources()]
    used = {name for text in texts for name in re.findall(r"\bCUFLASH_[A-Z][A-Z_]*[A-Z]\b", text)}
    assert sorted(listed) == sorted(used)


def test_pages_name_files_that_exist():
    named = re.compile(
        r"(?<![\w/<>])((?:cuflash|tests|bench|docs|_attention|_softmax|device|jit)/[\w/.]+\.\w+)"
    )
    missing = [
        f"{page}: {path}"
        for page in PAGES
        for path in named.findall((ROOT / page).read_text(encoding="utf-8"))
        if not (ROOT / path).exists() and not (ROOT / "cuflash" / path).exists()
    ]
    assert missing == []


def test_pages_name_tests_that_exist():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for path, name in re.findall(r"(tests/\w+\.py)::(test_\w+)", text):
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page}: {name}"


def test_pages_select_tests_that_exist():
    """``pytest tests/file.py -k word`` runs something, as long as the name is there."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for path, word in re.findall(r"pytest (tests[\w/.]*)(?: -k (\w+))?$", text, re.MULTILINE):
            files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("*.py"))
            names = [n for f in files for n in re.findall(r"def (test_\w+)", f.read_text("utf-8"))]
            assert [name for name in names if word in name], f"{page}: pytest {path} -k {word}"


def test_readme_points_at_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


@pytest.mark.skipif(
    os.environ.get("CUFLASH_TEST_INSTALLED") != "1",
    reason="a developer may test the checkout itself",
)
def test_the_installed_package_is_tested():
    """With CUFLASH_TEST_INSTALLED=1, as .ci/run sets it, the checkout is not what runs."""
    found = Path(cuflash.__file__).resolve()
    assert found.is_relative_to(Path(sysconfig.get_path("purelib")).resolve())
