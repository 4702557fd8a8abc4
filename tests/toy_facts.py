"""People, their trades and towns: masks that a passage answers, and masks of days.

One document of each person states both facts; nobody is asked from it. A sentence of
each person holds one of them, which is masked: only the person's document tells it.
Sentences about days of the week tell themselves what is masked in them.

As a program it trains once and prints what was learned on the way:

  python tests/toy_facts.py FOLDER [section.name=value …]
"""

import ast
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import toy_pretraining as toy
from etils import epath

from realm_retro.cli import towers
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION
from realm_retro.data.chunk_writer import ChunksConfig, split_of
from realm_retro.data.span_store import SpanStore
from realm_retro.realm import candidates, examples, objective, search

FIRST = ("ada", "bodo", "cleo", "dario", "edda", "falk", "gesa")
LAST = ("kran", "lund", "moor", "nagel", "otte", "prahl", "quast")
TRADES = ("baker", "dyer", "farmer", "glazier", "hatter", "joiner", "mason", "miller")
TRADES += ("painter", "potter", "smith", "weaver")
TOWNS = ("aachen", "bremen", "celle", "emden", "fulda", "goslar", "hameln", "jena")
TOWNS += ("kassel", "mainz", "speyer", "ulm")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
OTHER = ("trade", "home", "after", "comes")
SPLITS = {"validation_fraction": 0.3, "train_fraction": 0.5}


def write(folder, *, held_out=0.25, copies=2, seed=0):
    """The corpus, its annotations and a tokenizer that knows each word."""
    rng = np.random.default_rng(seed)
    toy.save_tokenizer(
        folder / "tokenizer", [*FIRST, *LAST, *TRADES, *TOWNS, *DAYS, *OTHER]
    )
    with (
        (folder / "documents.jsonl").open("w") as documents,
        (folder / "spans.jsonl").open("w") as spans,
    ):

        def add(kind, about, text, split, mask=None):
            name = next(
                name
                for number in itertools.count()
                if split_of(name := f"{kind} {about} {number}", ChunksConfig(**SPLITS))
                == split
            )
            print(json.dumps({"id": name, "title": "", "text": text}), file=documents)
            if mask:
                start = text.rindex(mask)
                found = [[start, start + len(mask)]]
                print(json.dumps({"id": name, "spans": found}), file=spans)

        for first, last in itertools.product(FIRST, LAST):
            trade, town = rng.choice(TRADES), rng.choice(TOWNS)
            who = f"{first} {last}"
            split = VALIDATION if rng.random() < held_out else TRAIN
            add("fact", who, f"{who} {trade} {town}.", DATABASE)
            kind, fact = (("trade", trade), ("home", town))[rng.integers(2)]
            add(kind, who, f"{kind} {who} {fact}.", split, fact)
        for (day, after), copy in itertools.product(
            zip(DAYS, DAYS[1:] + DAYS[:1], strict=True), range(copies)
        ):
            split = VALIDATION if copy == 0 else TRAIN
            text = f"after {day} comes {after}."
            add("day", f"{day} {copy}", text, split, after)


def make_config(folder, **sections):
    """The config of the training; towers start from nothing."""
    config = toy.make_config(
        folder,
        passages={"length": 6, "title_length": 1, **SPLITS},
        spans={"tagger": "annotations", "path": str(folder / "spans.jsonl")},
        model={
            "width": 64,
            "num_layers": 2,
            "num_heads": 4,
            "hidden": 128,
            "title_length": 1,
            "body_length": 6,
            "query_length": 6,
            "embed_dim": 32,
            "pooling": "mean",
            "projection_norm": False,
            "normalise": True,
            "score_scale": 8.0,
            "candidates": 16,
            "max_masks": 2,
            "dropout": 0.0,
        },
        refresh={"every": 20, "shard_rows": 1024},
        optimizer={"peak_learning_rate": 2e-3, "warmup_steps": 50},
        train={
            "steps": 1200,
            "batch_size": 16,
            "log_every": 50,
            "checkpoint_every": 600,
        },
    )
    return toy.changed(config, **sections)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The batches of an `Examples` that asks from given passages, once each."""

    rows: np.ndarray

    def __getitem__(self, step):
        return {"row": self.rows}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a model does with a group of masked sentences.

    Attributes:
      recall: share whose person's document is among the five best candidates.
      chance: the same for candidates drawn at random.
      null: mean p(∅ | x), with k candidates.
      gain: mean log p(y | x) − log p(y | ∅, x).
    """

    recall: float
    chance: float
    null: float
    gain: float


def evaluate(config, workdir, params, *, kinds=("trade", "home"), split=VALIDATION):
    """Asks from the sentences of some kinds that are in `split`."""
    realm, store = towers.model_config(config), towers.open_store(config, workdir)
    spans = SpanStore.open(workdir / "spans")
    ids = [store.document_id(d).split() for d in store.document[:].tolist()]
    wanted = [ids[row][0] in kinds for row in range(len(store))]
    rows = np.intersect1d(np.flatnonzero(wanted), store.passages_of(split))
    made = examples.make(
        store, spans, realm, masking="salient", seed=1, batch_size=len(rows)
    )
    batch = dataclasses.replace(made, batches=Asked(rows))(0)

    arrays = search.tower_arrays(realm, params)
    embed = search.passage_embedder(realm, store)
    vectors = embed({name: np.asarray(x) for name, x in arrays.items()})(0, len(store))
    queries = search.embed_all_queries(
        realm, params, batch["query"], batch["query_len"]
    )
    hits = search.build_index(vectors).search(queries, min(64, len(store)))
    best = candidates.choose(
        hits.ids,
        store,
        rows=rows,
        queries=batch["original"],
        lengths=batch["query_len"],
        wanted=max(5, realm.candidates - 1),
        copied=0.8,
    ).ids
    facts = {tuple(name[1:3]): row for row, name in enumerate(ids) if name[0] == "fact"}
    answers = np.array([facts.get(tuple(ids[row][1:3]), -2) for row in rows])
    metrics = objective_of(
        realm,
        params,
        batch,
        candidates.assemble(best[:, : realm.candidates - 1], store, realm),
    )
    return Found(
        recall=float((best[:, :5] == answers[:, None]).any(1).mean()),
        chance=5 / (len(store) - 1),
        null=metrics["null_prior"],
        gain=metrics["gain"],
    )


def objective_of(realm, params, batch, found):
    """The means of the loss's metrics."""
    whole = {**batch, **found}
    whole = {name: whole[name] for name in objective.BATCH_SPEC}
    loss = jax.jit(lambda p, b: objective.pretrain_loss(realm, p, b, None)[2])
    return {name: float(s / w) for name, (s, w) in loss(params, whole).items()}


def main(folder, *overrides):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = {}
    for word in overrides:
        name, value = word.split("=")
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = ast.literal_eval(value)
    write(folder)
    config = make_config(folder, **sections)
    workdir = toy.prepared(config, epath.Path(folder / "work"))
    began = time.perf_counter()

    def hook(at):
        if at.step % 200:
            return
        held, old, days = (
            evaluate(config, workdir, at.state.params, **which)
            for which in ({}, {"split": TRAIN}, {"kinds": ("day",)})
        )
        print(
            f"{at.step:5d} {time.perf_counter() - began:4.0f}s"
            f" recall held {held.recall:.2f} trained {old.recall:.2f}"
            f" chance {held.chance:.2f} gain {held.gain:.2f}"
            f" null {held.null:.3f} days {days.null:.3f}",
            flush=True,
        )

    toy.train(config, workdir, hook)
    for record in toy.records(config, workdir)[::4]:
        names = ("step", "loss", "null_mlm", "gain", "null_prior", "grad_norm")
        print({name: round(record[name], 3) for name in names})


if __name__ == "__main__":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    main(*sys.argv[1:])
