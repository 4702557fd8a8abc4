"""From a question to an answer with its evidence: evaluation's engine and a user's.

What is reported of a question x, its passages z (the K best and, where the document
tower is at hand, the null document ∅) and its spans s:

    p(z | x) = softmax of f(x, z) over these passages         (section 3.2)
    p(y | x) = Σ e^{S(z, s)} / Σ_{z, s legal} e^{S(z, s)}     over the spans that read y

The answer is the text of the most probable span, as it stands in the passage, never
put together again from wordpieces. Its p(y | x) sums, of the best spans, those with the
same words: how one is capitalised does not split it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from realm_retro.data.passages import PassageStore
from realm_retro.parallel import axes
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import model, packing, qa, question_batches, reader, search
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.evidence import Answer, Evidence, Retrieved, Seconds
from realm_retro.retrieval.index.base import MISSING_ID, Index
from realm_retro.text import answers
from realm_retro.typing import Array, Batch, Float, HostArray, Params

# Spans of a question that are looked at: the best, and those with its words.
_SPANS = 20
# Inputs are cut to the longest of a batch, in steps, so that few programs are compiled.
_SHORTEST = 16

_READ_SPEC = {
    "query": ("batch", "length"),
    "query_len": ("batch",),
    "scores": ("batch", "neighbours"),
    "beam_valid": ("batch", "neighbours"),
    "slots": ("batch", "neighbours"),
    "body": ("batch", "neighbours", "length"),
    "body_len": ("batch", "neighbours"),
}


class Answerer:
    """Answers questions over one corpus, with one model and index."""

    def __init__(
        self,
        config: RealmConfig,
        params: Params,
        store: PassageStore,
        index: Index,
        *,
        read: int = 5,
        batch_size: int = 8,
        mesh: Mesh | None = None,
    ):
        """Lays the parameters out on the devices.

        Args:
          config: the model's.
          params: the part ``query``; with ``reader`` questions are answered, else
            passages are found only; with a document tower there is a null mass.
          store: the passages.
          index: of their vectors, for inner products; ids are rows.
          read: passages that are read for a question (K).
          batch_size: questions that are read at a time.
          mesh: the devices that share a batch; all of this process if None.

        Raises:
          UserError: passages, index and model do not fit together.
        """
        question_batches.check_fits(config, store, (index.size, index.dim))
        self.config, self.store, self.index = config, store, index
        self._k, self._batch_size = read, batch_size
        self._mesh = mesh or make_mesh(devices=jax.local_devices())
        everywhere = axes.sharding((), (), self._mesh)
        self._params = {
            part: jax.device_put(params[part], everywhere)
            for part in ("query", "reader")
            if part in params
        }
        tower = "query" if config.tied else "document"
        self._null = None
        if tower in params:
            placed = jax.device_put({tower: params[tower]}, everywhere)
            self._null = np.asarray(_null_vector(config, placed))

    @property
    def reads(self) -> bool:
        """Whether there is a reader."""
        return "reader" in self._params

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """Answers questions, in order."""
        found = self.retrieve(questions, self._k)
        return [answer for part in self.read(questions, found) for answer in part]

    def retrieve(self, questions: Sequence[str], k: int) -> Retrieved:
        """The k best passages of each question, by f(x, z)."""
        times = [time.perf_counter()]
        query, lengths, cut = self._tokenise(questions)
        times.append(time.perf_counter())
        tower = {"query": self._params["query"]}
        vectors = search.embed_all_queries(self.config, tower, query, lengths)
        times.append(time.perf_counter())
        hits = self.index.search(vectors, k)
        times.append(time.perf_counter())
        scores = hits.scores * np.float32(self.config.score_scale)
        seconds = Seconds(*np.diff(times).tolist())
        return Retrieved(query, lengths, cut, vectors, hits.ids, scores, seconds)

    def read(
        self, questions: Sequence[str], found: Retrieved
    ) -> Iterator[list[Answer]]:
        """Answers from the first K passages that were found; yields batch by batch."""
        for start in range(0, len(questions), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield self._read(questions[part], found[part])

    def _read(self, questions: Sequence[str], found: Retrieved) -> list[Answer]:
        started = time.perf_counter()
        ids, scores = found.ids[:, : self._k], found.scores[:, : self._k]
        rows = np.unique(ids[ids != MISSING_ID])
        texts = dict(zip(rows.tolist(), self.store.texts(rows), strict=True))
        batch = self._batch(found, ids, scores) if self.reads else None
        gathered = time.perf_counter()
        spans = None
        if batch is not None:
            outputs = _best_spans(
                self.config, _count(self.config, batch), self._params, batch
            )
            slot, start, end, log_prob = (
                np.asarray(x)[: len(questions)] for x in outputs
            )
            spans = self._spans(ids, slot, start, end, log_prob, texts)
        seconds = found.seconds + Seconds(
            gather=gathered - started, read=time.perf_counter() - gathered
        )
        prior, null = self._prior(found.vectors, scores)
        given = []
        for i, question in enumerate(questions):
            text, probability, marked = _chosen(None if spans is None else spans[i])
            passages = self._evidence(ids[i], scores[i], prior[i], texts, marked)
            given.append(
                Answer(
                    question=question,
                    text=text,
                    probability=probability,
                    passages=passages,
                    null_mass=None if null is None else float(null[i]),
                    seconds=seconds * (1 / len(questions)),
                    cut=bool(found.cut[i]),
                )
            )
        return given

    def _tokenise(
        self, questions: Sequence[str]
    ) -> tuple[HostArray, HostArray, HostArray]:
        def tokenise(texts: Sequence[str]) -> tuple[HostArray, HostArray, int]:
            return search.tokenise_questions(self.config, self.store.tokenizer, texts)

        query, lengths, cut = tokenise(questions)
        # Which ones were cut is seldom asked: it is found out one by one.
        which = [cut > 0 and tokenise([question])[2] > 0 for question in questions]
        return query, lengths, np.array(which, bool)

    def _batch(self, found: Retrieved, ids: HostArray, scores: HostArray) -> Batch:
        """What `qa.read` takes, on the devices; few shapes, each a program."""
        there = ids != MISSING_ID
        longest = int(self.store.lengths[ids[there]].max(initial=1))
        q = _step(int(found.query_len.max(initial=1)), self.config.query_length)
        n = _step(longest, self.config.body_length)
        arrays = {
            "query": found.query[:, :q],
            "query_len": found.query_len,
            "scores": np.where(there, scores, 0),
            "beam_valid": there,
            "slots": np.broadcast_to(
                np.arange(ids.shape[1], dtype=np.int32), ids.shape
            ),
            **question_batches.bodies(self.store, ids, n),
        }
        size = min(self._batch_size, 1 << (len(ids) - 1).bit_length())
        placed = {}
        for name, x in arrays.items():
            x = np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
            sharding = axes.sharding(_READ_SPEC[name], x.shape, self._mesh)
            placed[name] = jax.device_put(x, sharding)
        return placed

    def _spans(
        self,
        ids: HostArray,
        passage: HostArray,
        start: HostArray,
        end: HostArray,
        log_prob: HostArray,
        texts: Mapping[int, str],
    ) -> list[list[_Span]]:
        """The best spans of each question as text; arrays as `_best_spans` gives."""
        there = log_prob > -np.inf
        rows = np.take_along_axis(ids, passage.astype(np.int64), axis=1)
        known = np.unique(rows[there])
        places = dict(
            zip(known.tolist(), self.store.token_spans_of(known), strict=True)
        )
        spans: list[list[_Span]] = [[] for _ in ids]
        for i, j in np.argwhere(there):
            row = int(rows[i, j])
            first = int(places[row][start[i, j], 0])
            last = int(places[row][end[i, j] - 1, 1])
            probability = float(np.exp(log_prob[i, j]))
            spans[i].append(
                _Span.cut(int(passage[i, j]), texts[row], first, last, probability)
            )
        return spans

    def _evidence(
        self,
        ids: HostArray,
        scores: HostArray,
        prior: HostArray,
        texts: Mapping[int, str],
        marked: Mapping[int, tuple[int, int]],
    ) -> tuple[Evidence, ...]:
        store = self.store
        return tuple(
            Evidence(
                row=row,
                document=store.document_id(int(store.document[row])),
                title=store.title(row),
                text=texts[row],
                score=float(scores[slot]),
                probability=float(prior[slot]),
                span=marked.get(slot),
            )
            for slot, row in enumerate(ids.tolist())
            if row != MISSING_ID
        )

    def _prior(
        self, vectors: HostArray, scores: HostArray
    ) -> tuple[HostArray, HostArray | None]:
        """p(z | x) [n, k] and p(∅ | x) [n]; see the module docstring."""
        logits, k = scores.astype(np.float64), scores.shape[1]
        if self._null is not None:
            null = self.config.score_scale * (vectors @ self._null).astype(np.float64)
            logits = np.concatenate([logits, null[:, None]], axis=1)
        top = np.max(logits, axis=1, keepdims=True)
        # Where nothing was found and there is no null document, all are −inf.
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
        total = weights.sum(axis=1, keepdims=True)
        prior = weights / np.where(total > 0, total, 1)
        return prior[:, :k], None if self._null is None else prior[:, k]


class _Span(NamedTuple):
    """A span as text.

    Attributes:
      slot: which of the K passages.
      text: as it stands there.
      chars: [start, end) in characters of the passage.
      words: what makes two spans the same answer.
      probability: p(z, s | x).
    """

    slot: int
    text: str
    chars: tuple[int, int]
    words: str
    probability: float

    @classmethod
    def cut(
        cls, slot: int, passage: str, start: int, end: int, probability: float
    ) -> _Span:
        """From bytes of the passage's UTF-8."""
        encoded = passage.encode()
        text = encoded[start:end].decode()
        first = len(encoded[:start].decode())
        words = answers.normalise(text) or text
        return cls(slot, text, (first, first + len(text)), words, probability)


def _chosen(
    spans: Sequence[_Span] | None,
) -> tuple[str | None, float | None, dict[int, tuple[int, int]]]:
    """The answer, its probability, and where it stands in each passage (by slot).

    Args:
      spans: best first; None without a reader.
    """
    if spans is None:
        return None, None, {}
    same = [span for span in spans if span.words == spans[0].words]
    # Of a passage the best comes last, and stays.
    marked = {span.slot: span.chars for span in reversed(same)}
    probability = sum(span.probability for span in same)
    return same[0].text if same else "", probability, marked


@functools.partial(jax.jit, static_argnums=(0, 1))
def _best_spans(
    config: RealmConfig, count: int, params: Params, batch: Batch
) -> tuple[Array, ...]:
    """(passage, start, end, log p) of the best spans, [batch, count] each.

    Start and end are wordpieces of the body; log p is −inf where there are fewer.
    """
    logits, scores, legal = qa.read(config, params, batch, batch["scores"])
    best = qa.best_span(logits, scores, legal, count)
    start, end = qa.body_spans(
        batch["query_len"], best.span, _tokens(batch), config.span_width
    )
    return best.passage, start, end, best.log_prob


@functools.partial(jax.jit, static_argnums=0)
def _null_vector(config: RealmConfig, params: Params) -> Float[Array, " d"]:
    nothing, zero = jnp.zeros((1, 0), jnp.int32), jnp.zeros(1, jnp.int32)
    with jax.default_matmul_precision("float32"):
        ids, mask = packing.document_inputs(nothing, zero, nothing, zero)
        return model.embed_documents(config, params, ids[:, :2], mask[:, :2])[0]


def _count(config: RealmConfig, batch: Batch) -> int:
    spans = len(reader.spans(_tokens(batch), config.span_width))
    return min(_SPANS, batch["slots"].shape[1] * spans)


def _tokens(batch: Batch) -> int:
    """Of the joint input; lengths may be less than the config's."""
    return batch["query"].shape[1] + batch["body"].shape[2] + 3


def _step(length: int, most: int) -> int:
    """The next power of two from 16 on, and at most the model's length."""
    return min(most, max(_SHORTEST, 1 << (length - 1).bit_length()))
