"""People and what each one likes: masks that a passage answers, and others.

Three documents of each person state the fact, each among words of its own that mean
nothing. A query is one of them with the fact masked, and only the others tell it; what
they have in common is the name, which counts for little among so many other words until
the towers have learned to look at it. Nothing is asked from the third in training: it
makes the questions of the evaluation. What colour a thing is, no other document tells,
and none is needed, for it is always the same.

The knowledge-augmented encoder has learned to read before, as the paper's has (it
starts from BERT): `learn_to_read` shows it facts that are drawn anew for each batch, so
that it copies what a document says and knows nothing by heart. The towers start from
random weights: what makes a document worth finding, they are told by the marginal
likelihood alone.

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


NAMES = _words(
    _words("bdf", "aei"),
    (
        "bar",
        "den",
        "fix",
        "gol",
        "hun",
        "kam",
        "lis",
        "mox",
        "nep",
        "rod",
        "tul",
        "vay",
    ),
)
FILLERS = _words(
    ("al", "be", "cor", "du", "em", "fal", "gre", "hy"),
    ("way", "ton", "mer", "sip", "zel"),
)
LIKES = _words("bdfgklmnprst", ("ango", "erry", "olka", "usti"))
THINGS = _words(("co", "gra", "sno", "sky"), ("al", "ss"))
COLOURS = _words(("red", "blue"), ("dark", "pale", "deep", "fair"))
VOCAB_SIZE = 512
LENGTH = 12  # of a sentence about a person; those about things are shorter
COPIES = 4  # sentences about each thing, which make one document
SPLITS = {"validation_fraction": 0.5}
READER = "reader"  # the run that learns to read


def about_person(rng, name, liked, style):
    """A sentence with the name first (style 0) or behind the fillers (1)."""
    filling = " ".join(rng.choice(FILLERS, LENGTH - 4, replace=False))
    return " ".join(
        [*(name, filling)[:: 1 - 2 * style], f"likes {liked}."]
    ).capitalize()


def about_thing(rng, which, style):
    """The same of a thing, with fewer fillers."""
    filling = " ".join(rng.choice(FILLERS, LENGTH - 8, replace=False))
    parts = (THINGS[which], filling)[:: 1 - 2 * style]
    return " ".join([*parts, f"is {COLOURS[which]}."]).capitalize()


def write(folder, *, seed=0):
    """The corpus, its annotations and a tokenizer that knows each word.

    Args:
      folder: where to.
      seed: of who likes what, and of the fillers.
    """
    rng = np.random.default_rng(seed)
    words = (*NAMES, *FILLERS, *LIKES, *THINGS, *COLOURS, "likes", "is")
    toy.save_tokenizer(folder / "tokenizer", words, size=VOCAB_SIZE)
    liked = rng.choice(LIKES, len(NAMES))
    with (
        (folder / "documents.jsonl").open("w") as documents,
        (folder / "spans.jsonl").open("w") as spans,
    ):

        def add(name, split, sentences):
            # Splits are drawn by id: the first id of this name that is drawn into it.
            name = next(
                tried
                for number in itertools.count()
                if split_of(tried := f"{name} {number}", ChunksConfig(**SPLITS))
                == split
            )
            text, masked = "", []
            for sentence in sentences:
                text += f" {sentence}" if text else sentence
                masked.append([text.rindex(" ") + 1, len(text) - 1])
            print(json.dumps({"id": name, "title": "", "text": text}), file=documents)
            print(json.dumps({"id": name, "spans": masked}), file=spans)

        for i, name in enumerate(NAMES):
            for number, split in enumerate((TRAIN, TRAIN, VALIDATION)):
                style = (i + number) % 2
                sentence = about_person(rng, name, liked[i], style)
                add(f"person {name} {number}", split, [sentence])
        for which, thing in enumerate(THINGS):
            copies = [about_thing(rng, which, copy % 2) for copy in range(COPIES)]
            add(f"thing {thing} 0", TRAIN, copies)


def make_config(folder, **sections):
    """The config of the training; the encoder can read, towers start from nothing."""
    config = toy.make_config(
        folder,
        passages={"length": LENGTH, "title_length": 1, **SPLITS},
        spans={"tagger": "annotations", "path": str(folder / "spans.jsonl")},
        init={"bert": "", "run": READER},
        model={
            "vocab_size": VOCAB_SIZE,
            "width": 64,
            "num_layers": 1,
            "num_heads": 4,
            "hidden": 64,
            "title_length": 1,
            "body_length": LENGTH,
            "query_length": LENGTH,
            "max_positions": 2 * LENGTH + 8,
            "embed_dim": 32,
            "pooling": "mean",
            "projection_norm": False,
            "normalise": True,
            "score_scale": 4.0,
            "tied": True,
            "candidates": 32,
            "max_masks": 1,
            "dropout": 0.0,
        },
        refresh={"every": 20, "shard_rows": 1024},
        optimizer={"peak_learning_rate": 1e-3, "warmup_steps": 50},
        train={
            "steps": 200,
            "batch_size": 24,
            "log_every": 10,
            "checkpoint_every": 200,
        },
    )
    return toy.changed(config, **sections)


def learn_to_read(config, folder, workdir, *, steps=400, rows=128):
    """Trains the encoder alone, as run `READER`, on facts drawn anew each time.

    What a person likes is read from another sentence about them, and guessed from the
    null document; a thing's colour is learned from the null document alone.
    """
    realm = towers.model_config(config)
    tokenizer = wordpiece.load_tokenizer(
        epath.Path(folder / "tokenizer" / "tokenizer.json")
    )

    def ids(texts):
        rows = np.zeros((len(texts), LENGTH), np.int32)
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for row, one in zip(rows, found, strict=True):
            row[: len(one.ids)] = one.ids
        return rows, (rows > 0).sum(1).astype(np.int32)

    def batch_at(step):
        rng = np.random.default_rng((1, step))
        asked, read, useful = [], [], rng.random(rows) >= 0.25
        for row in range(rows):
            style = int(rng.integers(2))
            fact = rng.choice(NAMES), rng.choice(LIKES)
            read.append(about_person(rng, *fact, 1 - style))
            thing = int(rng.integers(len(THINGS)))
            person = about_person(rng, *fact, style)
            asked.append(person if useful[row] else about_thing(rng, thing, style))
        (query, length), (body, body_length) = ids(asked), ids(read)
        every, place = np.arange(rows), length - 2  # before the full stop
        targets = query[every, place].copy()
        query[every, place] = MASK_ID
        none = np.zeros_like
        return {
            "query": query,
            "query_len": length,
            "mask_positions": place[:, None],
            "targets": targets[:, None],
            "target_mask": np.ones((rows, 1), bool),
            "body": np.stack([none(body), body], axis=1),
            "body_len": np.stack([none(body_length), body_length], axis=1),
            "valid": np.stack([np.ones(rows, bool), useful], axis=1),
        }

    def loss(params, batch, key):
        log_probs = objective.target_log_probs(realm, params, batch)[..., 0]
        useful = batch["valid"]
        return -(log_probs * useful).sum(), useful.sum().astype(np.float32), {}

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
        report=print if __name__ == "__main__" else lambda line: None,
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
      recall: share that have a document of the same person among the five best.
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
    """Asks once from each passage about a person, or about a thing, in `split`."""
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
    about = np.array([" ".join(name[:2]) for name in names])
    helps = (about[best[:, :5]] == about[rows][:, None]) & (best[:, :5] >= 0)
    return Found(
        recall=float(helps.any(1).mean()),
        chance=1 - (1 - 2 / (len(store) - 1)) ** 5,
        null=metrics["null_prior"],
        null_mlm=metrics["null_mlm"],
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

    def show(step, params):
        held, old, things = (
            evaluate(config, workdir, params, **which)
            for which in ({}, {"split": TRAIN}, {"things": True, "split": TRAIN})
        )
        print(
            f"{step:5d} {time.perf_counter() - began:4.0f}s"
            f" recall held {held.recall:.2f} trained {old.recall:.2f}"
            f" chance {held.chance:.2f} gain {held.gain:.2f}"
            f" null {held.null:.3f} things {things.null:.3f}",
            flush=True,
        )

    def hook(at):
        if at.step % 50 == 0:
            show(at.step, at.state.params)

    show(0, towers.start_params(config, workdir))
    toy.train(config, workdir, hook)
    for record in toy.records(config, workdir)[::4]:
        names = ("step", "loss", "null_mlm", "gain", "null_prior", "grad_norm")
        print({name: round(record[name], 3) for name in names})


if __name__ == "__main__":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    main(*sys.argv[1:])
