"""A corpus of any size that costs nothing: made-up words, as often as real ones."""

from __future__ import annotations

import json

import numpy as np
from etils import epath

_WORDS = 4000
_WORDS_OF_A_DOCUMENT = 200
_LETTERS = "etaoinshrdlucmfwypvbgk"


def write(path: epath.Path, documents: int, *, seed: int = 0) -> int:
    """Writes documents of 200 words, a line of JSON each; returns the bytes of text.

    Words are drawn with Zipf's frequencies, so that the length of a document and what
    a tokenizer makes of it do not change with the number of documents. A larger corpus
    begins with the smaller one.

    Args:
      path: a ``.jsonl`` file.
      documents: how many.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 11, _WORDS)
    words = ["".join(rng.choice(list(_LETTERS), n)) for n in lengths]
    weights = 1 / np.arange(1, _WORDS + 1)
    size = 0
    with path.open("w") as file:
        for number in range(documents):
            drawn = rng.choice(_WORDS, _WORDS_OF_A_DOCUMENT, p=weights / weights.sum())
            text = " ".join(words[word] for word in drawn)
            size += len(text)
            row = {"id": f"document {number}", "title": "", "text": text}
            file.write(json.dumps(row) + "\n")
    return size
