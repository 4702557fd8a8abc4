"""Published REALM: every tensor finds its place, or the error names it."""

import json

import jax
import numpy as np
import pytest
import tiny_bert
import tiny_realm

from realm_retro.errors import UserError
from realm_retro.interop import export, realm
from realm_retro.parallel import axes
from realm_retro.realm import model as model_lib
from realm_retro.realm.config import RealmConfig

KINDS = {
    "embedder": (tiny_realm.embedder, {"query"}, True),
    "tied scorer": (lambda: tiny_realm.scorer(0, 0), {"query"}, True),
    "scorer": (lambda: tiny_realm.scorer(0, 1), {"query", "document"}, False),
    "encoder": (tiny_realm.encoder, {"encoder"}, False),
    "reader": (tiny_realm.reader, {"reader"}, False),
    "open_qa": (tiny_realm.open_qa, {"query", "reader"}, False),
}


def load(tmp_path, tensors, config=None, **kwargs):
    return realm.load(tiny_realm.write(tmp_path / "model", tensors, config, **kwargs))


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tree_is_the_model_s_own(tmp_path, kind, as_bin):
    make, parts, tied = KINDS[kind]
    published = load(tmp_path, make(), as_bin=as_bin)
    config = RealmConfig(
        **published.model, query_length=4, title_length=4, body_length=8
    )
    assert set(published.parts) == parts
    assert config.tied == tied
    assert config.activation == "gelu_tanh"
    boxed = jax.eval_shape(
        lambda key: model_lib.init(config, key, tuple(parts)), jax.random.key(0)
    )
    wanted = axes.unbox(boxed)
    assert jax.tree.map(np.shape, published.parts) == jax.tree.map(np.shape, wanted)
    leaves = jax.tree.leaves(published.parts)
    assert all(leaf.dtype == np.float32 for leaf in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_is_used_or_named_as_unused(tmp_path, kind):
    tensors = KINDS[kind][0]()
    published = load(tmp_path, tensors)
    used = {name for name in tensors if name not in published.unused}
    assert len(used) + len(published.unused) == len(tensors)
    assert not any("attention" in name for name in published.unused)
    if kind == "embedder":
        assert len(published.unused) == 8  # the masked-LM head and the position ids
        assert "realm.pooler.dense.weight" in used


def test_each_tensor_lies_where_it_belongs(tmp_path):
    tensors = tiny_realm.open_qa()
    published = load(tmp_path, tensors)
    query, reader = published.parts["query"], published.parts["reader"]
    np.testing.assert_array_equal(
        query["pooler"]["kernel"], tensors["embedder.realm.pooler.dense.weight"].T
    )
    np.testing.assert_array_equal(
        query["projection_norm"]["scale"], tensors["embedder.cls.LayerNorm.weight"]
    )
    ends = tensors["reader.qa_outputs.dense_intermediate.weight"]
    np.testing.assert_array_equal(
        reader["span_ends"]["kernel"][:, 1], ends[tiny_realm.SPAN_HIDDEN :].T
    )
    value = tensors["reader.realm.encoder.layer.1.attention.self.value.bias"]
    np.testing.assert_array_equal(
        reader["bert"]["layers"]["attention"]["qkv"]["bias"][1, 2].reshape(-1), value
    )
    np.testing.assert_array_equal(published.vectors, tensors["block_emb"])


def test_scorer_towers_are_not_exchanged(tmp_path):
    published = load(tmp_path, tiny_realm.scorer(3, 4))
    wanted = load(tmp_path / "query", tiny_realm.embedder(3)).parts["query"]
    jax.tree.map(np.testing.assert_array_equal, published.parts["query"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_any_missing_or_left_over_tensor_is_named(tmp_path, kind):
    tensors = KINDS[kind][0]()
    published = load(tmp_path / "whole", tensors)
    needed = sorted(tensors.keys() - set(published.unused) - {"block_emb"})
    tied = "cls.predictions.decoder."
    needed = [name for name in needed if not name.startswith(tied)]
    for name in needed[:: len(needed) // 3]:
        rest = {n: v for n, v in tensors.items() if n != name}
        with pytest.raises(UserError, match=rf"has no tensor '{name}'"):
            load(tmp_path, rest)
    with pytest.raises(UserError, match=r"without a place.*: realm.extra; is it"):
        load(tmp_path, tensors | {"realm.extra": np.zeros(2, np.float32)})


def test_tied_weights_may_be_absent_but_not_different(tmp_path):
    tensors = tiny_realm.encoder()
    names = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    rest = {n: v for n, v in tensors.items() if n not in names}
    wanted = load(tmp_path, tensors).parts
    found = load(tmp_path / "absent", rest).parts
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for name in names:
        other = tensors | {name: tensors[name] + 1}
        with pytest.raises(UserError, match=f"'{name}' differs from the one"):
            load(tmp_path, other)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_with_its_head_and_old_names(tmp_path, prefix, seed):
    tensors = {f"{prefix}{n}": v for n, v in tiny_bert.tensors(seed).items()}
    tokens = tensors[f"{prefix}embeddings.word_embeddings.weight"]
    if prefix:
        tensors |= tiny_realm.head(seed, tokens)
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 16), np.float32)
        tensors["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for n, v in tensors.items()
    }
    assert old.keys() != tensors.keys()
    config = tiny_bert.config_json()
    published = load(tmp_path, old, config, as_bin=True)
    assert set(published.parts) == ({"bert", "head"} if prefix else {"bert"})
    same = load(tmp_path / "new", tensors, config)
    jax.tree.map(np.testing.assert_array_equal, published.parts, same.parts)
    assert published.model["width"] == 16
    assert "embed_dim" not in published.model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"retriever_proj_size": 9},
            r"cls.dense.weight' has shape \(8, 16\).*\(9, 16\)",
        ),
        ({"reader_layer_norm_eps": 1e-5}, "reader_layer_norm_eps=1e-05 is not support"),
        ({"type_vocab_size": 3}, "type_vocab_size=3 is not supported"),
        ({"num_hidden_layers": 2}, "encoder.layer.2.* more; is it another kind"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
    ],
)
def test_config_that_does_not_fit(tmp_path, changes, message):
    config = tiny_realm.config_json(**changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path, tiny_realm.embedder(), config)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json"):
        realm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_realm.config_json()))
    with pytest.raises(UserError, match=r"has no weights; looked for model.safet"):
        realm.load(tmp_path)


def test_a_checkpoint_of_several_files(tmp_path):
    tensors = tiny_realm.encoder()
    whole = load(tmp_path, tensors)
    names = sorted(tensors)
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_realm.config_json()))
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        one = tiny_realm.write(folder / "one", {n: tensors[n] for n in part})
        file = f"model-{number}.safetensors"
        (one / "model.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = realm.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.parts, whole.parts)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="is not a file of its folder"):
        realm.load(folder)


class TestMerge:
    """Several checkpoints as one model."""

    def load(self, tmp_path, name, tensors, **changes):
        config = tiny_realm.config_json(**changes)
        return name, load(tmp_path / name, tensors, config)

    @pytest.mark.parametrize("turned", [False, True])
    def test_embedder_becomes_the_document_tower(self, tmp_path, turned):
        embedder = self.load(tmp_path, "embedder", tiny_realm.embedder(5))
        found = [
            embedder,
            self.load(tmp_path, "encoder", tiny_realm.encoder(6)),
            self.load(tmp_path, "open_qa", tiny_realm.open_qa(7)),
        ]
        merged = realm.merge(found[::-1] if turned else found)
        assert set(merged.parts) == {"query", "document", "encoder", "reader"}
        assert merged.model["tied"] is False
        assert merged.parts["document"] is embedder[1].parts["query"]
        assert merged.vectors is not None

    def test_embedder_stays_tied_beside_an_encoder(self, tmp_path):
        merged = realm.merge(
            [
                self.load(tmp_path, "encoder", tiny_realm.encoder()),
                self.load(tmp_path, "embedder", tiny_realm.embedder()),
            ]
        )
        assert merged.model["tied"] is True

    def test_clashes_are_named(self, tmp_path):
        one = self.load(tmp_path, "one", tiny_realm.embedder())
        two = self.load(tmp_path, "two", tiny_realm.embedder(1))
        with pytest.raises(UserError, match="two: has the part 'query', which one has"):
            realm.merge([one, two])
        three = self.load(tmp_path, "three", tiny_realm.encoder(), hidden_act="gelu")
        with pytest.raises(UserError, match="three: has activation=gelu, but one has"):
            realm.merge([one, three])


def test_writing_undoes_reading(tmp_path):
    tensors = tiny_realm.reader()
    published = load(tmp_path, tensors)
    model = published.model
    export.save(tmp_path / "out", "RealmReader", model, published.parts["reader"])
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # nothing is its owner's alone
    with_names = realm.Tensors.open(tmp_path / "out")
    names = with_names.names()
    assert names == tensors.keys() - set(published.unused)
    for name in names:
        np.testing.assert_array_equal(with_names.take(name), tensors[name])
    export.save(tmp_path / "bert", "BertModel", model, published.parts["reader"])
    bert = realm.load(tmp_path / "bert").parts["bert"]
    wanted = published.parts["reader"]["bert"]
    jax.tree.map(np.testing.assert_array_equal, bert, wanted)


def test_a_tower_of_another_shape_is_not_written(tmp_path):
    published = load(tmp_path, tiny_realm.embedder())
    tower = {k: v for k, v in published.parts["query"].items() if k != "pooler"}
    with pytest.raises(UserError, match="lacks pooler/bias, unlike a RealmEmbedder"):
        export.save(tmp_path / "out", "RealmEmbedder", published.model, tower)
    assert not (tmp_path / "out").exists()
