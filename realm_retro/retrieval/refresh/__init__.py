"""Asynchronous index refresh: a protocol on a shared folder, no remote calls.

::

    trainer                           folder                        workers
    publish_snapshot ──────►  snapshots/step-00000100/  ──────►  Worker.run
                              building/step-…/ shards, leases ◄──► each other
    Swapper.poll     ◄──────  versions/step-00000100/   ◄──────  the last one
    end_training     ──────►  training_ended            ──────►  end

* The trainer publishes the document embedder's parameters every so many steps
  (`Schedule`) and goes on training. Between steps it asks `Swapper.poll`, which gives
  it a newer version of the index's vectors when one is complete.
* Any number of workers share the newest snapshot's passages, shard by shard. A worker
  holds a shard by a lease with a heartbeat; when it dies the lease expires and another
  makes that shard. Whoever finds all shards finished publishes the version.
* Snapshots and versions appear under their names by one atomic rename, whole, and
  never change. A shard is placed exclusively: of two that made the same, one wins.
* Between shards a worker turns to the newest snapshot and drops what is outdated. Only
  the work that follows a dropped one is finished in any case: snapshots that come
  faster than they can be embedded would otherwise mean no version at all.
* `refresh_inline` is the same work in one call, for one machine.

All functions take the folder (``WORKDIR/refresh``), which may be on a network file
system. The model is not known here: what embeds is handed in as a function.
"""

from realm_retro.retrieval.refresh.config import RefreshConfig
from realm_retro.retrieval.refresh.folder import (
    begin_training,
    end_training,
    mark_using,
    training_ended,
)
from realm_retro.retrieval.refresh.inline import finished_version, refresh_inline
from realm_retro.retrieval.refresh.schedule import (
    Schedule,
    adaptive,
    every,
    topk_overlap,
)
from realm_retro.retrieval.refresh.snapshots import (
    Snapshot,
    newest_snapshot,
    open_snapshot,
    publish_snapshot,
)
from realm_retro.retrieval.refresh.swapper import Swapper
from realm_retro.retrieval.refresh.versions import (
    Target,
    Version,
    load_vectors,
    newest_version,
    open_version,
)
from realm_retro.retrieval.refresh.worker import Did, EmbedRows, MakeEmbedder, Worker

__all__ = [
    "Did",
    "EmbedRows",
    "MakeEmbedder",
    "RefreshConfig",
    "Schedule",
    "Snapshot",
    "Swapper",
    "Target",
    "Version",
    "Worker",
    "adaptive",
    "begin_training",
    "end_training",
    "every",
    "finished_version",
    "load_vectors",
    "mark_using",
    "newest_snapshot",
    "newest_version",
    "open_snapshot",
    "open_version",
    "publish_snapshot",
    "refresh_inline",
    "topk_overlap",
    "training_ended",
]
