"""Immutable, fingerprinted directories: what every stage writes and the next reads.

A stage owns one directory. It opens it with `Stage.open`, writes each file whole
(temporary name, fsync, rename), and commits by writing ``manifest.json`` last. A
directory without a manifest is unfinished work: the same stage resumes it at the
first missing file, nobody else reads it. One process at a time does, except where a
stage can be shared: then the first to write a file wins (`realm_retro.shards`).

The manifest holds the kind, the format version, the settings that made it, the
fingerprints of its parents, for every file its size and SHA-256, and a checksum of all
that it says itself. `load` refuses what is unfinished, damaged, of another kind or
version, or of other parents, in one line that says which and what to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import secrets
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from etils import epath

from realm_retro import atomic, disk
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

MANIFEST = "manifest.json"
REQUEST = "request.json"
PROGRESS = ".progress"
LOCK = ".lock"
CHECKSUM = "checksum"  # of a JSON object's other members; see `seal`
_BLOCK = 1 << 22
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_AGAIN = "delete it to go on with the settings of now, or {} to begin anew"
_ANEW = "delete {} and run: python -m {}"
# Directories that this process has claimed.
_claimed: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished artefact says of itself.

    Attributes:
      directory: where it lies.
      kind: what it is, e.g. ``chunks``, ``embeddings``, ``index``.
      format_version: version of the files' layout.
      config: the settings that made it.
      parents: role → fingerprint of the artefacts it was made from.
      meta: counts, dtypes, measurements; whatever readers want to know.
      files: relative name → ``{"bytes": int, "sha256": str}``.
      fingerprint: hash of all of the above except `directory` and `meta`.
    """

    directory: epath.Path
    kind: str
    format_version: int
    config: JsonDict
    parents: dict[str, str]
    meta: JsonDict
    files: dict[str, JsonDict]
    fingerprint: str

    def path(self, name: str) -> epath.Path:
        """The path of one of the manifest's files."""
        if name not in self.files:
            raise UserError(f"{self.directory / MANIFEST}: lists no file {name!r}")
        return self.directory / name


class Stage:
    """A directory being written. See `Stage.open`, `write`, `commit`."""

    def __init__(
        self, directory: epath.Path, request: JsonDict, join: bool | None = None
    ):
        self.directory = directory
        self._request = request
        self._shared = None if join is None else atomic.local(directory)
        self._joined = bool(join)
        self._claim = contextlib.ExitStack()  # let go with the stage, or at its end

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        kind: str,
        format_version: int,
        config: Mapping[str, Any],
        parents: Mapping[str, str],
        made_by: str,
        claim: bool = True,
        join: bool | None = None,
    ) -> Stage:
        """Opens a stage's directory for writing, or for resuming.

        Until it is finished, no other process can open it meanwhile, unless both may
        and one asks to join; see `claimed`.

        Args:
          directory: the stage's own directory; created if it is not there.
          kind: what is written, e.g. ``embeddings``.
          format_version: version of the files' layout.
          config: the settings that determine the content. JSON values only.
          parents: role → fingerprint of the artefacts read.
          made_by: the module that writes it, e.g. ``realm_retro.cli.embed``; named
            in errors of readers that miss it.
          claim: False for the further processes of one program, which share the
            directory with the one that claims it.
          join: whether processes may write it together, each file by any of them
            (see `realm_retro.shards`): True for one that comes to those at work, if
            there are any; False for one that wants to be the first; None: never.

        Raises:
          UserError: the directory holds the same stage with other settings, another
            process is writing it, or several would in a bucket.
        """
        directory = epath.Path(directory)
        if join and atomic.local(directory) is None:
            raise UserError(
                f"{directory}: --join needs a file system with atomic renames, a bucket"
                " has none; run one process without it"
            )
        request = _jsonable(
            {
                "kind": kind,
                "format_version": format_version,
                "config": dict(config),
                "parents": dict(parents),
                "made_by": made_by,
            }
        )
        directory.mkdir(parents=True, exist_ok=True)
        stage = cls(directory, request, join)
        with contextlib.ExitStack() as claims:
            # What is finished may lie on a read-only disk.
            if claim and not stage.finished:
                stage._enter(claims, join)
            _refuse_other_request(directory, stage._begun_with(), request)
            if not stage.finished:
                (directory / PROGRESS).mkdir(exist_ok=True)
                stage._claim = claims.pop_all()
        return stage

    @property
    def finished(self) -> bool:
        """Whether the manifest was written."""
        return disk.there(self.directory / MANIFEST)

    def has(self, name: str) -> bool:
        """Whether a file was written whole, by this process or an earlier one."""
        return disk.there(self._record(name)) and disk.there(self.directory / name)

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[epath.Path]:
        """Yields a temporary path; on a clean exit it becomes the file `name`.

        In a shared stage the file of another, who was first, stays.
        """
        _check_name(name, self.directory)
        final = self.directory / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.parent / f"{final.name}.tmp"
        if self._shared:
            # Nobody else's; what a killed process leaves goes with the progress.
            private = f"{_quoted(name)}.{secrets.token_hex(6)}.tmp"
            temporary = self.directory / PROGRESS / private
        try:
            with disk.named_errors(final):
                yield temporary
                disk.flush(temporary)
                if not (self._shared and _place_first(temporary, final)):
                    temporary.replace(final)
                self._note_file(name)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def adopt(self, name: str, *, checksum: str = "") -> None:
        """Records a file that a library wrote under its final name by itself.

        Args:
          name: of the file.
          checksum: its `sha256`, where whoever wrote it has computed it.
        """
        _check_name(name, self.directory)
        disk.flush(self.directory / name)
        self._note_file(name, checksum)

    def _note_file(self, name: str, checksum: str = "") -> None:
        path = self.directory / name
        checksum = checksum or sha256(path)
        record = {"bytes": disk.size(path), "sha256": checksum}
        self._write_progress(self._record(name), record)

    def note(self, name: str, value: JsonDict) -> None:
        """Keeps a small JSON value beside the progress, for the next resume."""
        path = self.directory / PROGRESS / f"{name}.note.json"
        self._write_progress(path, _jsonable(value))

    def noted(self, name: str) -> JsonDict | None:
        """What `note` kept, or None."""
        path = self.directory / PROGRESS / f"{name}.note.json"
        return _read_json(path) if disk.there(path) else None

    def restart(self) -> None:
        """Deletes the files written so far: for work that cannot resume half-way."""
        for name in self.recorded():
            (self.directory / name).unlink(missing_ok=True)
            self._record(name).unlink()

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """On a `UserError` before the first file, forgets the settings asked for.

        The user can then mend a setting and run again in the same directory. A process
        that joined others leaves them theirs.
        """
        try:
            yield
        except UserError:
            if self._joined or self.finished:
                raise
            if not any((self.directory / PROGRESS).iterdir()):
                (self.directory / REQUEST).unlink()
            raise

    def commit(self, meta: Mapping[str, Any]) -> Manifest:
        """Writes the manifest over all recorded files: the artefact now exists.

        In a shared stage the manifest of another, who was first, stays.
        """
        files = {name: _read_json(self._record(name)) for name in self.recorded()}
        body = {**self._request, "meta": _jsonable(dict(meta)), "files": files}
        body["fingerprint"] = _fingerprint(body)
        self._write_first(MANIFEST, seal(body))
        if self._shared:
            # In one move: others may be about to write into it.
            atomic.discard(self._shared / PROGRESS)
            body = _read_json(self.directory / MANIFEST)
            # A process that was killed may have left its lock.
            with contextlib.suppress(UserError, OSError), claimed(self.directory):
                pass
        else:
            (self.directory / PROGRESS).rmtree(missing_ok=True)
        self.close()
        return _manifest(self.directory, body)

    def close(self) -> None:
        """Lets another process write the directory; so do `commit` and the end."""
        self._claim.close()

    def recorded(self) -> list[str]:
        """Names of the files written whole, by one listing; empty once finished."""
        paths = sorted((self.directory / PROGRESS).glob("*.file.json"))
        return [urllib.parse.unquote(p.name.removesuffix(".file.json")) for p in paths]

    def _enter(self, claims: contextlib.ExitStack, join: bool | None) -> None:
        """Claims the directory; one that joins others need not be the one that does."""
        try:
            claims.enter_context(claimed(self.directory))
        except UserError as error:
            if join is None:
                raise
            if not join:
                raise UserError(f"{error}, or share its work with --join") from None

    def _begun_with(self) -> JsonDict:
        """What the directory was begun with: what is asked for now, if it is new."""
        path = self.directory / REQUEST
        # Without files nothing can be taken for made with the settings of now. So it is
        # with a run's folder: its checkpoints say themselves whose they are.
        remedy = _AGAIN.format(self.directory)
        if self.recorded():
            remedy = _ANEW.format(self.directory, self._request["made_by"])
        if not disk.there(path):
            if self.recorded():
                raise UserError(
                    f"{path}: is missing, and nothing else says which settings the"
                    f" files beside it were made with; {remedy}"
                )
            if self.finished:
                body = _read_json(self.directory / MANIFEST)
                if isinstance(body, dict):
                    return {name: body.get(name) for name in self._request}
            self._write_first(REQUEST, self._request)
        return _read_json(path, remedy=remedy)

    def _write_first(self, name: str, value: JsonDict) -> None:
        """Writes a JSON file; in a shared stage only where there is none."""
        if self._shared:
            atomic.place_json(value, self._shared / name)
        else:
            _write_json(self.directory / name, value)

    def _write_progress(self, path: epath.Path, value: JsonDict) -> None:
        if self._shared:
            atomic.replace_json(value, pathlib.Path(path))
        else:
            _write_json(path, value)

    def _record(self, name: str) -> epath.Path:
        return self.directory / PROGRESS / f"{_quoted(name)}.file.json"


@contextlib.contextmanager
def claimed(directory: epath.PathLike) -> Iterator[None]:
    """Keeps other processes out of a directory while this one writes it.

    A killed process leaves the file `LOCK` behind but not its lock. A claim within a
    claim of the same process is none; nor is one where nothing can be locked, as in a
    bucket.

    Args:
      directory: it exists.

    Raises:
      UserError: another process has claimed it.
    """
    path = os.path.join(os.path.realpath(directory), LOCK)
    if "://" in os.fspath(directory) or path in _claimed:
        yield
        return
    descriptor = _lock(directory, path)
    _claimed.add(path)
    try:
        yield
    finally:
        _claimed.discard(path)
        # First the name, then the lock: who opens it now must not find it free.
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _lock(directory: epath.PathLike, path: str) -> int:
    """Opens and locks a file; returns its descriptor."""
    while True:
        # No child that is started takes it along: it would keep the lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{directory}: another process is writing it; wait for it or stop it"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        # Its owner has just deleted it: the lock is worth nothing.
        os.close(descriptor)


def load(
    directory: epath.PathLike,
    *,
    kind: str,
    format_version: int,
    made_by: str,
    parents: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Manifest:
    """Reads and checks a finished artefact.

    Args:
      directory: the artefact's directory.
      kind: the kind that the caller can read.
      format_version: the version that the caller can read.
      made_by: the module to run when it is not there.
      parents: role → fingerprint that the artefact must have been made from; roles
        that are not named are not compared.
      verify: recompute checksums (about 1 GB/s); sizes are always compared.

    Raises:
      UserError: it is missing, unfinished, damaged, or does not match.
    """
    directory = epath.Path(directory)
    path = directory / MANIFEST
    if not disk.there(path):
        state = "unfinished" if disk.there(directory / REQUEST) else "missing"
        raise UserError(f"{directory}: {kind} {state}; run: python -m {made_by}")
    again = f"delete {directory} and run: python -m {made_by}"
    body = _read_json(path, remedy=again)
    try:
        manifest = _manifest(directory, body, remedy=f"; {again}")
        if _fingerprint(body) != manifest.fingerprint:
            raise UserError(f"{path}: does not match its own fingerprint; {again}")
        if not is_intact(body):
            raise UserError(f"{path}: is damaged (its checksum differs); {again}")
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: is not a manifest; {again}") from None
    if manifest.kind != kind:
        raise UserError(f"{path}: holds {manifest.kind!r}, not {kind!r}; {again}")
    if manifest.format_version != format_version:
        raise UserError(
            f"{path}: format version {manifest.format_version}, this release reads"
            f" {format_version}; {again}"
        )
    for role, fingerprint in (parents or {}).items():
        found = manifest.parents.get(role)
        if found != fingerprint:
            raise UserError(
                f"{path}: was made from {role} {_short(found)}, but the {role} here is"
                f" {_short(fingerprint)}; {again}"
            )
    for name, record in manifest.files.items():
        _check_file(directory, name, record, again=again, verify=verify)
    return manifest


class Loader(Protocol):
    """`load` of one kind; its arguments and errors are those of `load`."""

    def __call__(
        self,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> Manifest:
        """Reads and checks a finished artefact of the kind."""
        ...


def loader(kind: str, format_version: int, made_by: str) -> Loader:
    """`load` for the one kind that a module owns."""
    return functools.partial(
        load, kind=kind, format_version=format_version, made_by=made_by
    )


def request_of(directory: epath.PathLike) -> str | None:
    """The fingerprint of the settings that a directory was begun with, if it was.

    Raises:
      UserError: the file that says so is damaged.
    """
    path = epath.Path(directory) / REQUEST
    if not disk.there(path):
        return None
    return fingerprint_of(_read_json(path, remedy=_AGAIN.format(directory)))


def sha256(path: epath.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def seal(value: JsonDict) -> JsonDict:
    """A JSON object with a checksum of all its members; see `is_intact`."""
    return {**value, CHECKSUM: fingerprint_of(value)}


def is_intact(value: JsonDict) -> bool:
    """Whether a JSON object is what was sealed; one that never was counts as intact."""
    rest = {name: member for name, member in value.items() if name != CHECKSUM}
    return value.get(CHECKSUM) in (None, fingerprint_of(rest))


def fingerprint_of(value: Any) -> str:
    """A fingerprint of any JSON value: the same value gives the same on any machine."""
    text = json.dumps(_jsonable(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(body: JsonDict) -> str:
    keys = ("kind", "format_version", "config", "parents", "files")
    return fingerprint_of({key: body[key] for key in keys})


def _manifest(directory: epath.Path, body: JsonDict, remedy: str = "") -> Manifest:
    kinds = {"kind": str, "format_version": int, "config": dict, "parents": dict}
    kinds |= {"meta": dict, "files": dict, "fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(body[key], kind):
            raise TypeError(key)
    for name, record in body["files"].items():
        _check_name(name, directory, remedy)
        if not isinstance(record["bytes"], int) or not isinstance(
            record["sha256"], str
        ):
            raise TypeError(name)
    return Manifest(directory=directory, **{key: body[key] for key in kinds})


def _check_name(name: str, directory: epath.Path, remedy: str = "") -> None:
    # A manifest may come from elsewhere: no name may leave the artefact's folder.
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or {"..", "."} & set(parts):
        raise UserError(
            f"{directory / MANIFEST}: file name {name!r} leaves the folder{remedy}"
        )


def _check_file(
    directory: epath.Path, name: str, record: JsonDict, *, again: str, verify: bool
) -> None:
    path = directory / name
    if not disk.there(path):
        raise UserError(f"{path}: is missing; {again}")
    size = disk.size(path)
    if size != record["bytes"]:
        raise UserError(
            f"{path}: has {size} bytes where the manifest says {record['bytes']}"
            f" (truncated or overwritten); {again}"
        )
    if verify and sha256(path) != record["sha256"]:
        raise UserError(f"{path}: is damaged (its checksum differs); {again}")


def _refuse_other_request(
    directory: epath.Path, found: JsonDict, wanted: JsonDict
) -> None:
    differences = list(_differences(found, wanted))
    if differences:
        shown = "; ".join(differences[:3])
        raise UserError(
            f"{directory}: was made with other settings ({shown});"
            " use another --workdir or delete that folder"
        )


def _differences(found: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            dotted = f"{prefix}.{key}" if prefix else key
            yield from _differences(found.get(key), wanted.get(key), dotted)
    elif found != wanted:
        yield f"{prefix}: {_short(found)} there, {_short(wanted)} here"


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text


def _jsonable(value: Any) -> Any:
    # One round trip turns tuples to lists and refuses what JSON cannot hold, so that
    # what is compared on a resume is what was written.
    return json.loads(json.dumps(value, allow_nan=False))


def _quoted(name: str) -> str:
    """A file's name, which may hold slashes, as one name in a folder."""
    return urllib.parse.quote(name, safe="")


def _place_first(temporary: epath.Path, final: epath.Path) -> bool:
    """Gives a whole file its name, unless another is whole there; False: torn.

    Processes that make the same file write the same number of bytes. Theirs may differ
    in rounding if their devices do, so what is there, and perhaps recorded, stays.
    """
    if atomic.place(pathlib.Path(temporary), pathlib.Path(final)):
        return True
    return disk.size(final) == disk.size(temporary)


def _read_json(path: epath.Path, *, remedy: str = "") -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        remedy = remedy or f"delete {path.parent} and run that stage again"
        raise UserError(f"{path}: is not JSON ({error}); {remedy}") from None


def _write_json(path: epath.Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    with disk.replacing(path) as temporary:
        temporary.write_text(text)
