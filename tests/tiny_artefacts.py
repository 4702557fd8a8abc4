"""Every kind of artefact, small and real, in one workdir; and what opens each."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import tiny_qa
import tiny_realm
import tiny_workdir
import toy_refresh
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import write_npy
from realm_retro.data import answer_store, corpus, datasets, questions, span_store
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.data.corpus import CorpusConfig
from realm_retro.data.passages import PassageStore
from realm_retro.data.span_store import SpanStore
from realm_retro.interop import realm, weights
from realm_retro.retrieval import neighbours, refresh
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import probe, store
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex, ScannParameters
from realm_retro.retrieval.neighbours import NeighboursConfig, NeighbourTable

STEP = 100
_STEP_NAME = f"step-{STEP:08d}"


@dataclasses.dataclass(frozen=True)
class Artefact:
    """One kind.

    Attributes:
      kind: as its manifest names it.
      directory: in the workdir.
      write: (workdir, seed) → None; needs what stands before it in `ARTEFACTS`.
      open: workdir → whatever its readers have of it, read whole; with the parents
        that they demand.
    """

    kind: str
    directory: str
    write: Callable
    open: Callable


def write_corpus(workdir, seed):
    path = workdir / f"documents-{seed}.jsonl"
    rows = [{"text": f"The river {i} of {seed}. " * 3} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CorpusConfig(source="text_files", path=str(path))
    stage = corpus.open_stage(config, workdir / "corpus")
    stage.commit(datasets.build(config, stage).as_meta())


def open_corpus(workdir):
    found = datasets.open_corpus(workdir / "corpus")
    return [found[row] for row in range(len(found))]


def write_chunks(workdir, seed):
    tiny_workdir.write_chunks(workdir / "chunks", documents=24 + seed)


def write_embeddings(workdir, seed):
    rows = len(ChunkStore.open(workdir / "chunks"))
    tiny_workdir.write_embeddings(
        workdir, vectors=tiny_workdir.clustered(rows, seed=seed)
    )


def parents_in(workdir, *names):
    """Fingerprints of artefacts, by name, as their manifests state them."""
    found = {}
    for name in names:
        body = (workdir / name / artifacts.MANIFEST).read_text()
        found[name] = json.loads(body)["fingerprint"]
    return found


def open_embeddings(workdir):
    parents = parents_in(workdir, "chunks")
    return Embeddings.open(workdir / "embeddings", parents=parents)


def _index_stage(workdir, folder, vectors):
    return artifacts.Stage.open(
        workdir / folder,
        kind=store.KIND,
        format_version=store.FORMAT_VERSION,
        config={"backend": folder},
        parents={"embeddings": vectors.fingerprint},
        made_by=store.MADE_BY,
    )


def write_exact(workdir, seed):
    vectors = open_embeddings(workdir)
    ids = np.arange(len(vectors))
    index = ExactIndex.build(vectors.vectors[:], ids, metric="squared_l2")
    store.save(index, _index_stage(workdir, "index", vectors), {})


def write_scann(workdir, seed):
    vectors = open_embeddings(workdir)
    index = ScannIndex.build(
        vectors.vectors[:],
        np.arange(len(vectors)),
        metric="squared_l2",
        parameters=ScannParameters(
            num_leaves=4, leaves_to_search=2, reorder=20, tuned_k=5
        ),
    )
    store.save(index, _index_stage(workdir, "scann_index", vectors), {})


def opened_index(folder):
    def read(workdir):
        parents = parents_in(workdir, "embeddings")
        index = store.load(store.load_manifest(workdir / folder, parents=parents))
        return index.ids, index.describe()

    return read


def write_neighbours(workdir, seed):
    chunks, vectors = ChunkStore.open(workdir / "chunks"), open_embeddings(workdir)
    config = NeighboursConfig(k=2, shard_size=len(chunks) // 2 + 1)
    stage = neighbours.open_stage(
        workdir / "neighbours",
        config=config,
        parents={"chunks": chunks.fingerprint, "embeddings": vectors.fingerprint},
    )
    rng = np.random.default_rng(seed)
    for shard in range(2):
        rows = min(config.shard_size, len(chunks) - shard * config.shard_size)
        ids = rng.integers(len(chunks), size=(rows, 2))
        for part, array in (("ids", ids), ("scores", ids.astype(np.float32))):
            with stage.write(neighbours.shard_name(part, shard, 2)) as path:
                write_npy(path, array)
    stage.commit({"num_shards": 2})


def open_neighbours(workdir):
    parents = parents_in(workdir, "chunks")
    return NeighbourTable.open(workdir / "neighbours", parents=parents)


def write_passages(workdir, seed):
    texts = [f"{text} In {1900 + seed}." for text in tiny_qa.texts()]
    tiny_qa.write_passages(workdir, corpus=texts)


def open_passages(workdir):
    found = PassageStore.open(workdir / "passages")
    return found.texts(range(len(found)))


def write_spans(workdir, seed):
    passages = PassageStore.open(workdir / "passages")
    stage = span_store.open_stage(
        workdir / "spans",
        config={"tagger": "rules"},
        passages_fingerprint=passages.fingerprint,
    )
    found = [np.array([[0, 1 + (row + seed) % 2]]) for row in range(len(passages))]
    span_store.write_shard(stage, 0, 1, found)
    stage.commit({"num_shards": 1, "spans": len(found)})


def open_spans(workdir):
    parents = parents_in(workdir, "passages")
    return SpanStore.open(workdir / "spans", parents=parents).spans[:]


def write_answers(workdir, seed):
    path = tiny_qa.write_questions(workdir / "questions.jsonl")
    asked = questions.load_questions(path)
    passages = PassageStore.open(workdir / "passages")
    stage = answer_store.open_stage(workdir / "answers", asked, passages)
    stage.commit(answer_store.build(asked, passages, stage))


def open_answers(workdir):
    return AnswerStore.open(
        workdir / "answers",
        questions=questions.load_questions(workdir / "questions.jsonl"),
        parents=parents_in(workdir, "passages"),
    ).counts


def write_weights(workdir, seed):
    folder = tiny_realm.write(workdir / "published", tiny_realm.open_qa(seed))
    stage = weights.open_stage(workdir / "weights", {"seed": str(seed)})
    texts = [f"Block {i} of {seed}" for i in range(tiny_realm.BLOCKS)]
    weights.write(stage, realm.load(folder), texts)


def open_weights(workdir):
    found = weights.load(workdir / "weights")
    return found.model, found.vectors[:]


def write_refresh(workdir, seed):
    refresh.refresh_inline(
        workdir / "refresh",
        STEP,
        toy_refresh.arrays(STEP + seed),
        toy_refresh.make_embedder,
        toy_refresh.TARGET,
        report=lambda line: None,
    )


def open_snapshot(workdir):
    parents = toy_refresh.PARENTS
    found = refresh.open_snapshot(workdir / "refresh", STEP, parents=parents)
    return found.arrays()


def open_version(workdir):
    root = workdir / "refresh"
    [snapshot] = parents_in(root / "snapshots", _STEP_NAME).values()
    parents = {**toy_refresh.PARENTS, "snapshot": snapshot}
    version = refresh.open_version(root, STEP, parents=parents)
    return refresh.load_vectors(version)[:]


ARTEFACTS = {
    "corpus": Artefact("corpus", "corpus", write_corpus, open_corpus),
    "chunks": Artefact(
        "chunks",
        "chunks",
        write_chunks,
        lambda workdir: ChunkStore.open(workdir / "chunks").texts([0, 1]),
    ),
    "embeddings": Artefact(
        "embeddings", "embeddings", write_embeddings, open_embeddings
    ),
    "index": Artefact("index", "index", write_exact, opened_index("index")),
    "scann_index": Artefact(
        "index", "scann_index", write_scann, opened_index("scann_index")
    ),
    "neighbours": Artefact(
        "neighbours", "neighbours", write_neighbours, open_neighbours
    ),
    "passages": Artefact("passages", "passages", write_passages, open_passages),
    "spans": Artefact("spans", "spans", write_spans, open_spans),
    "answers": Artefact("answers", "answers", write_answers, open_answers),
    "weights": Artefact("weights", "weights", write_weights, open_weights),
    "snapshot": Artefact(
        "snapshot", f"refresh/snapshots/{_STEP_NAME}", write_refresh, open_snapshot
    ),
    "version": Artefact(
        "index_version",
        f"refresh/versions/{_STEP_NAME}",
        lambda workdir, seed: None,  # with the snapshot
        open_version,
    ),
}
if probe.scann_problem() is not None:
    del ARTEFACTS["scann_index"]


def write_all(workdir, seed):
    """A workdir with all of them; another seed gives others in the same places."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True)
    for artefact in ARTEFACTS.values():
        artefact.write(workdir, seed)
    return workdir
