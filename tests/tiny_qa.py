"""A small world of facts: passages, questions, and a config that trains in seconds."""

import json

import ml_collections
import tiny_passages

# Spelt letter by letter by the tiny tokenizer: answers of four and five wordpieces.
PEOPLE = ["bado", "kemi", "lufa", "nori", "pesk", "riva", "sumo", "tark"]
PLACES = ["zork", "quem", "vibo", "hasp", "jeld", "mynt", "odab", "wicu"]

SIZES = {
    "vocab_size": 128,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "hidden": 32,
    "title_length": 8,
    "body_length": 32,
    "query_length": 16,
    "max_positions": 64,
    "embed_dim": 8,
    "span_width": 6,
    "span_hidden": 12,
}


def texts():
    return [
        f"{person.title()} was born in {place.title()}, the old town."
        for person, place in zip(PEOPLE, PLACES, strict=True)
    ]


def write_passages(workdir, *, corpus=None, length=32):
    """The facts as WORKDIR/passages; returns the store."""
    found = tiny_passages.documents(
        corpus or texts(), None if corpus else [person.title() for person in PEOPLE]
    )
    tokenizer = tiny_passages.save_tokenizer(workdir / "tokenizer")
    return tiny_passages.write_passages(
        workdir / "passages",
        found,
        tokenizer_json=tokenizer,
        length=length,
        title_length=8,
        validation_fraction=0.0,
    )


def records():
    """One question a fact, one with a regular expression, one that none answers."""
    found = [
        {"id": person, "question": f"born {person}", "answers": [place.title()]}
        for person, place in zip(PEOPLE, PLACES, strict=True)
    ]
    found[1] = {"id": "kemi", "question": "born kemi", "answer_regex": "q[u]em"}
    return [*found, {"id": "none", "question": "born nobody", "answers": ["Atlantis"]}]


def write_questions(path, rows=None):
    lines = [json.dumps(record) for record in rows or records()]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(questions, **changes):
    """A config of fine-tuning from random weights; ``model__tied=True`` changes it."""
    found = ml_collections.ConfigDict(
        {
            "name": "qa",
            "task": "realm_finetune",
            "seed": 0,
            "init": {"bert": "", "run": ""},
            "model": {**SIZES, "tied": False},
            "qa": {
                "questions": str(questions),
                "test": "",
                "holdout": 0.4,
                "beam": 6,
                "read": 3,
                "drop_unanswerable": True,
                "train_documents": False,
                "bm25": False,
                "recall_at": (1, 3),
            },
            "retrieval": {"depth": 1, "index": "exact"},
            "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2},
            "train": {"steps": 6, "batch_size": 8, "log_every": 2},
        }
    )
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (found[section] if section else found)[field] = value
    return found
