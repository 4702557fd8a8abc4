"""Suite ``memory``: peak memory of stages against the size of the corpus.

Each stage runs as a process of its own, as a user starts it, on made-up corpora of
several sizes. Besides the whole peak the suite tells what a process holds for itself,
without the pages of files that it maps: the system takes those back when it needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.cli import common, quickstart_report, quickstart_stages
from realm_retro.cli.benchmarks import children, corpus, report, workdirs
from realm_retro.cli.benchmarks.children import Usage
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.errors import UserError
from realm_retro.typing import Config, JsonDict

# The peak at the largest size over that at the smallest.
TARGET = 1.10
SUITE = "memory"

# Stage → what it reads.
_READS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "embed": ("chunks",),
    "build_index": ("chunks", "embeddings"),
    "find_neighbours": ("chunks", "embeddings", "index"),
}
# The index is built on a sample whose size does not grow: it is run, not measured.
MEASURED = ("prepare", "embed", "find_neighbours")
# Less than the smallest corpus has, so that each trains its tokenizer on as much.
_SAMPLE_BYTES_OF_A_DOCUMENT = 600


@dataclasses.dataclass(frozen=True)
class _Size:
    """A corpus of one size, and what is made of it.

    Attributes:
      scale: how many times the smallest.
      folder: all stages have run here.
      config: of its stages.
    """

    scale: int
    folder: epath.Path
    config: Config

    @property
    def chunks(self) -> int:
        """In the corpus."""
        return int(_manifest(self.folder / "chunks")["meta"]["chunks"])

    @property
    def index(self) -> tuple[float, int]:
        """Megabytes of the index's files, and how many parts it is in."""
        manifest = _manifest(self.folder / "index")
        files = manifest["files"].values()
        return sum(file["bytes"] for file in files) / 1e6, manifest["meta"].get(
            "parts", 1
        )


def measure(
    config: Config,
    workdir: epath.Path,
    *,
    documents: int,
    scales: Sequence[int],
    rounds: int,
) -> Report:
    """Runs the suite.

    Args:
      config: of a RETRO; its corpus and tokenizer are replaced.
      workdir: for the corpora, which are gone at the end.
      documents: of the smallest corpus.
      scales: sizes, as multiples of that; ascending.
      rounds: how often each stage is measured at each size.

    Raises:
      UserError: the config is of another kind, or a stage failed.
    """
    if quickstart_stages.is_realm(config):
        raise UserError(
            f"--suite={SUITE} measures {', '.join(MEASURED)}, which are stages of"
            " RETRO; take for instance configs/retro/quickstart.py"
        )
    log = workdirs.log_file(workdir, SUITE)
    used: dict[tuple[str, int], list[Usage]] = {}
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=workdir) as folder:
        sizes = [
            _make(config, epath.Path(folder), documents, scale) for scale in scales
        ]
        for number in range(1, rounds + 1):
            for size in sizes:
                for stage, usage in _round(size, number, log):
                    used.setdefault((stage, size.scale), []).append(usage)
        return _report(sizes, used, documents)


def _make(config: Config, folder: epath.Path, documents: int, scale: int) -> _Size:
    """Writes a corpus, and the config of its stages."""
    place = folder / f"x{scale}"
    place.mkdir()
    path = place / "documents.jsonl"
    corpus.write(path, documents * scale)
    own_tokenizer = config_lib.section(config, "tokenizer").get("model")
    config = workdirs.changed(
        config,
        corpus={"source": "text_files", "path": str(path), "id_field": "id"},
        tokenizer={} if own_tokenizer else _tokenizer(documents),
        **_units(config, documents),
    )
    workdirs.config_file(config, place)
    return _Size(scale, place, config)


def _tokenizer(documents: int) -> JsonDict:
    """Trained on as much text at each size; the smallest corpus has more."""
    size = documents * _SAMPLE_BYTES_OF_A_DOCUMENT
    return {"vocab_size": 512, "sample_bytes": size}


def _units(config: Config, documents: int) -> JsonDict:
    """What stages do at a time, cut so that the smallest corpus is more than one of it.

    Up to the size of such a unit memory grows with the corpus, and no further; a larger
    unit would hide what grows without end.
    """
    few = min(16, int(config_lib.section(config, "encoder").get("max_tokens", 128)))
    return {
        "chunks": {"shard_documents": max(1, documents // 2)},
        # Few words of a chunk: they cost time, and hold nothing when it is embedded.
        "encoder": {"max_tokens": few},
        "embed": {"shard_size": max(1, documents)},
        "index": {"part_rows": max(1, documents)},
        "neighbours": {
            "shard_size": max(1, documents),
            "batch_size": max(1, documents),
        },
    }


def _round(size: _Size, number: int, log: epath.Path) -> Iterator[tuple[str, Usage]]:
    """Runs the stages of one size once and measures them.

    The first round leaves its artefacts; the others use these, so that each measures
    the same work.
    """
    for stage, reads in _READS.items():
        if number > 1 and stage not in MEASURED:
            continue
        with contextlib.ExitStack() as stack:
            place = size.folder
            if number > 1:
                place = stack.enter_context(workdirs.scratch(size.folder, reads))
            config = f"--config={size.folder / 'config.py'}"
            usage = children.measured(
                [f"realm_retro.cli.{stage}", config, f"--workdir={place}"],
                log=log,
                env=children.environment(),
            )
        common.say(
            f"round {number}, {size.scale}×: {stage}: {usage.peak_mb:,.0f} MB in"
            f" {usage.seconds:.1f} s"
        )
        if stage in MEASURED:
            yield stage, usage


def _report(
    sizes: Sequence[_Size],
    used: Mapping[tuple[str, int], Sequence[Usage]],
    documents: int,
) -> Report:
    least, most = sizes[0], sizes[-1]
    index_mb, parts = most.index
    further = most.chunks - least.chunks
    series = []
    for stage in MEASURED:
        peaks = {s.scale: [u.peak_mb for u in used[stage, s.scale]] for s in sizes}
        own = {s.scale: [u.own_mb for u in used[stage, s.scale]] for s in sizes}
        series += [
            Series(f"{stage}, {size.chunks:,} chunks", "MB", peaks[size.scale])
            for size in sizes
        ]
        series.append(
            Series(
                f"{stage}, {most.scale}× over {least.scale}×",
                "ratio",
                report.ratio(peaks[most.scale], peaks[least.scale]),
                at_most=TARGET,
            )
        )
        growths = {"in all": peaks, "its own, no mapped files": own}
        series += [
            Series(f"{stage}, for each further chunk, {name}", "bytes", growth)
            for name, of in growths.items()
            if (growth := _growth(of[most.scale], of[least.scale], further))
        ]
    return Report(
        title="Peak memory of stages against the size of the corpus",
        series=series,
        settings={
            "documents_of_the_smallest": documents,
            "chunks": [size.chunks for size in sizes],
            "config": config_lib.as_dict(least.config),
        },
        notes=[
            f"the index of the largest has {index_mb:,.1f} MB in {parts:,} parts, of"
            " which find_neighbours holds one in memory",
            "corpora are made up; units of work (shards, batches, parts of the index)"
            " are cut so that the smallest corpus is more than one",
        ],
    )


def _growth(
    most: Sequence[float | None], least: Sequence[float | None], further: int
) -> list[float]:
    """Bytes for each chunk more; none where the system did not tell."""
    pairs = list(zip(most, least, strict=True))
    if further < 1 or any(None in pair for pair in pairs):
        return []
    return [((a or 0.0) - (b or 0.0)) * 1e6 / further for a, b in pairs]


def _manifest(folder: epath.Path) -> JsonDict:
    return quickstart_report.read_json(folder / artifacts.MANIFEST)
