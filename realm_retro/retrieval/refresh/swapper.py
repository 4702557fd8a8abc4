"""The trainer's side: which version is in use, and when there is a newer one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import folder, jobs, versions
from realm_retro.retrieval.refresh.versions import Version

_SAY_AGAIN_SECONDS = 60.0
# A network file system may show a new directory so much later to another host.
_SEEN_SECONDS = 180.0


class Swapper:
    """Polled between two steps by the one process that decides for all hosts.

    It marks the current version and the one before it, so that workers do not delete
    them. The other processes of the training `follow` it.
    """

    def __init__(
        self,
        root: epath.PathLike,
        *,
        parents: Mapping[str, str],
        poll_seconds: float = 1.0,
        owner: str = "trainer",
        marks: bool = True,
        verify: bool = False,
        report: Callable[[str], None] = print,
    ):
        """Nothing is in use yet; see `adopt`.

        Args:
          root: the shared folder.
          parents: role → fingerprint that a version must come from, e.g. ``passages``.
          poll_seconds: the folder is listed at most this often.
          owner: the name of the mark that keeps versions from being deleted.
          marks: whether it writes one; of several processes the one that decides.
          verify: recompute the checksums of a new version before it is taken; sizes
            are always compared. It takes long: a caller that reads all vectors in a
            thread can do it there, and `refuse` the version afterwards.
          report: takes one line.
        """
        self._root = folder.local(root)
        self._parents = dict(parents)
        self._poll_seconds = poll_seconds
        self._owner = owner
        self._marks = marks
        self._verify = verify
        self._report = report
        self._held: tuple[int, ...] = ()
        self._previous: tuple[int, ...] = ()
        self._refused: set[int] = set()
        self._next_look = 0.0
        self.current: Version | None = None

    def adopt(self, version: Version) -> None:
        """Makes a version the current one: the first, an inline one, or on a resume."""
        self._mark(version.step)
        self._use(version)

    def refuse(self, error: UserError, instead: Version) -> None:
        """Gives the current version up: it proved damaged when it was read whole.

        Args:
          error: says so.
          instead: the version that stays in use.
        """
        assert self.current is not None
        self._refused.add(self.current.step)
        self._report(f"{error}; the index in use stays (step {instead.step})")
        self.current = instead
        self._mark()

    def hold(self, steps: Iterable[int]) -> None:
        """Keeps versions that a restart will ask for, besides the current one.

        Args:
          steps: of the versions that the stored checkpoints were trained with;
            replaces what was held before.
        """
        self._held = tuple(steps)
        self._mark()

    def staleness(self, step: int) -> int:
        """Steps since the current version's snapshot.

        Raises:
          ValueError: there is no current version.
        """
        if self.current is None:
            raise ValueError("no version of the index is in use yet")
        return step - self.current.step

    def poll(self, step: int) -> Version | None:
        """A newer version if there is one, which is the current one from then on.

        Costs a look at the clock, and a listing every `poll_seconds`. A version that
        is damaged is refused in one line, and training goes on with the current one.

        Args:
          step: the steps that were taken; versions of later ones (of an earlier life
            of this training) are not looked at.

        Raises:
          UserError: the newer version was made of other passages.
        """
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + self._poll_seconds
        return self._look(step)

    def wait_for_fresh(
        self,
        step: int,
        *,
        max_staleness: int,
        publish: Callable[[], object],
        ahead: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Version | None:
        """Returns when the current version is at most `max_staleness` steps old.

        Says what it waits for, and again every minute.

        Args:
          step: the steps that were taken.
          max_staleness: in steps; at least `ahead`.
          publish: publishes a snapshot of now; called if no snapshot is new enough, or
            the version of the newest was refused: no waiting would help.
          ahead: how many steps later than `step` the index is asked for.
          should_stop: asked while waiting, e.g. whether the process was told to end.

        Returns:
          The new version; None where none was needed, or waiting was stopped.
        """
        oldest = step + ahead - max_staleness
        if not self._older_than(oldest):
            return None
        fresh, next_line = self._look(step), 0.0
        while self._older_than(oldest) and not should_stop():
            snapshots = folder.steps(self._root / folder.SNAPSHOTS)
            if not [s for s in snapshots if s >= oldest and s not in self._refused]:
                self._forget_refused(step)
                publish()
            if time.monotonic() >= next_line:
                self._report(self._waiting_line(step, oldest, max_staleness))
                next_line = time.monotonic() + _SAY_AGAIN_SECONDS
            time.sleep(self._poll_seconds)
            fresh = self._look(step) or fresh
        return fresh

    def follow(self, step: int) -> Version:
        """Takes the version that the process which decides has taken.

        Raises:
          UserError: this process does not see it, or it was made of other passages.
        """
        until = time.monotonic() + _SEEN_SECONDS
        while step not in folder.steps(self._root / folder.VERSIONS):
            if time.monotonic() > until:
                name = self._root / folder.VERSIONS / folder.step_name(step)
                raise UserError(
                    f"{name}: is there for the first process of this training, not for"
                    " this one; use a --workdir on a file system that all of them share"
                )
            time.sleep(self._poll_seconds)
        version = versions.open_version(self._root, step, verify=self._verify)
        _check_parents(version.manifest, self._parents)
        self._use(version)
        return version

    def _older_than(self, oldest: int) -> bool:
        return self.current is None or self.current.step < oldest

    def _forget_refused(self, step: int) -> None:
        # A snapshot of this very step would make none of a version that is there.
        if step in self._refused:
            folder.forget(self._root, step)
            self._refused.remove(step)

    def _look(self, step: int) -> Version | None:
        after = self.current.step if self.current else -1
        found = folder.steps(self._root / folder.VERSIONS)
        newer = [s for s in found if after < s <= step and s not in self._refused]
        if not newer:
            return None
        # Marked before it is opened: whoever deletes looks at the marks first.
        self._mark(newer[-1])
        try:
            version = versions.open_version(self._root, newer[-1], verify=self._verify)
        except (UserError, FileNotFoundError) as error:
            if newer[-1] in folder.steps(self._root / folder.VERSIONS):
                self._refused.add(newer[-1])
                now = f"step {after}" if self.current else "none"
                self._report(f"{error}; the index in use stays ({now})")
            self._mark()
            return None
        _check_parents(version.manifest, self._parents)
        self._use(version)
        return version

    def _use(self, version: Version) -> None:
        # The one before stays marked: it is read until an index of the new one is
        # built, and compared with it then.
        if self.current is not None and self.current.step != version.step:
            self._previous = (self.current.step,)
        self.current = version
        self._mark()

    def _mark(self, *more: int) -> None:
        if not self._marks:
            return
        current = (self.current.step,) if self.current else ()
        folder.mark_using(
            self._root,
            {*self._held, *self._previous, *current, *more},
            owner=self._owner,
        )

    def _waiting_line(self, step: int, oldest: int, max_staleness: int) -> str:
        have = (
            "there is none" if self.current is None else f"of step {self.current.step}"
        )
        workers = jobs.num_workers(self._root)
        who = (
            f"{workers} leases of workers are alive"
            if workers
            else "no worker is alive; start: python -m realm_retro.cli.refresh_index"
        )
        return (
            f"step {step}: waits for an index of step {max(0, oldest)} or"
            f" later ({have}, max_staleness is {max_staleness}): {who}"
        )


def _check_parents(manifest: artifacts.Manifest, parents: Mapping[str, str]) -> None:
    for role, fingerprint in parents.items():
        theirs = manifest.parents.get(role)
        if theirs != fingerprint:
            raise UserError(
                f"{manifest.directory}: was made from {role} {str(theirs)[:12]}, this"
                f" training has {fingerprint[:12]}; delete {manifest.directory} and"
                " start workers with the --config and --workdir of the training"
            )
