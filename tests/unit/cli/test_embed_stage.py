"""The embed stage on a tiny store and a tiny encoder."""

import threading

import ml_collections
import numpy as np
import pytest
import tiny_bert
from etils import epath
from held_files import held, linux

from realm_retro.cli import embed as embed_cli
from realm_retro.cli import encoders, sharing
from realm_retro.data import chunk_writer
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import Document
from realm_retro.errors import UserError
from realm_retro.retrieval import embeddings
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.text.tokenizer import TokenizerConfig


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """A finished chunk store of a few dozen chunks."""
    rng = np.random.default_rng(0)
    corpus = [
        Document(id=str(i), title="", text=" ".join(rng.choice(tiny_bert.WORDS, n)))
        for i, n in enumerate(rng.integers(1, 60, 20))
    ]
    directory = tmp_path_factory.mktemp("chunks")
    tokenizer = TokenizerConfig(vocab_size=300)
    config = ChunksConfig(length=32, validation_fraction=0.1)
    stage = chunk_writer.open_stage(
        directory, chunks=config, tokenizer=tokenizer, corpus_fingerprint="c" * 64
    )
    model = chunk_writer.prepare_tokenizer(corpus, tokenizer, stage)
    stage.commit(chunk_writer.build(corpus, model, config, stage))
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_bert.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def workdir(tmp_path, chunks):
    (tmp_path / "chunks").symlink_to(chunks)
    return epath.Path(tmp_path)


def config_of(encoder, **changes):
    config = ml_collections.ConfigDict(
        {
            "encoder": {"path": str(encoder), "max_tokens": 8},
            "embed": {"dtype": "float32", "shard_size": 16},
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def test_rows_are_the_chunks_in_order(workdir, encoder, capsys):
    config = config_of(encoder)
    embed_cli.main(config, workdir)
    store = ChunkStore.open(workdir / "chunks")
    found = Embeddings.open(
        workdir / "embeddings", parents={"chunks": store.fingerprint}
    )
    query = encoders.build_encoder(config)
    assert (len(found), found.dim) == (len(store), 16)
    assert len(found.vectors.shards) == -(-len(store) // 16) > 2
    assert found.encoder_fingerprint == query.fingerprint
    wanted = query.encode(store.texts(np.arange(len(store))))
    np.testing.assert_allclose(found.vectors[:], wanted, atol=1e-5)
    assert len(np.unique(wanted, axis=0)) > len(store) // 2
    meta = found.manifest.meta
    assert meta["truncated"] > 0
    assert (
        f"{meta['truncated']:,} chunks were cut to 8 tokens" in capsys.readouterr().out
    )
    embed_cli.main(config, workdir)
    assert "finished already" in capsys.readouterr().out


def test_float16_is_the_same_rounded(workdir, encoder):
    embed_cli.main(config_of(encoder, **{"embed.dtype": "float16"}), workdir)
    store = ChunkStore.open(workdir / "chunks")
    found = Embeddings.open(workdir / "embeddings").vectors
    assert found.dtype == np.float16
    wanted = encoders.build_encoder(config_of(encoder)).encode(store.texts([3]))[0]
    np.testing.assert_allclose(found[3], wanted, atol=2e-3)


def test_resumes_at_the_missing_shard(workdir, encoder, tmp_path):
    config = config_of(encoder)
    embed_cli.main(config, workdir)
    whole = Embeddings.open(workdir / "embeddings").manifest
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "chunks").symlink_to(workdir / "chunks")
    again = workdir / "again"
    # An earlier run was cut off after its second shard.
    store = ChunkStore.open(workdir / "chunks")
    stage = embeddings.open_stage(
        again / "embeddings",
        config=embed_cli.EmbedConfig(shard_size=16),
        compute_dtype="float32",
        chunks_fingerprint=store.fingerprint,
        encoder_fingerprint=encoders.fingerprint(encoders.EncoderConfig.of(config)),
    )
    marked = np.full((16, 16), 7, np.float32)
    names = embeddings.shard_names(len(store), 16)
    counts = {"texts": 16, "tokens": 100, "empty": 1, "truncated": 2}
    stage.note(names[1], {"counts": counts, "seconds": 5.0})
    with stage.write(names[1]) as path, path.open("wb") as file:
        np.save(file, marked)
    embed_cli.main(config, again)
    resumed = Embeddings.open(again / "embeddings")
    np.testing.assert_array_equal(resumed.vectors[16:32], marked)
    for name in (names[0], names[2]):
        assert resumed.manifest.files[name] == whole.files[name]
    assert resumed.manifest.meta["texts"] == len(store)
    assert resumed.manifest.meta["seconds"] >= 5.0


def test_two_workers_make_what_one_makes(workdir, encoder, tmp_path):
    config = config_of(encoder, **{"embed.shard_size": 8})
    embed_cli.main(config, workdir)
    alone = Embeddings.open(workdir / "embeddings").manifest
    (tmp_path / "again").mkdir()
    store = ChunkStore.open(workdir / "chunks")
    settings = embed_cli.EmbedConfig(shard_size=8)
    made = []

    def run():
        stage = embeddings.open_stage(
            tmp_path / "again" / "embeddings",
            config=settings,
            compute_dtype="float32",
            chunks_fingerprint=store.fingerprint,
            encoder_fingerprint=encoders.fingerprint(encoders.EncoderConfig.of(config)),
            join=True,
        )
        embedder = encoders.build_embedder(encoders.EncoderConfig.of(config))
        parts = embeddings.shards(len(store), 8)
        with sharing.work(stage, parts, label="embeddings") as work:
            embed_cli.write_shards(store, embedder, settings, work)
            embed_cli._commit(embedder, work)
            made.append(work.totals.shards)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = Embeddings.open(tmp_path / "again" / "embeddings").manifest
    assert together.fingerprint == alone.fingerprint
    assert sum(made) == len(alone.files)
    counted = ("texts", "tokens", "empty", "truncated")
    assert [together.meta[n] for n in counted] == [alone.meta[n] for n in counted]


def test_other_settings_are_refused(workdir, encoder):
    embed_cli.main(config_of(encoder), workdir)
    with pytest.raises(UserError, match=r"max_tokens|parents.encoder"):
        embed_cli.main(config_of(encoder, **{"encoder.max_tokens": 9}), workdir)
    with pytest.raises(UserError, match=r"config.dtype: float32 there, float16 here"):
        embed_cli.main(config_of(encoder, **{"embed.dtype": "float16"}), workdir)


def test_batches_may_change_between_runs(workdir, encoder, capsys):
    embed_cli.main(config_of(encoder), workdir)
    config = config_of(encoder)
    config.embed.batch_tokens = 64
    embed_cli.main(config, workdir)
    assert "finished already" in capsys.readouterr().out


def test_an_encoder_in_pieces_gives_the_same(workdir, encoder):
    config = config_of(encoder, **{"embed.fsdp": 2, "embed.tensor": 2})
    embed_cli.main(config, workdir)
    store = ChunkStore.open(workdir / "chunks")
    found = Embeddings.open(workdir / "embeddings")
    wanted = encoders.build_encoder(config).encode(store.texts(np.arange(len(store))))
    np.testing.assert_allclose(found.vectors[:], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed.tensor": 0}, "config.embed: fsdp=1 and tensor=0 must be at least 1"),
        ({"embed.fsdp": 3}, "config.embed: fsdp=3 x tensor=1 does not divide the 8"),
        ({"embed.dtype": "float23"}, "config.embed: dtype='float23' must be"),
        ({"encoder.max_tokens": 41}, "max_tokens=41 is above the 40 positions"),
        ({"encoder.path": "/no/such/folder"}, "path=/no/such/folder: is not a folder"),
    ],
)
def test_bad_settings_are_named_and_leave_nothing_behind(
    workdir, encoder, changes, message
):
    with pytest.raises(UserError, match=message):
        embed_cli.main(config_of(encoder, **changes), workdir)
    embed_cli.main(config_of(encoder), workdir)
    Embeddings.open(workdir / "embeddings")


def test_unknown_encoder_is_named(encoder, workdir):
    with pytest.raises(UserError, match=r"config.encoder: name='bertha' is not known"):
        embed_cli.main(
            ml_collections.ConfigDict({"encoder": {"name": "bertha"}}), workdir
        )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folder_without_a_file(workdir, tmp_path, name):
    folder = tiny_bert.write(tmp_path / "encoder")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; an encoder's folder"):
        embed_cli.main(config_of(folder), workdir)


def test_tokenizer_of_another_model(workdir, tmp_path):
    weights, config = tiny_bert.tensors(), tiny_bert.config_json(vocab_size=10)
    name = "embeddings.word_embeddings.weight"
    weights[name] = weights[name][:10]
    folder = tiny_bert.write(tmp_path / "encoder", weights=weights, config=config)
    with pytest.raises(UserError, match="has 15 pieces, but the weights know 10"):
        embed_cli.main(config_of(folder), workdir)


def test_float16_that_cannot_hold_a_vector():
    with pytest.raises(UserError, match=r"cannot hold 7e.04"):
        embed_cli._narrowed(np.full((1, 2), 7e4, np.float32), "float16")


@linux
def test_chunks_that_were_read_are_let_go(chunks):
    store = ChunkStore.open(chunks)
    rows = np.arange(len(store))
    assert store.texts(rows)
    files = [p for name in ("tokens", "chunks") for p in chunks.glob(f"{name}-*.npy")]
    assert all(held(path) for path in files)
    parts = store.texts(rows[:-1]) + store.texts(rows[-1:])
    assert embed_cli.texts(store, rows) == parts
    embed_cli.texts(store, rows)
    assert not any(held(path) for path in files)
