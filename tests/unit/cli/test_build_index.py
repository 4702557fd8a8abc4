"""The stage as a user meets it: honest recall, a fallback, one line for bad input."""

import json
import shutil

import ml_collections
import numpy as np
import pytest
import tiny_workdir

from realm_retro.cli import build_index
from realm_retro.data.chunk_store import VALIDATION, ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import exact, probe, store, tuning


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chunks")
    tiny_workdir.write_chunks(directory, documents=80)
    return directory


@pytest.fixture
def workdir(tmp_path, chunks):
    workdir = tiny_workdir.link(chunks, tmp_path)
    tiny_workdir.write_embeddings(workdir)
    return workdir


def run(workdir, **settings):
    settings = {"recall_k": 5, "recall_queries": 60} | settings
    build_index.main(ml_collections.ConfigDict({"index": settings}), workdir)


@pytest.fixture
def treed(monkeypatch):
    """Makes a tiny database worth a tree."""
    monkeypatch.setattr(tuning, "MIN_ROWS_FOR_TREE", 50)


@pytest.mark.parametrize("backend", ["scann", "exact"])
@pytest.mark.usefixtures("treed")
def test_it_holds_what_may_be_retrieved_and_says_how_well(workdir, backend, capsys):
    run(workdir, backend=backend)
    said = capsys.readouterr().out
    chunks, vectors = (
        ChunkStore.open(workdir / "chunks"),
        Embeddings.open(workdir / "embeddings"),
    )
    manifest = store.load_manifest(
        workdir / "index",
        parents={"chunks": chunks.fingerprint, "embeddings": vectors.fingerprint},
    )
    index = store.load(manifest)
    assert index.backend == backend
    held_out = chunks.chunks_of(VALIDATION)
    assert len(held_out)
    expected = np.setdiff1d(np.arange(len(chunks)), held_out)
    np.testing.assert_array_equal(index.ids, expected)
    found = index.search(vectors.vectors[expected], 1)
    assert (found.ids[:, 0] == expected).mean() > 0.9
    meta = manifest.meta
    assert meta["size"] == len(expected)
    assert meta["dim"] == 8
    assert meta["recall_k"] == 5
    assert 0.95 <= meta["recall"] <= 1
    assert meta["queries_per_second_batch_1"] > 0
    assert meta["queries_per_second_batch_256"] > 0
    assert meta["seconds"] > 0
    assert "fallback" not in meta
    assert f"{backend}, recall@5 {meta['recall']:.4f}" in said
    if backend == "scann":
        assert meta["scann"]["parameters"]["num_leaves"] > 0


def test_a_finished_index_is_left_alone(workdir, capsys):
    run(workdir)
    before = (workdir / "index" / "manifest.json").read_text()
    capsys.readouterr()
    run(workdir)
    assert "finished already" in capsys.readouterr().out
    assert (workdir / "index" / "manifest.json").read_text() == before
    with pytest.raises(UserError, match=r"other settings .*metric"):
        run(workdir, metric="dot_product")


def test_half_precision_embeddings(tmp_path, chunks):
    workdir = tiny_workdir.link(chunks, tmp_path)
    tiny_workdir.write_embeddings(workdir, dtype="float16")
    run(workdir, backend="exact")
    index = store.load(store.load_manifest(workdir / "index"))
    assert index.vectors.dtype == np.float32


@pytest.mark.usefixtures("treed")
def test_recall_below_the_target_says_what_to_change(workdir, monkeypatch):
    monkeypatch.setattr(tuning, "_REORDER_PER_RESULT", (1,))
    monkeypatch.setattr("realm_retro.retrieval.index.scann.DIMS_PER_BLOCK", 8)
    with pytest.raises(
        UserError, match=r"below config.index.recall_target=0\.999.*exact"
    ):
        run(workdir, recall_target=0.999)
    assert not (workdir / "index" / "manifest.json").exists()
    # The setting can be mended in the same workdir.
    run(workdir, backend="exact", recall_target=0.999)


def test_without_scann_it_searches_exactly(workdir, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken" / "scann"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no ScaNN today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    probe.scann_problem.cache_clear()
    try:
        run(workdir)
        manifest = store.load_manifest(workdir / "index")
        assert store.load(manifest).backend == "exact"
    finally:
        probe.scann_problem.cache_clear()
    assert "no ScaNN today" in manifest.meta["fallback"]
    assert manifest.meta["recall"] == 1
    assert "ScaNN does not run here" in capsys.readouterr().out


def test_leftovers_of_a_killed_run_do_not_stay(workdir, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.artifacts.Stage, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(workdir)
    assert (workdir / "index" / "scann").exists()
    problem = lambda: "it went away"  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(probe, "scann_problem", problem)
        run(workdir)
    manifest = store.load_manifest(workdir / "index")
    assert set(manifest.files) == {"ids.npy", "vectors.npy"}


@pytest.mark.usefixtures("treed")
def test_a_large_database_becomes_several_indexes(workdir, capsys):
    run(workdir, part_rows=200)
    manifest = store.load_manifest(workdir / "index")
    meta, held = manifest.meta, store.parts(manifest)
    assert meta["parts"] == len(held) == -(-meta["size"] // 200) > 2
    said = capsys.readouterr().out
    assert f"index: part 2 of {len(held)}" in said
    assert f"{meta['size']:,} vectors, scann in {len(held)} parts, recall@5" in said
    assert all(part.meta["size"] <= 200 for part in held)
    assert all(part.meta["scann"]["parameters"]["num_leaves"] for part in held)
    assert 0.95 <= meta["recall"] <= 1
    slowest = min(part.meta["queries_per_second_batch_1"] for part in held)
    assert 0 < meta["queries_per_second_batch_1"] < slowest / 1.5
    index = store.load(manifest)
    (workdir / "index").rmtree()
    run(workdir, backend="exact")
    exact_index = store.load(store.load_manifest(workdir / "index"))
    np.testing.assert_array_equal(index.ids, exact_index.ids)
    queries = Embeddings.open(workdir / "embeddings").vectors[index.ids]
    found, truth = (each.search(queries, 5).ids for each in (index, exact_index))
    assert (found == truth).mean() > 0.9


def test_a_killed_build_goes_on_with_the_first_missing_part(workdir, monkeypatch):
    built, build = [], build_index.build

    def killed_in_the_third(*args):
        built.append(args)
        if len(built) == 3:
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(build_index, "build", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(workdir, part_rows=200)
    with pytest.raises(UserError, match=r"index.*unfinished; run: .*build_index"):
        store.load_manifest(workdir / "index")
    with pytest.raises(UserError, match=r"index: was made with other settings"):
        run(workdir, part_rows=100)
    run(workdir, part_rows=200)
    manifest = store.load_manifest(workdir / "index")
    assert len(built) == 1 + manifest.meta["parts"]
    store.load(manifest)


def test_damage_in_a_part_names_the_file_and_the_whole_index(workdir):
    run(workdir, part_rows=200)
    path = workdir / "index" / "part-00001" / "ids.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = rf"part-00001/ids.npy: is damaged.*delete {workdir}/index and run"
    with pytest.raises(UserError, match=again):
        store.load_manifest(workdir / "index")


def test_parts_that_are_good_each_but_not_together_are_refused(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build_index.parts, "recall", lambda *_: 0.5)
        with pytest.raises(
            UserError, match=r"is 0\.5000, below.*delete .*index and .*part_rows"
        ):
            run(workdir, part_rows=200)


def test_a_vector_that_is_not_finite_is_named(tmp_path, chunks):
    workdir = tiny_workdir.link(chunks, tmp_path)
    count = len(ChunkStore.open(workdir / "chunks"))
    vectors = tiny_workdir.clustered(count)
    vectors[0, 2] = np.nan
    tiny_workdir.write_embeddings(workdir, vectors=vectors)
    with pytest.raises(UserError, match=r"chunk 0 holds NaN.*cli\.embed"):
        run(workdir)


def test_a_corpus_of_one_document(tmp_path):
    workdir = tiny_workdir.link(tmp_path / "store", tmp_path)
    tiny_workdir.write_chunks(tmp_path / "store", documents=1, validation_fraction=0)
    tiny_workdir.write_embeddings(workdir)
    run(workdir)
    assert store.load_manifest(workdir / "index").meta["recall"] == 1


def test_embeddings_of_another_corpus_are_refused(workdir):
    path = workdir / "embeddings" / "manifest.json"
    assert json.loads(path.read_text())["parents"]["chunks"]
    other = workdir / "other"
    other.mkdir()
    tiny_workdir.write_chunks(other / "chunks", documents=4)
    shutil.copytree(workdir / "embeddings", other / "embeddings")
    with pytest.raises(UserError, match="was made from chunks"):
        run(other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "faiss"}, "backend='faiss' is none of scann, exact"),
        ({"metric": "cosine"}, "metric='cosine' is none of squared_l2, dot_product"),
        ({"recall_target": 0.0}, "recall_target=0.0 must be above 0"),
        ({"recall_target": 1.1}, "recall_target=1.1 must be above 0"),
        ({"recall_k": 0}, "recall_k=0 must be at least 1"),
        ({"part_rows": 0}, "part_rows=0 must be at least 1"),
        ({"recall_queries": 0}, "recall_queries=0 must be at least 1"),
    ],
)
def test_settings_are_checked(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **setting)


def test_a_large_database_needs_many_blocks(workdir, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_ROWS", 16)
    run(workdir, backend="exact")
    assert store.load_manifest(workdir / "index").meta["recall"] == 1
