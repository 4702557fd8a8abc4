r"""Finds the salient spans of every passage: names and dates, which pre-training masks.

Reads   WORKDIR/passages
Writes  WORKDIR/spans   the spans of each passage in its wordpieces

Example:
  python -m realm_retro.cli.tag_spans --config=configs/realm/quickstart.py \
      --workdir=/tmp/realm --config.spans.tagger=rules

With the extra `spans` a trained tagger is taken, else rules about capital letters;
config.spans.tagger=annotations reads spans that another program found. An interrupted
run resumes at the first missing shard of config.spans.shard_passages passages.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import ml_collections
import numpy as np
from etils import epath

from realm_retro import artifacts, disk, progress
from realm_retro import config as config_lib
from realm_retro.cli import common
from realm_retro.data import annotations, span_store
from realm_retro.data.chunk_store import shard_name
from realm_retro.data.passages import PassageStore
from realm_retro.data.span_store import SpansConfig
from realm_retro.errors import UserError
from realm_retro.text import spans as spans_lib
from realm_retro.text.spans import Spans
from realm_retro.typing import HostArray, JsonDict

# Passages that are tagged, and tokenised, at a time.
_GROUP = 256
_COUNTED: tuple[str, ...] = (
    "spans",
    "passages_without",
    "too_long",
    "widened",
    "empty",
    "straddling",
)

# Rows of passages and their texts → the spans of each, and how many straddle a border.
Finder = Callable[[HostArray, list[str]], tuple[list[Spans], int]]


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    section = config_lib.section(config, "spans")
    spans_config = config_lib.build(SpansConfig, section, name="config.spans")
    store = PassageStore.open(workdir / "passages")
    directory = workdir / "spans"
    finished = disk.there(directory / artifacts.MANIFEST)
    if spans_config.tagger == "default" and finished:
        # Whichever tagger it was that the default stood for.
        found = span_store.load_manifest(
            directory, parents={"passages": store.fingerprint}, verify=False
        )
        _say_finished(found)
        return
    name, finder, meta = _finder(spans_config, store)
    stage = span_store.open_stage(
        directory,
        config=_settings(spans_config, name),
        passages_fingerprint=store.fingerprint,
    )
    if stage.finished:
        _say_finished(span_store.load_manifest(directory, verify=False))
        return
    # Said aloud, the tokenizer's threads do not warn when something forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    started = time.monotonic()
    counts = write_shards(store, finder, spans_config, stage)
    _commit(stage, counts, {**meta, "tagger": name}, time.monotonic() - started)


def write_shards(
    store: PassageStore, finder: Finder, config: SpansConfig, stage: artifacts.Stage
) -> JsonDict:
    """Tags the passages of each shard that is not there yet.

    Returns:
      The counts for the manifest, of this and earlier runs.
    """
    size = config.shard_passages
    num_shards = -(-len(store) // size)
    totals = {"num_shards": num_shards, "passages": len(store)}
    totals |= dict.fromkeys(_COUNTED, 0)
    with progress.bar(total=len(store), unit="passages", label="spans") as bar:
        for shard in range(num_shards):
            rows = np.arange(shard * size, min((shard + 1) * size, len(store)))
            name = f"shard-{shard:05d}"
            parts = [shard_name(part, shard, num_shards) for part in span_store.PARTS]
            if all(stage.has(part) for part in parts):
                bar.update(len(rows))
            else:
                counts = dict.fromkeys(_COUNTED, 0)
                found = []
                for group in np.split(rows, range(_GROUP, len(rows), _GROUP)):
                    found += _tag(store, group, finder, config.max_masks, counts)
                    bar.update(len(group))
                # Before the files: what was counted is there wherever they are.
                stage.note(name, counts)
                span_store.write_shard(stage, shard, num_shards, found)
            for key, count in (stage.noted(name) or {}).items():
                totals[key] += count
    return totals


def _tag(
    store: PassageStore,
    rows: HostArray,
    finder: Finder,
    max_masks: int,
    counts: dict[str, int],
) -> Iterator[HostArray]:
    tagged, straddling = finder(rows, store.texts(rows))
    counts["straddling"] += straddling
    positions = store.token_spans_of(rows)
    for row, spans, pieces in zip(rows.tolist(), tagged, positions, strict=True):
        continues = store.continuations[store.body[row][: len(pieces)]]
        aligned = span_store.align(spans, pieces, continues)
        widths = aligned.spans[:, 1] - aligned.spans[:, 0]
        counts["spans"] += len(widths)
        counts["passages_without"] += not len(widths)
        counts["too_long"] += int((widths > max_masks).sum())
        counts["widened"] += aligned.widened
        counts["empty"] += aligned.empty
        yield aligned.spans


def _finder(config: SpansConfig, store: PassageStore) -> tuple[str, Finder, JsonDict]:
    """The name of what finds the spans, the finder, and what to note of it."""
    if config.tagger == "annotations":
        return _annotated(config, store)
    if config.tagger == "default":
        name, tagger = spans_lib.default_tagger(common.say)
    elif config.tagger == "spacy":
        name, tagger = "spacy", spans_lib.spacy_tagger()
    else:
        name, tagger = "rules", spans_lib.rule_tagger
    return name, lambda rows, texts: (tagger(texts), 0), {}


def _annotated(
    config: SpansConfig, store: PassageStore
) -> tuple[str, Finder, JsonDict]:
    found = annotations.read(config.path, store)
    bare = store.num_documents - len(found.by_document)
    if not found.by_document:
        raise UserError(
            f"{config.path}: annotates none of the {store.num_documents} documents;"
            " its ids must be those of the corpus (config.corpus.id_field)"
        )

    def finder(rows: HostArray, texts: list[str]) -> tuple[list[Spans], int]:
        results = [
            found.of_passage(document, start, end)
            for document, (start, end) in zip(
                store.document[rows].tolist(),
                store.byte_offsets[rows].tolist(),
                strict=True,
            )
        ]
        return [spans for spans, _ in results], sum(cut for _, cut in results)

    meta = {"unannotated_documents": bare, "unknown_ids": found.unknown}
    return "annotations", finder, meta


def _settings(config: SpansConfig, name: str) -> JsonDict:
    settings = {**dataclasses.asdict(config), "tagger": name}
    if config.path:
        # What matters is what it says, not where it lies.
        settings["path"] = artifacts.sha256(epath.Path(config.path).expanduser())
    return settings


def _say_finished(manifest: artifacts.Manifest) -> None:
    common.say(
        f"spans: finished already, {manifest.meta['spans']:,} spans in"
        f" {manifest.directory}"
    )


def _commit(
    stage: artifacts.Stage, counts: JsonDict, meta: JsonDict, seconds: float
) -> None:
    stage.commit({**counts, **meta, "seconds": round(seconds, 2)})
    common.say(
        f"spans: {counts['spans']:,} spans in {counts['passages']:,} passages by"
        f" {meta['tagger']} in {seconds:.1f} s"
        f" ({counts['passages'] / seconds:,.0f} passages/s)"
    )
    said = {
        "passages_without": "passages have no span",
        "too_long": "spans are longer than config.spans.max_masks and never masked",
        "widened": "spans began or ended within a word and were widened to whole words",
        "empty": "spans hold no wordpiece and were left out",
        "straddling": "spans go beyond the end of a passage and were left out",
        "unannotated_documents": "documents have no annotation",
        "unknown_ids": "annotations are of documents that the corpus does not have",
    }
    for name, text in said.items():
        if count := {**counts, **meta}.get(name):
            common.say(f"spans: {count:,} {text}")
    if not counts["spans"]:
        common.say("spans: there is nothing to mask; try another config.spans.tagger")


def entry() -> None:
    """Console script."""
    common.run(main, name="tag_spans")


if __name__ == "__main__":
    entry()
