"""The stage as a user meets it: every chunk, no own document, resumed by shards."""

import threading
import weakref

import ml_collections
import numpy as np
import pytest
import tiny_workdir
from held_files import held, linux

from realm_retro.cli import build_index, find_neighbours, sharing
from realm_retro.data.chunk_store import VALIDATION, ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval import neighbours
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import store as index_store
from realm_retro.retrieval.neighbours import Filter, NeighboursConfig, NeighbourTable

K = 3


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chunks")
    tiny_workdir.write_chunks(directory, documents=40)
    return directory


@pytest.fixture
def workdir(tmp_path, chunks):
    workdir = tiny_workdir.link(chunks, tmp_path)
    tiny_workdir.write_embeddings(workdir)
    return workdir


def config_of(**settings):
    settings = {"k": K, "margin": 1, "batch_size": 32, "shard_size": 50} | settings
    index = {"backend": "exact"}
    return ml_collections.ConfigDict({"index": index, "neighbours": settings})


def run(workdir, **settings):
    config = config_of(**settings)
    build_index.main(config, workdir)
    find_neighbours.main(config, workdir)
    return NeighbourTable.open(workdir / "neighbours")


def test_every_chunk_has_the_best_of_other_documents(workdir, capsys):
    table = run(workdir)
    store = ChunkStore.open(workdir / "chunks")
    vectors = tiny_workdir.clustered(len(store)).astype(np.float32)
    document = store.document[:]
    distances = np.square(vectors[:, None] - vectors[None]).sum(-1)
    distances[document[:, None] == document[None]] = np.inf
    distances[:, store.chunks_of(VALIDATION)] = np.inf
    best = np.argsort(distances, axis=1, kind="stable")[:, :K]
    assert table.ids.shape == (len(store), K)
    np.testing.assert_array_equal(table.ids[:], best)
    want = -np.take_along_axis(distances, best, axis=1)
    np.testing.assert_allclose(table.scores[:], want, atol=1e-4)
    meta = table.manifest.meta
    assert (meta["rows"], meta["k"], meta["short"]) == (len(store), K, 0)
    assert meta["found"] == len(store) * K
    assert meta["average_score"] == pytest.approx(want.mean(), abs=1e-4)
    assert meta["num_shards"] == -(-len(store) // 50) > 1
    assert meta["seconds"] > 0
    said = capsys.readouterr().out
    assert f"neighbours: {len(store) * K:,} of {len(store):,} chunks" in said
    assert "fewer than" not in said


def test_the_table_knows_what_it_comes_from(workdir):
    table = run(workdir)
    store = ChunkStore.open(workdir / "chunks")
    parents = table.manifest.parents
    assert parents["chunks"] == store.fingerprint
    assert set(parents) == {"chunks", "embeddings", "index"}


def test_a_single_document_is_all_missing_and_counted(tmp_path, capsys):
    workdir = tiny_workdir.link(tmp_path / "store", tmp_path)
    tiny_workdir.write_chunks(tmp_path / "store", documents=1, validation_fraction=0)
    tiny_workdir.write_embeddings(workdir)
    table = run(workdir)
    assert (table.ids[:] == -1).all()
    assert np.isneginf(table.scores[:]).all()
    assert table.manifest.meta["short"] == len(table.ids)
    assert table.manifest.meta["found"] == 0
    said = capsys.readouterr().out
    assert f"{len(table.ids):,} chunks have fewer than {K}" in said


def test_a_killed_run_goes_on_where_it_was(workdir, monkeypatch, capsys):
    config = config_of()
    build_index.main(config, workdir)
    searched = []
    find = Filter.find

    def until_killed(self, queries, *args, **kwargs):
        searched.append(len(queries))
        if sum(searched) > 70:
            raise KeyboardInterrupt
        return find(self, queries, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Filter, "find", until_killed)
        with pytest.raises(KeyboardInterrupt):
            find_neighbours.main(config, workdir)
    with pytest.raises(UserError, match=r"unfinished; run: .*find_neighbours"):
        NeighbourTable.open(workdir / "neighbours")
    searched.clear()

    def counted(self, queries, *args, **kwargs):
        searched.append(len(queries))
        return find(self, queries, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Filter, "find", counted)
        find_neighbours.main(config, workdir)
    resumed = NeighbourTable.open(workdir / "neighbours")
    rows = len(resumed.ids)
    # The first shard of 50 was done.
    assert sum(searched) == rows - 50
    assert resumed.manifest.meta["rows"] == rows
    (workdir / "neighbours").rmtree()
    assert run(workdir).fingerprint == resumed.fingerprint
    (workdir / "neighbours").rmtree()
    # How rows are batched may change the rounding of a score, but nothing else.
    np.testing.assert_array_equal(run(workdir, batch_size=999).ids[:], resumed.ids[:])
    capsys.readouterr()
    find_neighbours.main(config, workdir)
    assert "finished already" in capsys.readouterr().out


def test_two_workers_find_what_one_finds(workdir):
    settings = {"shard_size": 20}
    alone = run(workdir, **settings).manifest
    (workdir / "neighbours").rmtree()
    store = ChunkStore.open(workdir / "chunks")
    vectors = Embeddings.open(workdir / "embeddings").vectors
    index = index_store.load(index_of(workdir))
    finder = neighbours.Finder([lambda: index], store.document[:])
    parts = neighbours.shards(len(store), 20)
    section = NeighboursConfig(**config_of(**settings).neighbours)
    made = []

    def share():
        stage = neighbours.open_stage(
            workdir / "neighbours", config=section, parents=alone.parents, join=True
        )
        with sharing.work(stage, parts, label="neighbours") as work:
            find_neighbours.write_shards(finder, vectors, section, work)
            find_neighbours._commit(section, work)
            made.append(work.totals.shards)

    threads = [threading.Thread(target=share) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = NeighbourTable.open(workdir / "neighbours").manifest
    assert together.fingerprint == alone.fingerprint
    assert sum(made) == len(parts) > 4
    assert together.meta["found"] == alone.meta["found"]


def test_an_index_in_parts_is_searched_one_part_at_a_time(workdir, monkeypatch):
    whole = run(workdir)
    for stage in ("neighbours", "index"):
        (workdir / stage).rmtree()
    opened, load = [], index_store.load

    def watched(manifest):
        assert not any(reference() for reference in opened), "two parts in memory"
        index = load(manifest)
        opened.append(weakref.ref(index))
        return index

    config = config_of(shard_size=100)
    # Too few rows for a tree: each is compared.
    config.index = {"backend": "scann", "part_rows": 90}
    build_index.main(config, workdir)
    count = index_of(workdir).meta["parts"]
    assert count > 2
    monkeypatch.setattr(index_store, "load", watched)
    find_neighbours.main(config, workdir)
    table = NeighbourTable.open(workdir / "neighbours")
    np.testing.assert_array_equal(table.ids[:], whole.ids[:])
    np.testing.assert_allclose(table.scores[:], whole.scores[:], atol=1e-4)
    assert len(opened) == count * table.manifest.meta["num_shards"]


def index_of(workdir):
    return index_store.load_manifest(workdir / "index")


@pytest.mark.slow
@linux
def test_vectors_that_were_read_are_let_go(tmp_path, chunks, monkeypatch):
    workdir = tiny_workdir.link(chunks, tmp_path)
    count = len(ChunkStore.open(workdir / "chunks"))
    vectors = tiny_workdir.clustered(count, dim=512)
    tiny_workdir.write_embeddings(workdir, vectors=vectors)
    seen, find = [], Filter.find

    def watched(self, *args, **kwargs):
        seen.append(held(workdir / "embeddings"))
        return find(self, *args, **kwargs)

    monkeypatch.setattr(Filter, "find", watched)
    run(workdir, batch_size=16)
    assert len(seen) > 8
    assert 0 < max(seen) < 2048 * count / 2, "not more than what is being read"


def test_an_index_of_other_embeddings_is_refused(workdir):
    build_index.main(config_of(), workdir)
    (workdir / "embeddings").rmtree()
    count = len(ChunkStore.open(workdir / "chunks"))
    tiny_workdir.write_embeddings(
        workdir, vectors=tiny_workdir.clustered(count, seed=1)
    )
    with pytest.raises(UserError, match="was made from embeddings"):
        find_neighbours.main(config_of(), workdir)


def test_a_missing_index_names_the_command(workdir):
    with pytest.raises(UserError, match=r"index missing; run: .*build_index"):
        find_neighbours.main(config_of(), workdir)
