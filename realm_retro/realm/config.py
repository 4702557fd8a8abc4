"""The shape of a REALM: three BERTs of one size, and how they are put to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from realm_retro import artifacts
from realm_retro.nn.bert import ACTIVATIONS, BertConfig

# Of the vocabulary that bert-base-uncased and its descendants share.
PAD_ID = 0
CLS_ID = 101
SEP_ID = 102
MASK_ID = 103

POOLINGS = ("cls", "mean")
MARGINALS = ("joint", "per_token")

# What a passage's vector does not depend on, given the tower's weights. Any other
# setting does change it, one that is yet to come included.
_NOT_OF_VECTORS = frozenset(
    [
        "title_length",
        "body_length",
        "score_scale",
        "dropout",
        "marginal",
        "candidates",
        "query_length",
        "max_masks",
        "span_width",
        "span_hidden",
        "remat",
    ]
)


@dataclasses.dataclass(frozen=True)
class RealmConfig:
    """Sizes, lengths and choices of a REALM (section ``model`` of a config).

    The query tower, the document tower, the knowledge-augmented encoder and the
    reader are BERTs of this one shape, so that one checkpoint can start them all.

    Attributes:
      width: size of a hidden state.
      num_layers: layers of each BERT.
      num_heads: heads; they divide `width`.
      hidden: width inside the feed-forward block.
      title_length: wordpieces of a title, without special tokens.
      body_length: wordpieces of a passage's body, likewise.
      vocab_size: rows of the token embedding.
      max_positions: longest input of a BERT in tokens, special ones included.
      activation: one of `ACTIVATIONS`, in the BERTs and in the masked-LM head.
      epsilon: of the layer norms, except the reader's.
      embed_dim: size of a retrieval vector (d); 0 leaves out the projection and keeps
        `width`.
      pooling: ``cls`` (the paper) or ``mean`` over real tokens (sentence encoders).
      pooler: a tanh layer between pooling and projection, as in the published weights.
      projection_norm: a layer norm behind the projection. The released code has it,
        the paper does not; without it scores start larger.
      normalise: vectors of length 1, as sentence encoders are trained; scores are then
        cosines and want a `score_scale` of about 20.
      score_scale: times the inner product of the two vectors, before the softmax.
      document_types: segment 0 for the title and 1 for the body in the document tower,
        as in the released code; False: all 0.
      tied: one tower for queries and documents.
      dropout: of the projected vectors while training, never for search or an index.
      marginal: what the loss sums over documents: ``joint``, the paper's product over
        all masked tokens, or ``per_token``, the released code's.
      candidates: documents that an example is marginalised over (k), the null
        document included.
      query_length: wordpieces of a masked query or a question, without special tokens.
      max_masks: targets of an example (J).
      span_width: tokens of the longest answer that the reader can give.
      span_hidden: width inside the reader's span scorer.
      compute_dtype: dtype of the products in the BERTs; weights, vectors, scores and
        every softmax are float32.
      remat: keep only the inputs of the BERTs' layers for the backward pass and compute
        the rest anew: a third more work, and a fraction of the memory.
    """

    width: int
    num_layers: int
    num_heads: int
    hidden: int
    title_length: int
    body_length: int
    vocab_size: int = 30522
    max_positions: int = 512
    activation: str = "gelu"
    epsilon: float = 1e-12
    embed_dim: int = 128
    pooling: str = "cls"
    pooler: bool = False
    projection_norm: bool = True
    normalise: bool = False
    score_scale: float = 1.0
    document_types: bool = False
    tied: bool = False
    dropout: float = 0.0
    marginal: str = "joint"
    candidates: int = 8
    query_length: int = 64
    max_masks: int = 10
    span_width: int = 10
    span_hidden: int = 256
    compute_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "vocab_size width num_layers num_heads hidden max_positions candidates"
            " query_length body_length max_masks span_width span_hidden"
        )
        _at_least(self, at_least_one.split(), 1)
        _at_least(self, ("embed_dim", "title_length", "dropout"), 0)
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}"
            )
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("marginal", self.marginal, MARGINALS)
        _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} must be below 1")
        if self.score_scale <= 0:
            raise ValueError(f"score_scale={self.score_scale} must be positive")
        longest = max(self.document_tokens, self.joint_tokens)
        if longest > self.max_positions:
            raise ValueError(
                f"query_length={self.query_length}, title_length={self.title_length}"
                f" and body_length={self.body_length} make inputs of {longest} tokens,"
                f" but max_positions={self.max_positions}; lower a length"
            )

    @property
    def bert(self) -> BertConfig:
        """The shape that all BERTs share."""
        return BertConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden=self.hidden,
            max_positions=self.max_positions,
            activation=self.activation,
            epsilon=self.epsilon,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
        )

    @property
    def embedder_fingerprint(self) -> str:
        """Of the settings that decide which vectors a document tower's weights give.

        The lengths are not among them: passages say theirs themselves.
        """
        values = dataclasses.asdict(self)
        return artifacts.fingerprint_of(
            {name: values[name] for name in values if name not in _NOT_OF_VECTORS}
        )

    @property
    def vector_dim(self) -> int:
        """Size of a retrieval vector."""
        return self.embed_dim or self.width

    @property
    def query_tokens(self) -> int:
        """Tokens of ``[CLS] x [SEP]``."""
        return self.query_length + 2

    @property
    def document_tokens(self) -> int:
        """Tokens of ``[CLS] title [SEP] body [SEP]``."""
        return self.title_length + self.body_length + 3

    @property
    def joint_tokens(self) -> int:
        """Tokens of ``[CLS] x [SEP] body [SEP]``."""
        return self.query_length + self.body_length + 3


def _at_least(config: RealmConfig, names: Sequence[str], low: int) -> None:
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {low}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
