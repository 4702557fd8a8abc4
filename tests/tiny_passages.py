"""A small WordPiece tokenizer without unknown letters, and passages made with it."""

import string

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from realm_retro.data import passage_writer
from realm_retro.data.corpus import Document
from realm_retro.data.passages import PassageConfig, PassageStore

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "river", "flows", "through", "old", "town", "green", "field", "born"]
LETTERS = string.ascii_lowercase + string.digits
PIECES = [
    *SPECIAL,
    *WORDS,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *"##ed ##ing ##er".split(),  # noqa: SIM905
    *string.punctuation,
    *"中国人。",
]


def tokenizer(*, normalizer=None):
    """WordPiece over `PIECES`; words that it does not know are spelt."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    found = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.add_special_tokens(SPECIAL)
    found.normalizer = normalizer or normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return found


def save_tokenizer(folder, **options):
    """Writes ``tokenizer.json`` into a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer(**options).save(str(path))
    return path


def documents(texts, titles=None):
    """Documents of the texts, numbered."""
    titles = titles or [f"Title {i}" for i in range(len(texts))]
    return [
        Document(id=f"doc {i}", title=title, text=text)
        for i, (text, title) in enumerate(zip(texts, titles, strict=True))
    ]


def write_passages(directory, corpus, *, tokenizer_json, **settings):
    """Writes and opens the passages of a list of documents."""
    config = PassageConfig(**settings)
    stage = passage_writer.open_stage(
        directory,
        config=config,
        tokenizer=tokenizer_json,
        corpus_fingerprint="c" * 64,
    )
    stage.commit(passage_writer.build(corpus, tokenizer_json, config, stage))
    return PassageStore.open(directory, parents={"corpus": "c" * 64})
