"""People and three facts of each: masks that a passage answers, and masks of colours.

Two documents of each person state the facts in two orders of words. A query is a
sentence of one of them, and only the other tells what is masked in it: no document of
another person does, and nobody could guess. What colour a thing is, no document tells,
and none is needed, for it is always the same.

Untied random towers know nothing of names. What they find is of use by chance, which
is why few documents are searched for many candidates. Facts are many enough that they
are not learned by heart before what is retrieved has been of use.

As a program it trains once and prints what was learned on the way:

  python tests/toy_facts.py FOLDER [seed=1 section.name=value …]
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
from realm_retro.data.chunk_store import TRAIN, VALIDATION
from realm_retro.data.chunk_writer import ChunksConfig, split_of
from realm_retro.data.span_store import SpanStore
from realm_retro.realm import candidates, examples, objective, search

FIRST = ("Ada", "Bodo", "Cleo", "Dario", "Edda", "Falk")
LAST = ("Kran", "Lund", "Moor", "Nagel", "Otte", "Prahl")
TRADES = ("baker", "dyer", "farmer", "glazier", "hatter", "joiner", "mason", "miller")
TRADES += ("painter", "potter", "smith", "weaver")
TOWNS = ("aachen", "bremen", "celle", "emden", "fulda", "goslar", "hameln", "jena")
TOWNS += ("kassel", "mainz", "speyer", "ulm")
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
KINDS = {"Trade": TRADES, "Home": TOWNS, "Coat": COLOURS}
THINGS = ("Coal", "Sky", "Earth", "Grass", "Ash", "Blood", "Snow", "Butter")
SPLITS = {"validation_fraction": 0.5}


def write(folder, *, held_out=9, copies=2, seed=0):
    """The corpus, its annotations and a tokenizer that knows each word.

    Args:
      folder: where to.
      held_out: people that nothing is asked about in training.
      copies: documents of each thing; nothing is asked from the first in training.
      seed: of who is what.
    """
    rng = np.random.default_rng(seed)
    words = [*FIRST, *LAST, *KINDS, *itertools.chain(*KINDS.values())]
    toy.save_tokenizer(folder / "tokenizer", [*words, *THINGS, "is", "always"])
    people = list(itertools.product(FIRST, LAST))
    unasked = set(rng.permutation(len(people))[:held_out].tolist())
    with (
        (folder / "documents.jsonl").open("w") as documents,
        (folder / "spans.jsonl").open("w") as spans,
    ):

        def add(name, split, *sentences):
            # Splits are drawn by id: the first id of this name that is drawn into it.
            name = next(
                tried
                for number in itertools.count()
                if split_of(tried := f"{name} {number}", ChunksConfig(**SPLITS))
                == split
            )
            text = " ".join(sentences)
            print(json.dumps({"id": name, "title": "", "text": text}), file=documents)
            ends = np.cumsum([len(sentence) + 1 for sentence in sentences]) - 2
            masked = [sentence.split()[-1][:-1] for sentence in sentences]
            found = [
                [int(end) - len(mask), int(end)]
                for end, mask in zip(ends, masked, strict=True)
            ]
            print(json.dumps({"id": name, "spans": found}), file=spans)

        for i, who in enumerate(" ".join(names) for names in people):
            split = VALIDATION if i in unasked else TRAIN
            facts = {kind: rng.choice(known) for kind, known in KINDS.items()}
            for style, order in (("kind", "{0} {1}"), ("name", "{1} {0}")):
                sentences = (
                    f"{order.format(kind, who)} {fact}." for kind, fact in facts.items()
                )
                add(f"{style} {who}", split, *sentences)
        for thing, colour in zip(THINGS, COLOURS, strict=True):
            for copy in range(copies):
                add(
                    f"thing {thing} {copy}",
                    VALIDATION if copy == 0 else TRAIN,
                    f"{thing} is always {colour}.",
                )


def make_config(folder, **sections):
    """The config of the training; towers start from nothing."""
    config = toy.make_config(
        folder,
        passages={"length": 15, "title_length": 1, **SPLITS},
        spans={"tagger": "annotations", "path": str(folder / "spans.jsonl")},
        model={
            "width": 64,
            "num_layers": 1,
            "num_heads": 4,
            "hidden": 32,
            "title_length": 1,
            "body_length": 15,
            "query_length": 5,
            "embed_dim": 32,
            "pooling": "mean",
            "projection_norm": False,
            "normalise": True,
            "score_scale": 8.0,
            "candidates": 16,
            "max_masks": 1,
            "dropout": 0.0,
        },
        refresh={"every": 20, "shard_rows": 1024},
        optimizer={"peak_learning_rate": 2e-3, "warmup_steps": 50},
        train={
            "steps": 1000,
            "batch_size": 16,
            "log_every": 50,
            "checkpoint_every": 1000,
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
      recall: share whose person's other document is among the five best candidates.
      chance: the same for candidates drawn at random.
      null: mean p(∅ | x), with k candidates.
      gain: mean log p(y | x) − log p(y | ∅, x).
    """

    recall: float
    chance: float
    null: float
    gain: float


def evaluate(config, workdir, params, *, things=False, split=VALIDATION, times=4):
    """Asks several times from the documents of people, or things, in `split`."""
    realm, store = towers.model_config(config), towers.open_store(config, workdir)
    spans = SpanStore.open(workdir / "spans")
    names = [store.document_id(d).split() for d in store.document[:].tolist()]
    wanted = [(name[0] == "thing") == things for name in names]
    rows = np.intersect1d(np.flatnonzero(wanted), store.passages_of(split))
    rows = np.repeat(rows, times)
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
    best = candidates.choose(
        search.build_index(vectors).search(queries, len(store)).ids,
        store,
        rows=rows,
        queries=batch["original"],
        lengths=batch["query_len"],
        wanted=max(5, realm.candidates - 1),
        copied=0.8,
    ).ids
    metrics = objective_of(
        realm,
        params,
        batch,
        candidates.assemble(best[:, : realm.candidates - 1], store, realm),
    )
    answers = np.array([_other(names, row) for row in rows])
    return Found(
        recall=float((best[:, :5] == answers[:, None]).any(1).mean()),
        chance=5 / (len(store) - 1),
        null=metrics["null_prior"],
        gain=metrics["gain"],
    )


def _other(names, row):
    """The other document of the person that `row` is about; −2 for a thing."""
    style, first, last, _ = names[row]
    if style == "thing":
        return -2
    return next(
        i
        for i, name in enumerate(names)
        if name[0] != style and name[1:3] == [first, last]
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
        section, _, field = name.partition(".")
        if field:
            sections.setdefault(section, {})[field] = ast.literal_eval(value)
        else:
            sections[section] = ast.literal_eval(value)
    write(folder)
    config = make_config(folder, **sections)
    workdir = toy.prepared(config, epath.Path(folder / "work"))
    began = time.perf_counter()

    def hook(at):
        if at.step % 100:
            return
        held, old, things = (
            evaluate(config, workdir, at.state.params, **which)
            for which in ({}, {"split": TRAIN}, {"things": True})
        )
        print(
            f"{at.step:5d} {time.perf_counter() - began:4.0f}s"
            f" recall held {held.recall:.2f} trained {old.recall:.2f}"
            f" chance {held.chance:.2f} gain {held.gain:.2f}"
            f" null {held.null:.3f} things {things.null:.3f}",
            flush=True,
        )

    toy.train(config, workdir, hook)
    for record in toy.records(config, workdir)[::4]:
        names = ("step", "loss", "null_mlm", "gain", "null_prior", "grad_norm")
        print({name: round(record[name], 3) for name in names})


if __name__ == "__main__":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    main(*sys.argv[1:])
