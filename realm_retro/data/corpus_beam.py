"""The corpus stage as an Apache Beam pipeline, for corpora beyond one machine.

It writes what `realm_retro.data.datasets.build` writes, to the last byte, on however
many machines the runner has; all of them see the stage's folder under one path. Each
worker reads files (or ranges of rows) as they come; a document's number, which decides
its place, is made of its file's and of its place in the file.

With `config.dedupe` the text passes through the runner's shuffle once more than
without (as shingles, to be compared), each document is named in `MinHash.bands` groups,
and each pair to compare brings two sets of shingles together.

Nothing here is imported from Beam before it is used: it is an extra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from realm_retro import artifacts
from realm_retro.data import beam_steps, datasets, dedupe_writer, records
from realm_retro.data import dedupe as dedupe_lib
from realm_retro.data.corpus import CorpusConfig, Report
from realm_retro.data.datasets import Part
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

INSTALL = "pip install 'realm_retro[beam]'"
# Beam's own DirectRunner would first try to download a program of another language.
LOCAL = {"directrunner": "FnApiRunner", "direct": "FnApiRunner"}


# What Beam says of a worker's exception is its traceback.
_USER_ERROR = re.compile(r"realm_retro\.errors\.UserError: (.*)")
_DISK_ERROR = re.compile(r"(?:OSError|PermissionError): \[Errno (\d+)\] (.*)")
_WHERE = re.compile(r" \[while running '.*")

Collection: TypeAlias = Any  # Beam's PCollection


def build(
    config: CorpusConfig,
    dedupe: DedupeConfig,
    stage: artifacts.Stage,
    *,
    runner: str = "DirectRunner",
    flags: Sequence[str] = (),
) -> Report:
    """Writes the configured source as a corpus, but does not commit it.

    Args:
      config: the source.
      dedupe: which documents to drop.
      stage: of the corpus.
      runner: a name that Beam knows.
      flags: for Beam and the runner, ``name=value``.

    Raises:
      UserError: Beam is not installed or refuses a flag; otherwise as `datasets.build`.
    """
    beam = _beam()
    options = _options(runner, flags)
    stage.restart()
    records.clear(stage.directory)
    report = Report()
    parts = dict(enumerate(datasets.parts_of(config, report)))
    if dedupe.paths:
        with dedupe_lib.naming_evaluation():
            sets = datasets.parts_of(dedupe.evaluation, Report())
        parts |= dict(enumerate(sets, start=-len(sets)))
    folder = dedupe_writer.scratch(stage)
    name = LOCAL.get(runner.lower(), runner)
    pipeline = beam.Pipeline(runner=name, options=options)
    _construct(pipeline, parts, config, dedupe, folder)
    with _readable_errors():
        pipeline.run().wait_until_finish()
    result = json.loads((folder / beam_steps.RESULT).read_text())
    _take(result["report"], report)
    if not report.documents:
        raise datasets.no_text(config, report)
    counts = result["counts"]
    if dedupe.paths and not counts["evaluation_documents"]:
        raise dedupe_lib.no_evaluation_text(dedupe)
    dedupe_writer.publish(
        stage, folder, result["shards"], report, **(counts if dedupe.enabled else {})
    )
    return report


def _beam() -> Any:
    try:
        # It warns of each cloud whose libraries are not there.
        logging.disable(logging.WARNING)
        import apache_beam  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise UserError(f"Apache Beam is not installed; run: {INSTALL}") from None
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def _options(runner: str, flags: Sequence[str]) -> Any:
    """Beam's options; flags that it does not know itself are for the runner."""
    from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
        PipelineOptions,
    )
    from apache_beam.runners import (  # pyright: ignore[reportMissingImports]
        runner as runners,
    )

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions([f"--{flag}" for flag in flags])
            known = options.get_all_options(retain_unknown_options=True)
            unknown = set(known) - set(PipelineOptions([]).get_all_options())
    except SystemExit:
        raise UserError(f"--beam: {said.getvalue().splitlines()[-1]}") from None
    if unknown and runner.lower() in LOCAL:
        raise UserError(f"--beam={min(unknown)}: Beam's {runner} has no such flag")
    try:
        runners.create_runner(LOCAL.get(runner.lower(), runner))
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner={runner}: {error}") from None
    return options


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Raises a worker's error of the user or of the disk as what it was."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    # What it would log of an exception is in the exception that it raises.
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except OSError:
        raise
    except UserError as error:
        raise UserError(_WHERE.sub("", str(error))) from None
    except Exception as error:
        if found := _USER_ERROR.search(str(error)):
            raise UserError(_WHERE.sub("", found[1])) from None
        if found := _DISK_ERROR.search(str(error)):
            raise OSError(int(found[1]), _WHERE.sub("", found[2])) from error
        raise
    finally:
        logger.setLevel(level)


def _construct(
    pipeline: Any,
    parts: Mapping[int, Part],
    config: CorpusConfig,
    dedupe: DedupeConfig,
    folder: epath.Path,
) -> None:
    """Adds all steps; the last one writes `beam_steps.RESULT`."""
    beam = _beam()
    elements = [(number, dataclasses.astuple(part)) for number, part in parts.items()]
    read = (
        pipeline
        | "Parts" >> beam.Create(elements, reshuffle=True)
        | "Read" >> _tagged(beam_steps.read, "reports", config=config, dedupe=dedupe)
    )
    # A file is read in one place; what follows is spread anew.
    documents = read.documents | "Spread" >> beam.Reshuffle()
    report = (
        read.reports
        | "Summaries" >> beam.Map(beam_steps.summary_of)
        | "Sum" >> beam.CombineGlobally(beam_steps.add_up)
    )
    starts = (
        read.reports
        | "Counts" >> beam.Map(beam_steps.count_of)
        | "All counts" >> beam.combiners.ToList()
        | "Starts" >> beam.Map(beam_steps.starts_of)
    )
    _ = (
        documents
        | "Ids" >> beam.FlatMap(beam_steps.by_id)
        | "By id" >> beam.GroupByKey()
        | "Refuse same ids" >> beam.Map(beam_steps.refuse_same_id)
    )
    by_shard = functools.partial(
        beam.FlatMap, beam_steps.by_shard, starts=beam.pvalue.AsSingleton(starts)
    )
    found = {"documents": documents | "Place" >> by_shard()}
    counts: dict[str, Collection] = {}
    if dedupe.enabled:
        marks, counts = _marks(documents, dedupe)
        found["dropped"] = marks | "Place marks" >> by_shard()
    shards = (
        found
        | "By shard" >> beam.CoGroupByKey()
        | "Write" >> beam.Map(beam_steps.write_shard, folder=str(folder))
    )
    _ = (
        pipeline
        | "End" >> beam.Create([0])
        | "Result"
        >> beam.Map(
            beam_steps.write_result,
            folder=str(folder),
            shards=beam.pvalue.AsList(shards),
            report=beam.pvalue.AsSingleton(report),
            **{name: beam.pvalue.AsSingleton(count) for name, count in counts.items()},
        )
    )


def _marks(
    documents: Collection, dedupe: DedupeConfig
) -> tuple[Collection, dict[str, Collection]]:
    """What to drop, as (number, `dedupe.Dropped`); and counts, one value each."""
    beam = _beam()
    sketches = documents | "Sketch" >> _tagged(
        beam_steps.sketches_of, "words", "groups", main="shingles", dedupe=dedupe
    )
    same = (
        sketches.words
        | "By words" >> beam.GroupByKey()
        | "Same words" >> beam.FlatMap(beam_steps.marks_of_same_words)
    )
    groups = (
        sketches.groups
        | "By band" >> beam.GroupByKey()
        | "Pairs" >> _tagged(beam_steps.pairs_of, "left_out", main="pairs")
    )
    pairs = groups.pairs | "Each pair once" >> beam.Distinct()
    near = (
        {
            "shingles": sketches.shingles,
            "pairs": pairs | "Ends" >> beam.FlatMap(beam_steps.ends_of),
        }
        | "By document" >> beam.CoGroupByKey()
        | "Bring" >> beam.FlatMap(beam_steps.shingles_by_pair)
        | "By pair" >> beam.GroupByKey()
        | "Compare" >> beam.FlatMap(beam_steps.mark_of_pair, dedupe=dedupe)
    )
    first = (
        (same, near)
        | "All marks" >> beam.Flatten()
        | "First" >> beam.CombinePerKey(min)
        | "By other" >> beam.Map(beam_steps.by_other)
    )
    named = (
        {"ids": documents | "Id of each" >> beam.Map(beam_steps.id_of), "marks": first}
        | "With ids" >> beam.CoGroupByKey()
        | "Name" >> beam.FlatMap(beam_steps.name_others)
    )
    return named, {
        "pairs_compared": pairs | "Count pairs" >> beam.combiners.Count.Globally(),
        "pairs_left_out": groups.left_out | "Left out" >> beam.CombineGlobally(sum),
    }


def _tagged(function: Any, *tags: str, main: str = "documents", **settings: Any) -> Any:
    """A step with several outputs."""
    return _beam().FlatMap(function, **settings).with_outputs(*tags, main=main)


def _take(total: JsonDict, report: Report) -> None:
    """Adds up what the launcher and the workers reported."""
    for field in dataclasses.fields(report):
        value = total[field.name]
        if field.name == "invalid_utf8_in":
            report.invalid_utf8_in = [place for _, place in value]
        elif isinstance(value, int):
            setattr(report, field.name, getattr(report, field.name) + value)
        elif value:
            setattr(report, field.name, value)
