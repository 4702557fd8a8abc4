r"""Reads a corpus with Apache Beam: the first step of prepare, on many machines.

Reads   the source that config.corpus names.
Writes  WORKDIR/corpus   what prepare would write there, to the last byte. All machines
                         must see WORKDIR, and the source, under the same path

Afterwards prepare, with the same flags, goes on from there.

Example:
  python -m realm_retro.cli.prepare_beam --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.dedupe.enabled=True \
      --beam=direct_running_mode=multi_processing --beam=direct_num_workers=8

An interrupted run begins anew.
"""

from __future__ import annotations

import time

import ml_collections
from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, prepare
from realm_retro.data import corpus as corpus_lib
from realm_retro.data import dedupe as dedupe_lib
from realm_retro.data.corpus import CorpusConfig
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.errors import UserError

RUNNER = flags.DEFINE_string(
    "runner",
    "DirectRunner",
    "Beam's runner: DirectRunner (this machine), FlinkRunner, SparkRunner, …",
)
BEAM = flags.DEFINE_multi_string(
    "beam",
    [],
    "A flag for Beam or the runner, without its dashes, such as"
    " direct_num_workers=8. May be repeated.",
)


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    corpus = config_lib.build(
        CorpusConfig, config_lib.section(config, "corpus"), name="config.corpus"
    )
    dedupe = config_lib.build(
        DedupeConfig, config_lib.section(config, "dedupe"), name="config.dedupe"
    )
    if "://" in str(workdir):
        raise UserError(
            f"--workdir={workdir}: is a bucket, and the workers write to a folder; use"
            " one on a file system that all machines mount"
        )
    directory = workdir / "corpus"
    settings = dedupe_lib.settings(dedupe)
    stage = corpus_lib.open_stage(corpus, directory, dedupe=settings)
    if stage.finished:
        prepare.corpus_finished(directory)
        return
    from realm_retro.data import corpus_beam  # TFDS takes a while to import

    started = time.monotonic()
    with stage.released_on_error():
        report = corpus_beam.build(
            corpus, dedupe, stage, runner=RUNNER.value, flags=BEAM.value
        )
    prepare.commit_corpus(stage, report, time.monotonic() - started)


def entry() -> None:
    """Console script."""
    common.run(main, name="prepare_beam")


if __name__ == "__main__":
    entry()
