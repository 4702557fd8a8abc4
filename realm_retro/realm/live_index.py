"""The index of a training: made before the first step, kept fresh between the others.

Everything here happens on the host. The model's search is never differentiated: it
only says which passages are candidates, and `objective` scores them anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from etils import epath

from realm_retro.errors import UserError
from realm_retro.realm import search
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


@dataclasses.dataclass(frozen=True)
class InUse:
    """An index and where it came from.

    Attributes:
      index: what `LiveIndex` builds of vectors.
      version: its vectors.
    """

    index: Any
    version: Version


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
        build: Callable[[HostArray], Any],
        keep_checkpoints: int = 2,
        report: Callable[[str], None] = print,
    ):
        """There is no index yet; see `start` and `resume`.

        Args:
          root: the folder shared with workers.
          config: the model's.
          settings: how often it is refreshed.
          mode: ``inline`` refreshes in this process, between two steps, and is
            deterministic; ``workers`` leaves it to processes of
            ``realm_retro.cli.refresh_index``; ``never`` keeps the first.
          target: what a version holds.
          make_embedder: parameters → what embeds passages with them.
          build: vectors float32 [N, d] → what is searched: `search.build_index`, or
            the vectors on the devices.
          keep_checkpoints: how many checkpoints stay; their indexes do too.
          report: takes one line.
        """
        self._root, self._config, self._mode = root, config, mode
        self._settings, self._target = settings, target
        self._make_embedder, self._build = make_embedder, build
        self._keep, self._report = keep_checkpoints, report
        self._schedule = settings.schedule()
        self._swapper = Swapper(
            root,
            parents=target.parents,
            poll_seconds=settings.poll_seconds,
            report=report,
        )
        self._step = 0
        self._saved: list[int] = []
        self._publishing: Future[None] | None = None
        self._building: tuple[Version, Future[Any]] | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="index")
        self._in_use: InUse | None = None
        # Vectors of queries that measure how fast the embedder moves. Set in the loop's
        # thread, or the interval would depend on how fast a search is.
        self.probe: Array | HostArray | None = None

    def current(self, step: int, params: Params) -> InUse:
        """The index to ask at `step`; the first is made of `params` here."""
        if self._in_use is None:
            refresh.begin_training(self._root, step=step)
            self._report(f"index: embedding {self._target.num_rows:,} passages")
            self._adopt(self._inline(step, params))
        assert self._in_use is not None
        return self._in_use

    def after_step(self, loop: LoopState) -> None:
        """Publishes snapshots that are due and takes newer indexes; a hook."""
        self._step = loop.step
        if self._mode == "never" or self._in_use is None:
            return
        step, params = loop.step, loop.state.params
        if self._mode == "inline":
            if self._schedule.due(step):
                self._adopt(self._inline(step, params), step=step)
                self._schedule = self._schedule.published(step)
            return
        if self._schedule.due(step):
            self._publish(step, params)
        self._take_newer(step, params)

    def end(self) -> None:
        """Tells the workers that the training is over."""
        self._finish_publishing()
        refresh.end_training(self._root)

    def carry(self) -> JsonDict:
        """What a checkpoint has to remember; its index is kept until it is gone."""
        if self._in_use is None:
            return {}
        step = self._in_use.version.step
        self._saved = [*self._saved, step][-self._keep :]
        self._swapper.hold(self._saved)
        return {
            "step": self._step,
            "version": step,
            "held": self._saved,
            "schedule": self._schedule.as_meta(),
        }

    def resume(self, carried: JsonDict) -> None:
        """Goes on with the index that a checkpoint used.

        Raises:
          UserError: it is not there any more.
        """
        if not carried:
            return
        try:
            version = refresh.open_version(
                self._root, carried["version"], parents=self._target.parents
            )
        except UserError as error:
            raise UserError(
                f"{error}; or train anew under another --config.name"
            ) from None
        # An older checkpoint's too: the newest may turn out to be damaged.
        self._saved = list(carried["held"])
        self._swapper.hold(self._saved)
        self._step = carried["step"]
        refresh.begin_training(self._root, step=self._step)
        self._schedule = self._schedule.resumed(carried["schedule"])
        self._adopt(version)

    def _inline(self, step: int, params: Params) -> Version:
        arrays = {
            name: np.asarray(x)
            for name, x in search.tower_arrays(self._config, params).items()
        }
        return refresh.refresh_inline(
            self._root,
            step,
            arrays,
            self._make_embedder,
            self._target,
            keep=self._settings.keep,
            lease_seconds=self._settings.lease_seconds,
            report=lambda _: None,
        )

    def _adopt(self, version: Version, *, step: int | None = None) -> None:
        vectors = _whole(version)
        self._use(InUse(self._build(vectors), version), vectors, step)

    def _use(self, new: InUse, vectors: HostArray, step: int | None) -> None:
        old, self._in_use = self._in_use, new
        self._swapper.adopt(new.version)
        if old is None or step is None:
            return
        shared = self._overlap(old.version, vectors)
        steps = new.version.step - old.version.step
        if shared is not None:
            self._schedule = self._schedule.measured(shared, steps=steps)
        self._report(
            f"step {step}: index of step {new.version.step} in use"
            + ("" if shared is None else f", top {_PROBE_K} kept {shared:.0%}")
            + f", next after {self._schedule.interval} steps"
        )

    def _overlap(self, old: Version, fresh: HostArray) -> float | None:
        if self.probe is None:
            return None
        rows = np.linspace(0, len(fresh) - 1, min(_PROBES, len(fresh))).astype(np.int64)
        stale = np.asarray(refresh.load_vectors(old)[rows], np.float32)
        k = min(_PROBE_K, len(rows))
        return refresh.topk_overlap(np.asarray(self.probe), stale, fresh[rows], k=k)

    def _publish(self, step: int, params: Params) -> None:
        """Hands a copy of the tower to a thread: the loop does not wait for it."""
        self._finish_publishing()
        copied: Mapping[str, Array] = {
            name: jnp.copy(x)
            for name, x in search.tower_arrays(self._config, params).items()
        }

        def publish() -> None:
            refresh.publish_snapshot(
                self._root,
                step,
                {name: np.asarray(x) for name, x in copied.items()},
                meta={"schedule": self._schedule.as_meta()},
                parents=self._target.parents,
                keep=self._settings.keep,
            )

        self._publishing = self._pool.submit(publish)
        self._schedule = self._schedule.published(step)

    def _finish_publishing(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def _take_newer(self, step: int, params: Params) -> None:
        if self._publishing is not None and self._publishing.done():
            self._finish_publishing()  # an error of the thread comes up here
        limit = self._settings.max_staleness
        version = self._swapper.poll(step)
        if limit and version is None:
            version = self._swapper.wait_for_fresh(
                step, max_staleness=limit, publish=lambda: self._now(step, params)
            )
            if version is not None:
                self._building = None
                self._adopt(version, step=step)
                return
        if version is not None:
            vectors = self._pool.submit(_whole, version)
            self._building = (
                version,
                self._pool.submit(lambda: self._build(vectors.result())),
            )
        if self._building is not None and (
            self._building[1].done() or self._too_stale(step)
        ):
            ready, index = self._building
            self._building = None
            self._use(InUse(index.result(), ready), _whole(ready), step)

    def _too_stale(self, step: int) -> bool:
        limit = self._settings.max_staleness
        assert self._in_use is not None
        return bool(limit) and step - self._in_use.version.step > limit

    def _now(self, step: int, params: Params) -> None:
        self._publish(step, params)
        self._finish_publishing()


def _whole(version: Version) -> HostArray:
    return np.asarray(refresh.load_vectors(version)[:], np.float32)
