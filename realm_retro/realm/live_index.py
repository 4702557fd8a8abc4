"""The index of a training: made before the first step, kept fresh between the others.

Everything here happens on the host. The model's search is never differentiated: it
only says which passages are candidates, and `objective` scores them anew.

Of several processes the first one looks at the shared folder, publishes and decides;
see `lockstep`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from realm_retro.arrays import ShardedArray
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.realm import lockstep, search
from realm_retro.realm.config import RealmConfig
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import (
    MakeEmbedder,
    RefreshConfig,
    Swapper,
    Target,
    Version,
)
from realm_retro.train.recipe import LoopState
from realm_retro.typing import Array, HostArray, JsonDict, Params

Mode = Literal["inline", "workers", "never"]
MODES: tuple[Mode, ...] = ("inline", "workers", "never")

# Of the probe set that an adaptive schedule is driven by.
_PROBES = 2048
_PROBE_K = 10
# Several processes agree every so many steps: they wait for the device each time.
_AGREE_EVERY = 8


@dataclasses.dataclass(frozen=True)
class InUse:
    """An index and where it came from.

    Attributes:
      index: what `LiveIndex` builds of vectors.
      version: its vectors' artefact.
      vectors: memory-mapped, and so readable when the version is deleted.
    """

    index: Any
    version: Version
    vectors: ShardedArray


class LiveIndex:
    """Which index the next search asks. Changed only in the loop's thread."""

    def __init__(
        self,
        root: epath.PathLike,
        *,
        config: RealmConfig,
        settings: RefreshConfig,
        mode: Mode,
        target: Target,
        make_embedder: MakeEmbedder,
        build: Callable[[ShardedArray], Any],
        depth: int = 0,
        keep_checkpoints: int = 2,
        report: Callable[[str], None] = print,
    ):
        """There is no index yet; see `current` and `resume`.

        Args:
          root: the folder shared with workers.
          config: the model's.
          settings: how often it is refreshed.
          mode: ``inline`` refreshes in this process, between two steps, and is
            deterministic; ``workers`` leaves it to processes of
            ``realm_retro.cli.refresh_index``; ``never`` keeps the first.
          target: what a version holds.
          make_embedder: parameters → what embeds passages with them.
          build: vectors [N, d] → what is searched: an index of the host, or the vectors
            on the devices.
          depth: how many steps ahead of its use an index is asked; they count as
            staleness.
          keep_checkpoints: how many checkpoints stay; their indexes do too.
          report: takes one line.
        """
        self._root, self._config, self._mode = root, config, mode
        self._settings, self._target = settings, target
        self._make_embedder, self._build = make_embedder, build
        self._depth, self._keep = depth, keep_checkpoints
        self._report = report
        self._schedule = settings.schedule()
        self._swapper = Swapper(
            root,
            parents=target.parents,
            poll_seconds=settings.poll_seconds,
            marks=hosts.is_main(),
            report=self._report,
        )
        self._step = 0
        self._saved: list[int] = []
        self._publishing: Future[None] | None = None
        self._building: Future[InUse] | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="index")
        self._in_use: InUse | None = None
        # Vectors of queries that measure how fast the embedder moves. Set in the loop's
        # thread, or the interval would depend on how fast a search is.
        self.probe: Array | HostArray | None = None

    def current(self, step: int, params: Params) -> InUse:
        """The index to ask at `step`; the first is made of `params` here."""
        if self._in_use is None:
            self._begin_training(step)
            self._report(f"index: embedding {self._target.num_rows:,} passages")
            self._use(self._made(self._inline(step, params)))
        assert self._in_use is not None
        return self._in_use

    def after_step(self, loop: LoopState) -> None:
        """Publishes snapshots that are due and takes newer indexes; a hook."""
        self._step = loop.step
        if self._mode == "never" or self._in_use is None:
            return
        step, params = loop.step, loop.state.params
        if self._mode == "inline":
            if self._schedule.due(step) or self._too_stale(step):
                self._use(self._made(self._inline(step, params)), step)
                self._schedule = self._schedule.published(step)
            return
        if self._schedule.due(step):
            self._publish(step, params)
        if self._publishing is not None and self._publishing.done():
            self._finish_publishing()  # an error of the thread comes up here
        one = jax.process_count() == 1
        if one or self._too_stale(step) or step % _AGREE_EVERY == 0:
            self._take_newer(loop)

    def end(self) -> None:
        """Tells the workers that the training is over."""
        self._finish_publishing()
        if hosts.is_main():
            refresh.end_training(self._root)

    def carry(self) -> JsonDict:
        """What a checkpoint has to remember; its index is kept until it is gone."""
        if self._in_use is None:
            return {}
        version = self._in_use.version
        # One more than there are checkpoints: the oldest goes only when this one is
        # whole, and until then a restart goes on from it.
        self._saved = [*self._saved, version.step][-self._keep - 1 :]
        self._swapper.hold(self._saved)
        return {
            "step": self._step,
            "version": version.step,
            "fingerprint": version.fingerprint,
            "held": self._saved,
            "schedule": self._schedule.as_meta(),
        }

    def resume(self, carried: JsonDict) -> None:
        """Goes on with the index that a checkpoint used.

        Raises:
          UserError: it is not there any more, or another is in its place.
        """
        if not carried:
            return
        again = "train anew under another --config.name"
        try:
            version = refresh.open_version(
                self._root, carried["version"], parents=self._target.parents
            )
        except UserError as error:
            raise UserError(f"{error}; or {again}") from None
        if version.fingerprint != carried["fingerprint"]:
            raise UserError(
                f"{version.manifest.directory}: is not the index that the checkpoint of"
                f" step {carried['step']} was trained with; another training has used"
                f" {self._root}: {again}"
            )
        # An older checkpoint's too: the newest may turn out to be damaged.
        self._saved = list(carried["held"])
        self._swapper.hold(self._saved)
        self._step = carried["step"]
        self._begin_training(self._step)
        self._schedule = self._schedule.resumed(carried["schedule"])
        self._use(self._made(version))

    def _begin_training(self, step: int) -> None:
        if hosts.is_main():
            refresh.begin_training(self._root, step=step)
        hosts.barrier("the folder of the index is ready")

    def _inline(self, step: int, params: Params) -> Version:
        """A version of these weights, made by the first process."""
        tower = search.tower_arrays(self._config, params)
        arrays = {name: hosts.readable(x) for name, x in tower.items()}
        made = None
        if hosts.is_main():
            made = refresh.refresh_inline(
                self._root,
                step,
                {name: np.asarray(x) for name, x in arrays.items()},
                self._make_embedder,
                self._target,
                keep=self._settings.keep,
                lease_seconds=self._settings.lease_seconds,
                report=_ignore,
            )
        hosts.barrier(f"the index of step {step} is made")
        return made or self._swapper.follow(step)

    def _verified(self, version: Version) -> InUse:
        """As `_made`, of a version that others made, whose checksums are compared."""
        return self._made(refresh.open_version(self._root, version.step))

    def _made(self, version: Version) -> InUse:
        """The index of a version; takes long, and reads all vectors."""
        vectors = refresh.load_vectors(version)
        return InUse(self._build(vectors), version, vectors)

    def _use(self, new: InUse, step: int | None = None) -> None:
        old, self._in_use = self._in_use, new
        self._swapper.adopt(new.version)
        if old is None or step is None:
            return
        shared = self._overlap(old.vectors, new.vectors)
        steps = new.version.step - old.version.step
        if shared is not None:
            self._schedule = self._schedule.measured(shared, steps=steps)
        self._report(
            f"step {step}: index of step {new.version.step} in use"
            + ("" if shared is None else f", top {_PROBE_K} kept {shared:.0%}")
            + f", next after {self._schedule.interval} steps"
        )

    def _overlap(self, old: ShardedArray, new: ShardedArray) -> float | None:
        """Reads a few rows alone: the device waits if this takes long."""
        if self.probe is None:
            return None
        rows = np.linspace(0, len(new) - 1, min(_PROBES, len(new))).astype(np.int64)
        stale, fresh = (np.asarray(x[rows], np.float32) for x in (old, new))
        k = min(_PROBE_K, len(rows))
        shared = refresh.topk_overlap(np.asarray(self.probe), stale, fresh, k=k)
        # Ties may be broken differently on another host, and the interval with them.
        return float(hosts.broadcast(np.float32(shared)))

    def _publish(self, step: int, params: Params) -> None:
        """Hands a copy of the tower to a thread: the loop does not wait for it."""
        self._finish_publishing()
        tower = search.tower_arrays(self._config, params)
        copied = {name: _copy(hosts.readable(x)) for name, x in tower.items()}
        meta = {"schedule": self._schedule.as_meta()}
        self._schedule = self._schedule.published(step)
        if not hosts.is_main():
            return

        def publish() -> None:
            refresh.publish_snapshot(
                self._root,
                step,
                {name: np.asarray(x) for name, x in copied.items()},
                meta=meta,
                parents=self._target.parents,
                keep=self._settings.keep,
            )

        self._publishing = self._pool.submit(publish)

    def _finish_publishing(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def _take_newer(self, loop: LoopState) -> None:
        """Begins to build an index that is there, and uses one that is built."""
        main, stale, refused = hosts.is_main(), self._too_stale(loop.step), True
        # One that proves damaged leaves an index in use that may not be asked any more.
        while refused:
            version = self._look(loop, stale=stale) if main else None
            begin = self._decided(loop, version.step if version else -1)
            if begin >= 0:
                version = version or self._swapper.follow(begin)
                self._building = self._pool.submit(self._verified, version)
            built = main and self._is_built(loop, wait=stale)
            tried = self._decided(loop, built) and self._building is not None
            refused = tried and not self._take_built(loop.step) and stale

    def _look(self, loop: LoopState, *, stale: bool) -> Version | None:
        """The first process: a newer version, which it waits for if it has to."""
        if not stale:
            # One after the other, or an index that takes long to build is never used.
            return None if self._building else self._swapper.poll(loop.step)

        def publish() -> None:
            lockstep.publish(lambda: self._publish(loop.step, loop.state.params))
            self._finish_publishing()

        return self._swapper.wait_for_fresh(
            loop.step,
            max_staleness=self._settings.max_staleness,
            ahead=self._depth,
            publish=publish,
            should_stop=lambda: lockstep.told_to_stop(loop),
        )

    def _is_built(self, loop: LoopState, *, wait: bool) -> bool:
        """The first process: whether there is a new index to use."""
        if self._building is None:
            return False
        seconds = self._settings.poll_seconds
        while wait and not self._building.done() and not lockstep.told_to_stop(loop):
            futures.wait([self._building], timeout=seconds)
        return self._building.done()

    def _take_built(self, step: int) -> bool:
        """Uses the new index on all processes, or refuses it on all; waits for them.

        Each reads the vectors itself, and may find damage that no other does.
        """
        building, self._building = self._building, None
        assert building is not None
        assert self._in_use is not None
        error = building.exception()
        good = hosts.gather(np.asarray(error is None))
        if good.all():
            self._use(building.result(), step)
            return True
        if not isinstance(error, UserError | None):
            raise error
        refused = self._swapper.current
        assert refused is not None
        error = error or UserError(
            f"{refused.manifest.directory}: process {np.argmin(good)} of this training"
            " cannot read it"
        )
        self._swapper.refuse(error, self._in_use.version)
        return False

    def _decided(self, loop: LoopState, decision: int) -> int:
        step, params = loop.step, loop.state.params
        return lockstep.decide(loop, decision, lambda: self._publish(step, params))

    def _too_stale(self, step: int) -> bool:
        limit = self._settings.max_staleness
        assert self._in_use is not None
        return bool(limit) and step + self._depth - self._in_use.version.step > limit


def _copy(x: Array | HostArray) -> Array | HostArray:
    # The next step takes the memory of the weights.
    return jnp.copy(x) if isinstance(x, jax.Array) else x


def _ignore(_: object) -> None:
    pass
