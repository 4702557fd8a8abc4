"""People and what each one likes: masks that a passage answers, and others.

Two documents of each person state the fact in two orders of words. A query is one of
them with the fact masked, and only the other tells it. What colour a thing is, no
document tells, and none is needed, for it is always the same.

The knowledge-augmented encoder has learned to read before, as the paper's has (it
starts from BERT): `learn_to_read` shows it facts that are drawn anew for each batch, so
that it copies what a document says and knows nothing by heart. Both towers start from
random weights: which document is about whom, they are told by the marginal likelihood
alone.

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
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import candidates, examples, model, objective, search
from realm_retro.realm.config import MASK_ID
from realm_retro.text import wordpiece
from realm_retro.train import loop
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Recipe


def _words(starts, ends):
    return tuple(start + end for start in starts for end in ends)


FIRST = _words(("ba", "ce", "di", "fo"), ("la", "ne", "ri"))
LAST = _words(("gu", "ha", "je", "ki"), ("mos", "nak", "pel"))
LIKES = _words("bdfgklmnprst", ("ango", "erry", "olka", "usti"))
THINGS = _words(("co", "gra", "sno", "sky"), ("al", "ss"))
COLOURS = _words(("red", "blue"), ("dark", "pale", "deep", "fair"))
STYLES = {"name": "{} {} likes {}.", "verb": "likes {} {} {}."}
THING = "{} is always {}."
SPLITS = {"validation_fraction": 0.5}
READER = "reader"  # the run that learns to read


def write(folder, *, held_out=36, copies=2, seed=0):
    """The corpus, its annotations and a tokenizer that knows each word.

    Args:
      folder: where to.
      held_out: people that nothing is asked about in training.
      copies: documents of each thing; nothing is asked from the first in training.
      seed: of who likes what.
    """
    rng = np.random.default_rng(seed)
    words = (*FIRST, *LAST, *LIKES, *THINGS, *COLOURS, "likes", "is", "always")
    toy.save_tokenizer(folder / "tokenizer", words)
    people = list(itertools.product(FIRST, LAST))
    liked = rng.choice(LIKES, len(people))
    unasked = set(rng.permutation(len(people))[:held_out].tolist())
    with (
        (folder / "documents.jsonl").open("w") as documents,
        (folder / "spans.jsonl").open("w") as spans,
    ):

        def add(name, split, text):
            # Splits are drawn by id: the first id of this name that is drawn into it.
            name = next(
                tried
                for number in itertools.count()
                if split_of(tried := f"{name} {number}", ChunksConfig(**SPLITS))
                == split
            )
            print(json.dumps({"id": name, "title": "", "text": text}), file=documents)
            span = [text.rindex(" ") + 1, len(text) - 1]
            print(json.dumps({"id": name, "spans": [span]}), file=spans)

        for i, who in enumerate(people):
            split = VALIDATION if i in unasked else TRAIN
            for style, sentence in STYLES.items():
                add(f"{style} {' '.join(who)}", split, sentence.format(*who, liked[i]))
        for thing, colour in zip(THINGS, COLOURS, strict=True):
            for copy in range(copies):
                split = VALIDATION if copy == 0 else TRAIN
                add(f"thing {thing} {copy}", split, THING.format(thing, colour))


def make_config(folder, **sections):
    """The config of the training; the encoder can read, towers start from nothing."""
    config = toy.make_config(
        folder,
        passages={"length": 5, "title_length": 1, **SPLITS},
        spans={"tagger": "annotations", "path": str(folder / "spans.jsonl")},
        init={"bert": "", "run": READER},
        model={
            "width": 64,
            "num_layers": 1,
            "num_heads": 4,
            "hidden": 64,
            "title_length": 1,
            "body_length": 5,
            "query_length": 5,
            "max_positions": 16,
            "embed_dim": 32,
            "pooling": "mean",
            "projection_norm": False,
            "normalise": True,
            "score_scale": 8.0,
            "candidates": 24,
            "max_masks": 1,
            "dropout": 0.0,
        },
        refresh={"every": 20, "shard_rows": 1024},
        optimizer={"peak_learning_rate": 2e-3, "warmup_steps": 50},
        train={
            "steps": 600,
            "batch_size": 32,
            "log_every": 20,
            "checkpoint_every": 600,
        },
    )
    return toy.changed(config, **sections)


def learn_to_read(config, folder, workdir, *, steps=400, rows=128):
    """Trains the encoder alone, as run `READER`, on facts drawn anew each time.

    Candidates are the null document and one other: of a person it states the fact in
    the other order of words; of a thing it is about somebody, and of no use.
    """
    realm = towers.model_config(config)
    tokenizer = wordpiece.load_tokenizer(epath.Path(folder / "tokenizer"))

    def ids(texts):
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.array([one.ids for one in found], np.int32)

    def batch_at(step):
        rng = np.random.default_rng((1, step))
        asked, read = [], []
        for _ in range(rows):
            fact = (*(rng.choice(words) for words in (FIRST, LAST, LIKES)),)
            styles = rng.permutation(list(STYLES.values()))
            which = rng.integers(len(THINGS))
            about_thing = rng.random() < 0.25
            thing = THING.format(THINGS[which], COLOURS[which])
            asked.append(thing if about_thing else styles[0].format(*fact))
            read.append(styles[1].format(*fact))
        query, body = ids(asked), ids(read)
        place = query.shape[1] - 2  # the last word, before the full stop
        targets = query[:, place].copy()
        query[:, place] = MASK_ID
        length = np.full(rows, query.shape[1], np.int32)
        return {
            "query": query,
            "query_len": length,
            "mask_positions": np.full((rows, 1), place, np.int32),
            "targets": targets[:, None],
            "target_mask": np.ones((rows, 1), bool),
            "body": np.stack([np.zeros_like(body), body], axis=1),
            "body_len": np.stack([np.zeros_like(length), length], axis=1),
        }

    def loss(params, batch, key):
        log_probs = objective.target_log_probs(realm, params, batch)
        weight = np.float32(log_probs.size)
        return -log_probs.sum(), weight, {}

    recipe = Recipe(
        description="an encoder that learns to read",
        init=lambda key: model.init(realm, key, ("encoder",)),
        loss=loss,
        batch_at=batch_at,
        batch_spec={name: objective.BATCH_SPEC[name] for name in batch_at(0)},
        tokens_per_step=2 * rows * realm.joint_tokens,
        flops_per_step=0,
        fingerprint="facts",
    )
    return loop.train(
        recipe,
        workdir / "runs" / READER,
        config=TrainConfig(
            steps, batch_size=rows, log_every=100, checkpoint_every=steps
        ),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=50),
        mesh=make_mesh(devices=jax.devices()[:1]),
        seed=config.seed,
        settings={},
        report=lambda line: None,
    )


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
      null_mlm: mean −log p(y | ∅, x).
      gain: mean log p(y | x) − log p(y | ∅, x).
    """

    recall: float
    chance: float
    null: float
    null_mlm: float
    gain: float


def evaluate(config, workdir, params, *, things=False, split=VALIDATION):
    """Asks once from each document of a person, or of a thing, in `split`."""
    realm, store = towers.model_config(config), towers.open_store(config, workdir)
    spans = SpanStore.open(workdir / "spans")
    names = [store.document_id(d).split() for d in store.document[:].tolist()]
    wanted = [(name[0] == "thing") == things for name in names]
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
    best = candidates.choose(
        search.build_index(vectors).search(queries, len(store)).ids,
        store,
        rows=rows,
        queries=batch["original"],
        lengths=batch["query_len"],
        wanted=realm.candidates - 1,
        copied=0.8,
    ).ids
    metrics = objective_of(
        realm, params, batch, candidates.assemble(best, store, realm)
    )
    answers = np.array([_other(names, row) for row in rows])
    return Found(
        recall=float((best[:, :5] == answers[:, None]).any(1).mean()),
        chance=5 / (len(store) - 1),
        null=metrics["null_prior"],
        null_mlm=metrics["null_mlm"],
        gain=metrics["gain"],
    )


def _other(names, row):
    """The other document of the person that `row` is about; −2 for a thing."""
    style, first, last, *_ = names[row]
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
    learn_to_read(config, folder, workdir)
    print(f"can read after {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()

    def hook(at):
        if at.step % 50:
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
