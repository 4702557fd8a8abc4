"""The shape of a RETRO model, or of the plain decoder it is compared with."""

from __future__ import annotations

import dataclasses

from realm_retro.errors import UserError


@dataclasses.dataclass(frozen=True)
class RetroConfig:
    """Widths, depths and places of a RETRO (Borgeaud et al. 2022, table 2).

    With ``cca_layers=()`` it is the plain decoder of the same size: no encoder, no
    chunked cross-attention, everything else alike.
    """

    vocab_size: int
    num_layers: int  # decoder layers (L)
    model_dim: int  # d
    num_heads: int
    head_dim: int  # num_heads * head_dim need not equal model_dim
    ffw_dim: int  # d_ffw
    chunk_length: int = 64  # m; a neighbour is 2 m = r tokens
    cca_layers: tuple[int, ...] = ()  # P, counted from 1 as in the paper
    encoder_layers: int = 2
    encoder_dim: int = 896  # d'
    encoder_num_heads: int = 14
    encoder_head_dim: int = 64
    encoder_ffw_dim: int = 3584
    encoder_ca_layers: tuple[int, ...] = (1,)  # P_enc, counted from 1
    share_embedding: bool = False  # the encoder reads the decoder's embeddings
    compute_dtype: str = "bfloat16"  # of products; weights and softmax are float32
    remat: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        sizes = (
            "vocab_size num_layers model_dim num_heads head_dim ffw_dim chunk_length"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(
                    f"config.model.{name} is {getattr(self, name)}; at least 1"
                )
        for name in ("model_dim", "encoder_dim"):
            if getattr(self, name) % 2:
                raise UserError(
                    f"config.model.{name} is {getattr(self, name)}; must be even"
                )
        _check_layers("cca_layers", self.cca_layers, self.num_layers)
        if self.cca_layers:
            _check_layers(
                "encoder_ca_layers", self.encoder_ca_layers, self.encoder_layers
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"config.model.compute_dtype is {self.compute_dtype!r};"
                " float32 or bfloat16"
            )

    @property
    def retrieves(self) -> bool:
        """Whether there is anything to retrieve for."""
        return bool(self.cca_layers)

    @property
    def neighbour_length(self) -> int:
        """r: tokens of a neighbour, its chunk and the continuation."""
        return 2 * self.chunk_length


def _check_layers(name: str, layers: tuple[int, ...], depth: int) -> None:
    if list(layers) != sorted(set(layers)):
        raise UserError(f"config.model.{name} is {layers}; must rise, without repeats")
    if layers and not (layers[0] >= 1 and layers[-1] <= depth):
        raise UserError(
            f"config.model.{name} is {layers}; layers are counted from 1 to {depth}"
        )
