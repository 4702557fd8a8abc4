"""Live retrieval: texts in, ids and scores of the nearest chunks out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from realm_retro.retrieval.embed import TextEncoder
from realm_retro.retrieval.index.base import Index, SearchResult


@dataclasses.dataclass(frozen=True)
class Retriever:
    """An index and the encoder that its vectors came from.

    Attributes:
      index: searched.
      encoder: embeds the texts that ask.
    """

    index: Index
    encoder: TextEncoder

    def search_texts(self, texts: Sequence[str], k: int) -> SearchResult:
        """The k nearest chunks of each text; ids and scores [texts, k]."""
        return self.index.search(self.encoder.encode(list(texts)), k)
