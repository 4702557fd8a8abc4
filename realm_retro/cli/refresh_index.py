r"""Embeds the passages anew with each snapshot that a training publishes: one worker.

Start as many as there are machines or devices for it, at any time of the training; they
share the work. A worker may be killed at any time: another goes on with its shard. All
end when the training ends.

Reads   WORKDIR/passages, WORKDIR/refresh/NAME/snapshots, where NAME is config.name
Writes  WORKDIR/refresh/NAME/versions   the vectors of all passages, a version for each
        snapshot

Example:
  python -m realm_retro.cli.refresh_index --config=configs/realm/quickstart.py \
      --workdir=/tmp/realm --max_idle_seconds=600
"""

from __future__ import annotations

from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, processes
from realm_retro.data.passages import PassageStore
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import MakeEmbedder, RefreshConfig, Target, Worker
from realm_retro.typing import Config

_MAX_IDLE_SECONDS = flags.DEFINE_float(
    "max_idle_seconds",
    1800.0,
    "End when nothing has happened in WORKDIR/refresh/NAME for so long; 0 waits for"
    " ever.",
    lower_bound=0.0,
)


def main(config: Config, workdir: epath.Path) -> None:
    """Runs one worker; see the module docstring."""
    from realm_retro.cli import towers

    refreshing = settings(config)
    work(
        folder(config, workdir),
        towers.passage_embedder(config, workdir),
        target(config, towers.open_store(config, workdir)),
        refreshing,
        max_idle_seconds=_MAX_IDLE_SECONDS.value,
    )


def folder(config: Config, workdir: epath.Path) -> epath.Path:
    """What a training shares with its workers: each run has its own."""
    return workdir / "refresh" / config.name


def settings(config: Config) -> RefreshConfig:
    """Section ``refresh``."""
    section = config_lib.section(config, "refresh")
    return config_lib.build(RefreshConfig, section, name="config.refresh")


def target(config: Config, store: PassageStore) -> Target:
    """What a version holds; trainer and workers refuse one of another."""
    from realm_retro.cli import towers

    parents = {
        "passages": store.fingerprint,
        "model": towers.embedder_fingerprint(config),
    }
    return settings(config).target(len(store), parents)


def work(
    root: epath.PathLike,
    make_embedder: MakeEmbedder,
    target: Target,
    settings: RefreshConfig,
    *,
    max_idle_seconds: float,
) -> None:
    """Works until the training ends, then says what was done.

    SIGTERM ends it like Ctrl-C: its shard is given back at once.
    """
    worker = Worker(
        root,
        make_embedder,
        target,
        lease_seconds=settings.lease_seconds,
        keep=settings.keep,
        report=lambda line: common.say(f"refresh: {line}"),
    )
    if refresh.training_ended(root):
        common.say(
            f"refresh: {root}/training_ended says that the training is over; a training"
            " that is started takes it away, start workers after it"
        )
        return
    common.say(f"refresh: {target.num_rows:,} passages, worker {worker.owner}")
    with processes.terminated_like_ctrl_c():
        try:
            worker.run(
                max_idle_seconds=max_idle_seconds, poll_seconds=settings.poll_seconds
            )
        finally:
            common.say(f"refresh: {summary(worker)}")


def summary(worker: Worker) -> str:
    """What a worker did, in one line; what was not needed or lost is counted."""
    total = worker.totals
    rate = total.rows / max(total.seconds, 1e-9)
    line = (
        f"{total.shards:,} shards with {total.rows:,} vectors ({rate:,.0f}/s),"
        f" {total.versions:,} versions published"
    )
    extra = {
        "shards another had published": total.duplicates,
        "shards lost to another after silence": total.lost,
        "outdated versions dropped": total.dropped,
        "snapshots refused": total.refused,
    }
    return ", ".join([line, *(f"{n:,} {what}" for what, n in extra.items() if n)])


def entry() -> None:
    """Console script."""
    common.run(main, name="refresh_index")


if __name__ == "__main__":
    entry()
