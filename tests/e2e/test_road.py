"""The whole road on a small corpus of files, stage by stage, as a user walks it."""

import json

import ml_collections
import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import (
    build_index,
    embed,
    evaluate,
    find_neighbours,
    generate,
    prepare,
    train,
)
from realm_retro.data.chunk_store import VALIDATION, ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval.neighbours import NeighbourTable
from realm_retro.retro import sizes

RIVERS = ("Amazon", "Danube", "Ganges", "Loire", "Mekong", "Niger", "Oder", "Volga")
COUNTRIES = ("Brazil", "Austria", "India", "France", "Laos", "Mali", "Poland", "Russia")


def write_corpus(folder, documents=60):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(documents):
        which = rng.integers(len(RIVERS), size=12)
        text = " ".join(
            f"The {RIVERS[w]} is a river that flows through {COUNTRIES[w]} in year {n}."
            for n, w in enumerate(which)
        )
        (folder / f"{i:03d}.txt").write_text(text)


def make_config(corpus):
    return ml_collections.ConfigDict(
        {
            "name": "retro",
            "seed": 0,
            "corpus": {"source": "text_files", "path": str(corpus)},
            "tokenizer": {"vocab_size": 320},
            "chunks": {"length": 16, "validation_fraction": 0.2},
            "index": {"backend": "exact"},
            "neighbours": {"k": 3},
            "model": {
                "vocab_size": 320,
                "chunk_length": 16,
                "num_layers": 2,
                "model_dim": 16,
                "num_heads": 2,
                "head_dim": 8,
                "ffw_dim": 32,
                "cca_layers": (2,),
                "encoder_layers": 1,
                "encoder_dim": 16,
                "encoder_num_heads": 2,
                "encoder_head_dim": 8,
                "encoder_ffw_dim": 32,
                "compute_dtype": "float32",
            },
            "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2},
            "train": {
                "steps": 6,
                "batch_size": 8,
                "sequence_chunks": 4,
                "neighbours": 2,
                "log_every": 2,
                "checkpoint_every": 4,
            },
            "evaluate": {"batch_size": 8, "stride_chunks": 2, "neighbours": (3,)},
            "generate": {"max_tokens": 40, "neighbours": 2},
        }
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A finished workdir and its config."""
    folder = tmp_path_factory.mktemp("road")
    write_corpus(folder / "files")
    config, workdir = make_config(folder / "files"), epath.Path(folder / "work")
    for stage in (prepare, embed, build_index, find_neighbours, train, evaluate):
        stage.main(config, workdir)
    with flagsaver.flagsaver(prompt=["The Amazon is a river", "The"]):
        generate.main(config, workdir)
    return config, workdir


def test_training_is_complete_and_logged(road):
    _, workdir = road
    run = workdir / "runs" / "retro"
    assert json.loads((run / "manifest.json").read_text())["meta"]["steps"] == 6
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 6
    assert np.isfinite([record["loss"] for record in records]).all()


def test_evaluation_counts_every_byte_of_the_held_out_documents(road):
    _, workdir = road
    report = json.loads((workdir / "runs" / "retro" / "evaluation.json").read_text())
    store = ChunkStore.open(workdir / "chunks")
    held_out = store.documents.split == VALIDATION
    assert report["documents"] == held_out.sum()
    assert report["bytes"] == store.documents.num_bytes[held_out].sum()
    assert [row["neighbours"] for row in report["results"]] == [0, 2, 3]
    assert [row["label"] for row in report["results"]] == ["OFF", "ON", "k=3"]
    for row in report["results"]:
        assert row["low"] <= row["bits_per_byte"] <= row["high"]
    off, on = (row["bits_per_byte"] for row in report["results"][:2])
    assert report["difference"]["bits_per_byte"] == pytest.approx(on - off)


def test_an_untrained_model_would_need_more_bits(road):
    # Uniform over 320 pieces: what a model that learned nothing pays for each token.
    _, workdir = road
    report = json.loads((workdir / "runs" / "retro" / "evaluation.json").read_text())
    store = ChunkStore.open(workdir / "chunks")
    chunks = store.chunks_of(VALIDATION)
    pieces = (store.lengths[chunks].sum() - 2 * report["documents"]).item()
    uniform = pieces * np.log2(320) / report["bytes"]
    assert report["results"][1]["bits_per_byte"] < 0.9 * uniform


def test_held_out_documents_are_neither_neighbours_nor_their_own(road):
    _, workdir = road
    store = ChunkStore.open(workdir / "chunks")
    ids = NeighbourTable.open(workdir / "neighbours").ids[:]
    assert (ids >= 0).all()
    owners = store.document[ids]
    assert (owners != np.asarray(store.document[:])[:, None]).all()
    assert not np.isin(ids, store.chunks_of(VALIDATION)).any()


def test_generation_shows_the_passages_of_each_whole_chunk(road):
    _, workdir = road
    path = workdir / "runs" / "retro" / "generation.json"
    first, second = json.loads(path.read_text())["generations"]
    for one, prompt in ((first, "The Amazon is a river"), (second, "The")):
        assert one["prompt"] == prompt
        assert one["text"].startswith(prompt)
        assert "".join(c["tokens_text"] for c in one["chunks"]) == one["text"]
    store = ChunkStore.open(workdir / "chunks")
    shown = [p for chunk in first["chunks"] for p in chunk["passages"]]
    assert shown
    for passage in shown:
        assert passage["text"].startswith(store.text(passage["chunk"])[:10])


def test_a_second_run_reuses_what_is_finished(road, capsys):
    config, workdir = road
    before = {p: p.stat().mtime for p in workdir.glob("*/manifest.json")}
    for stage in (prepare, embed, build_index, find_neighbours, train):
        stage.main(config, workdir)
    assert before == {p: p.stat().mtime for p in workdir.glob("*/manifest.json")}


def test_the_plain_decoder_shares_the_workdir(road):
    config, workdir = road
    plain = sizes.variant(config.copy_and_resolve_references(), "plain")
    train.main(plain, workdir)
    evaluate.main(plain, workdir)
    report = json.loads((workdir / "runs" / "plain" / "evaluation.json").read_text())
    assert [row["label"] for row in report["results"]] == ["OFF"]
    assert "difference" not in report


@pytest.mark.parametrize(
    ("stage", "section", "name", "value", "message"),
    [
        (evaluate, "evaluate", "neighbours", (9,), "holds 3 neighbours of each chunk"),
        (evaluate, "evaluate", "stride_chunks", 5, "text would be left out"),
        (evaluate, "evaluate", "split", "test", "config.evaluate.split is 'test'"),
        (train, "model", "vocab_size", 100, "does not fit config.model.vocab_size=100"),
        (train, "model", "chunk_length", 8, "chunks of 16 tokens do not fit"),
        (train, "train", "batch_size", 4, "use another --workdir"),
        (prepare, "tokenizer", "vocab_size", 300, "made with other settings"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(
    road, stage, section, name, value, message
):
    config, workdir = road
    config = config.copy_and_resolve_references()
    config[section].unlock()
    config[section][name] = value
    with pytest.raises(UserError, match=message) as error:
        stage.main(config, workdir)
    assert "\n" not in str(error.value)
