"""What a reader of artefacts refuses, and what a writer resumes."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest
import small_disk
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro import artifacts
from realm_retro.errors import UserError

MADE_BY = "realm_retro.cli.embed"
FILES = {"shard-0.bin": b"first shard" * 50, "sub/shard-1.bin": b"second\x00\xff" * 9}


def open_stage(
    directory, *, config=None, parents=None, kind="embeddings", version=1, join=None
):
    return artifacts.Stage.open(
        directory,
        kind=kind,
        format_version=version,
        config={"size": 2, "shape": (3, 4)} if config is None else config,
        parents={"chunks": "c" * 64} if parents is None else parents,
        made_by=MADE_BY,
        join=join,
    )


def write_all(stage, files=FILES):
    for name, content in files.items():
        with stage.write(name) as path:
            path.write_bytes(content)


def make(directory, **kwargs):
    stage = open_stage(directory, **kwargs)
    write_all(stage)
    return stage.commit({"rows": 2})


def load(directory, **kwargs):
    arguments = {"kind": "embeddings", "format_version": 1, "made_by": MADE_BY}
    return artifacts.load(directory, **{**arguments, **kwargs})


def refusal(directory, **kwargs):
    with pytest.raises(UserError) as raised:
        load(directory, **kwargs)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture
def artefact(tmp_path):
    make(tmp_path / "embeddings")
    return tmp_path / "embeddings"


def edit_manifest(directory, change, *, fingerprint=True):
    """Changes the manifest; by default so well that its fingerprint still fits."""
    path = directory / artifacts.MANIFEST
    body = json.loads(path.read_text())
    change(body)
    if fingerprint:
        keys = ("kind", "format_version", "config", "parents", "files")
        body["fingerprint"] = artifacts.fingerprint_of({k: body[k] for k in keys})
    path.write_text(json.dumps(body))


# Round trip


def test_what_was_written_is_read(tmp_path):
    written = make(tmp_path / "a")
    read = load(tmp_path / "a", parents={"chunks": "c" * 64})
    assert read == written
    assert read.meta == {"rows": 2}
    assert read.config == {"size": 2, "shape": [3, 4]}
    assert {name: read.path(name).read_bytes() for name in read.files} == FILES


def test_a_parent_that_is_not_asked_for_is_not_compared(artefact):
    assert load(artefact, parents={}).parents == {"chunks": "c" * 64}


def test_commit_leaves_no_traces_of_work(artefact):
    assert not (artefact / artifacts.PROGRESS).exists()
    assert not list(artefact.rglob("*.tmp"))


def test_a_moved_artefact_is_the_same(artefact, tmp_path):
    before = load(artefact).fingerprint
    artefact.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").fingerprint == before


def test_the_manifest_names_its_files_only(artefact):
    (artefact / "stray.bin").write_bytes(b"not mine")
    with pytest.raises(UserError, match=r"lists no file 'stray\.bin'"):
        load(artefact).path("stray.bin")


# Fingerprints


def test_the_fingerprint_covers_what_determines_the_content(tmp_path):
    prints = [
        make(tmp_path / "0").fingerprint,
        make(tmp_path / "1", config={"size": 3}).fingerprint,
        make(tmp_path / "2", parents={"chunks": "d" * 64}).fingerprint,
        make(tmp_path / "3", parents={"corpus": "c" * 64}).fingerprint,
        make(tmp_path / "4", kind="index").fingerprint,
        make(tmp_path / "5", version=2).fingerprint,
    ]
    other = open_stage(tmp_path / "6")
    write_all(other, {**FILES, "shard-0.bin": b"other"})
    prints.append(other.commit({"rows": 2}).fingerprint)
    assert len(set(prints)) == len(prints)


def test_measurements_and_the_place_do_not_change_the_fingerprint(tmp_path):
    first = make(tmp_path / "first")
    stage = open_stage(tmp_path / "second")
    write_all(stage, dict(reversed(FILES.items())))
    assert stage.commit({"rows": 2, "seconds": 1.5}).fingerprint == first.fingerprint


def test_fingerprints_do_not_depend_on_order_or_process():
    value = {"b": [1, 2.5, None], "a": {"y": "é", "x": True}}
    code = (
        "from realm_retro.artifacts import fingerprint_of\n"
        "print(fingerprint_of({'a': {'x': True, 'y': 'é'}, 'b': (1, 2.5, None)}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == artifacts.fingerprint_of(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_a_value_that_json_cannot_hold_has_no_fingerprint(value):
    with pytest.raises((TypeError, ValueError)):
        artifacts.fingerprint_of(value)


# Damage


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flip") / "embeddings"
    make(directory)
    path = directory / data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    message = refusal(directory)
    assert f"{path}: is damaged" in message
    assert f"delete {directory} and run: python -m {MADE_BY}" in message


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_truncated_file_is_found_without_reading_it(artefact, name, length):
    path = artefact / name
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(artefact, verify=False)
    assert str(path) in message
    assert "truncated" in message


def test_a_longer_file_is_found(artefact):
    with (artefact / "shard-0.bin").open("ab") as file:
        file.write(b"\n")
    assert "overwritten" in refusal(artefact, verify=False)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_deleted_file_is_found(artefact, name):
    (artefact / name).unlink()
    message = refusal(artefact, verify=False)
    assert f"{artefact / name}: is missing" in message
    assert MADE_BY in message


def test_verify_false_trusts_the_content(artefact):
    path = artefact / "shard-0.bin"
    path.write_bytes(b"x" * path.stat().st_size)
    load(artefact, verify=False)
    assert "damaged" in refusal(artefact)


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_truncated_manifest_is_refused(artefact, cut):
    path = artefact / artifacts.MANIFEST
    path.write_text(path.read_text()[:cut])
    assert str(path) in refusal(artefact)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "{}", '{"files": 1}'])
def test_json_that_is_no_manifest_is_refused(artefact, text):
    (artefact / artifacts.MANIFEST).write_text(text)
    message = refusal(artefact)
    assert "is not a manifest" in message
    assert MADE_BY in message


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["config"].update(size=9),
        lambda body: body["parents"].update(chunks="d" * 64),
        lambda body: body.update(kind="index"),
        lambda body: body.update(format_version=2),
        lambda body: body["files"].pop("shard-0.bin"),
        lambda body: body["files"]["shard-0.bin"].update(bytes=1),
        lambda body: body.update(fingerprint="0" * 64),
    ],
)
def test_an_edited_manifest_is_found(artefact, change):
    edit_manifest(artefact, change, fingerprint=False)
    assert "does not match its own fingerprint" in refusal(artefact)


# What belongs to somebody else


def test_a_missing_artefact_names_the_command(tmp_path):
    message = refusal(tmp_path / "none")
    assert "embeddings missing" in message
    assert f"run: python -m {MADE_BY}" in message


def test_an_unfinished_artefact_is_not_read(tmp_path):
    write_all(open_stage(tmp_path))
    assert "embeddings unfinished" in refusal(tmp_path)


def test_another_kind_is_refused(artefact):
    assert "holds 'embeddings', not 'index'" in refusal(artefact, kind="index")


def test_another_format_version_is_refused(artefact):
    message = refusal(artefact, format_version=2)
    assert "format version 1, this release reads 2" in message


@pytest.mark.parametrize("role", ["chunks", "encoder"])
def test_other_parents_are_refused(artefact, role):
    message = refusal(artefact, parents={role: "e" * 64})
    assert role in message
    assert "e" * 12 in message
    assert "e" * 13 not in message  # hashes are shortened


# Names that leave the folder


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "..", ".", "./x", "a\\..\\x", "", "a/./b"]
)
def test_no_name_leaves_the_folder(artefact, tmp_path, name):
    stage = open_stage(tmp_path / "new")
    with pytest.raises(UserError, match="leaves the folder"), stage.write(name):
        pytest.fail("the name was accepted")
    with pytest.raises(UserError, match="leaves the folder"):
        stage.adopt(name)
    record = {"bytes": 1, "sha256": "0" * 64}
    edit_manifest(artefact, lambda body: body["files"].update({name: record}))
    assert "leaves the folder" in refusal(artefact)


# Half-written and resumed


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    stage = open_stage(tmp_path)

    def write_half():
        with stage.write("a.bin") as path:
            path.write_bytes(b"half")
            assert not (tmp_path / "a.bin").exists()
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_half()
    assert not stage.has("a.bin")
    assert not list(tmp_path.rglob("a.bin*"))


def test_a_file_that_was_not_written_is_no_file(tmp_path):
    stage = open_stage(tmp_path)
    with pytest.raises(FileNotFoundError), stage.write("a.bin"):
        pass
    assert not stage.has("a.bin")


def test_a_stage_resumes_at_the_first_missing_file(tmp_path):
    first = open_stage(tmp_path)
    with first.write("shard-0.bin") as path:
        path.write_bytes(FILES["shard-0.bin"])
    first.note("count", {"rows": [1, 2]})
    kept = (tmp_path / "shard-0.bin").stat().st_mtime_ns

    second = open_stage(tmp_path)
    assert second.has("shard-0.bin")
    assert not second.has("sub/shard-1.bin")
    assert second.noted("count") == {"rows": [1, 2]}
    assert second.noted("other") is None
    assert not second.finished
    write_all(second, {"sub/shard-1.bin": FILES["sub/shard-1.bin"]})
    resumed = second.commit({"rows": 2})
    assert second.finished
    assert (tmp_path / "shard-0.bin").stat().st_mtime_ns == kept
    assert resumed.fingerprint == make(tmp_path / "at-once").fingerprint


def test_a_file_without_its_record_is_written_again(tmp_path):
    # The process was killed between the rename and the record.
    (tmp_path / "shard-0.bin").write_bytes(b"whose?")
    assert not open_stage(tmp_path).has("shard-0.bin")


def test_a_record_without_its_file_is_written_again(tmp_path):
    write_all(open_stage(tmp_path))
    (tmp_path / "shard-0.bin").unlink()
    assert not open_stage(tmp_path).has("shard-0.bin")


def test_restart_forgets_what_was_written(tmp_path):
    stage = open_stage(tmp_path)
    write_all(stage)
    stage.restart()
    assert not any(stage.has(name) or (tmp_path / name).exists() for name in FILES)
    with stage.write("other.bin") as path:
        path.write_bytes(b"x")
    assert set(stage.commit({}).files) == {"other.bin"}


def test_left_over_temporary_files_are_not_part_of_the_artefact(tmp_path):
    stage = open_stage(tmp_path)
    (tmp_path / "shard-9.bin.tmp").write_bytes(b"half")
    write_all(stage)
    assert set(stage.commit({}).files) == set(FILES)


@pytest.mark.parametrize("after", ["shard-0.bin", "sub/shard-1.bin"])
def test_a_killed_process_loses_only_what_it_was_writing(tmp_path, after):
    code = f"""
import os, signal
from realm_retro import artifacts
stage = artifacts.Stage.open(
    {str(tmp_path)!r}, kind="embeddings", format_version=1,
    config={{"size": 2, "shape": (3, 4)}}, parents={{"chunks": "c" * 64}},
    made_by={MADE_BY!r})
for name, content in {FILES!r}.items():
    with stage.write(name) as path:
        path.write_bytes(content[:-3])
        if name == {after!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(content)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert "unfinished" in refusal(tmp_path)
    stage = open_stage(tmp_path)
    done = [name for name in FILES if stage.has(name)]
    assert done == list(FILES)[: list(FILES).index(after)]
    write_all(stage, {n: c for n, c in FILES.items() if n not in done})
    stage.commit({"rows": 2})
    assert {n: load(tmp_path).path(n).read_bytes() for n in FILES} == FILES


def test_adopt_records_what_a_library_wrote(tmp_path):
    stage = open_stage(tmp_path)
    (tmp_path / "library.bin").write_bytes(b"by itself")
    stage.adopt("library.bin")
    stage.commit({})
    (tmp_path / "library.bin").write_bytes(b"by itsemf")
    assert "damaged" in refusal(tmp_path)


# The same folder with other settings


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"config": {"size": 5, "shape": (3, 4)}}, "config.size: 2 there, 5 here"),
        (
            {"config": {"size": 2, "shape": (3, 4), "new": 1}},
            "config.new: None there, 1 here",
        ),
        ({"config": {"size": 2}}, "config.shape: [3, 4] there, None here"),
        ({"parents": {"chunks": "d" * 64}}, f"parents.chunks: {'c' * 12} there"),
        ({"kind": "index"}, "kind: embeddings there, index here"),
        ({"version": 2}, "format_version: 1 there, 2 here"),
    ],
)
def test_other_settings_are_refused(tmp_path, finished, other, shown):
    if finished:
        make(tmp_path)
    else:
        open_stage(tmp_path)
    with pytest.raises(UserError) as raised:
        open_stage(tmp_path, **other)
    assert shown in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "--workdir" in str(raised.value)


def test_the_same_settings_open_a_finished_stage(tmp_path):
    make(tmp_path)
    assert open_stage(tmp_path).finished


def test_a_mistake_before_the_first_file_can_be_mended(tmp_path):
    stage = open_stage(tmp_path)
    with pytest.raises(UserError), stage.released_on_error():
        raise UserError("config.size is too small")
    open_stage(tmp_path, config={"size": 5})


def test_a_mistake_after_the_first_file_cannot(tmp_path):
    stage = open_stage(tmp_path)
    write_all(stage)
    with pytest.raises(UserError), stage.released_on_error():
        raise UserError("shard 3 is damaged")
    with pytest.raises(UserError, match="other settings"):
        open_stage(tmp_path, config={"size": 5})


def test_settings_that_json_cannot_hold_are_refused_before_any_work(tmp_path):
    with pytest.raises(TypeError):
        open_stage(tmp_path / "new", config={"path": object()})
    assert not (tmp_path / "new" / artifacts.REQUEST).exists()


def test_a_damaged_request_is_one_line(tmp_path):
    open_stage(tmp_path)
    (tmp_path / artifacts.REQUEST).write_text('{"kind": ')
    with pytest.raises(UserError, match="is not JSON"):
        open_stage(tmp_path)


@pytest.mark.parametrize("text", [None, '{"kind": '])
def test_files_of_unknown_settings_are_not_gone_on_with(tmp_path, text):
    """Whoever deleted the request alone would mix two settings in one artefact."""
    write_all(open_stage(tmp_path / "a", config={"seed": 1}))
    path = tmp_path / "a" / artifacts.REQUEST
    path.unlink()
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"; delete {path.parent} and run: ") as said:
        open_stage(tmp_path / "a", config={"seed": 2})
    assert str(path) in str(said.value)
    assert "settings of now" not in str(said.value)


def test_a_finished_stage_says_what_it_was_made_with(tmp_path):
    make(tmp_path, config={"seed": 1})
    (tmp_path / artifacts.REQUEST).unlink()
    assert open_stage(tmp_path, config={"seed": 1}).finished
    with pytest.raises(UserError, match=r"config\.seed: 1 there, 2 here"):
        open_stage(tmp_path, config={"seed": 2})


def test_what_may_not_be_seen_is_not_missing(artefact):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    stage = open_stage(artefact.parent / "b")
    write_all(stage)
    # pytest's own folder is for root alone, and nobody sees what is in it.
    with small_disk.as_nobody():
        for look in (lambda: load(artefact), lambda: stage.has("sub/shard-1.bin")):
            with pytest.raises(PermissionError):
                look()


def test_an_owner_without_a_name_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    make(tmp_path / "a")
    assert load(tmp_path / "a").files.keys() == FILES.keys()


def test_a_lock_that_cannot_be_cleaned_up_is_no_error(tmp_path, monkeypatch):
    """The manifest is written: what a killed process left may stay."""
    stage = open_stage(tmp_path, join=False)
    joined = open_stage(tmp_path, join=True)
    write_all(joined)

    def fail(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    stage.close()
    monkeypatch.setattr(artifacts, "_lock", fail)
    assert joined.commit({}).files.keys() == FILES.keys()


def test_a_full_disk_is_passed_on_and_leaves_nothing(tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    stage = open_stage(tmp_path)

    def write_too_much():
        with stage.write("a.bin") as path:
            path.write_bytes(b"begun")
            pathlib.Path("/dev/full").write_bytes(b"x")

    with pytest.raises(OSError, match="No space left"):
        write_too_much()
    assert not stage.has("a.bin")
    assert not list(tmp_path.glob("a.bin*"))


def test_sha256_is_the_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.sha256(epath.Path(path)) == known


def test_a_loader_is_load_for_one_kind(artefact):
    load_embeddings = artifacts.loader("embeddings", 1, MADE_BY)
    assert load_embeddings(artefact, parents={"chunks": "c" * 64}) == load(artefact)
    missing, chunks = artefact / "missing", {"chunks": "d" * 64}
    for here, directory, parents, message in (
        (load_embeddings, artefact, chunks, "the chunks here is dddddddddddd"),
        (load_embeddings, missing, None, f"missing; run: python -m {MADE_BY}"),
        (artifacts.loader("index", 1, MADE_BY), artefact, None, "not 'index'"),
        (artifacts.loader("embeddings", 2, MADE_BY), artefact, None, "release reads 2"),
    ):
        with pytest.raises(UserError, match=message):
            here(directory, parents=parents)
    (artefact / "shard-0.bin").write_bytes(bytes(len(FILES["shard-0.bin"])))
    load_embeddings(artefact, verify=False)
    with pytest.raises(UserError, match="is damaged"):
        load_embeddings(artefact)


# Two processes


CLAIM = """
import sys
from realm_retro import artifacts
from realm_retro.errors import UserError
try:
    stage = artifacts.Stage.open(
        sys.argv[1], kind="embeddings", format_version=1,
        config={"size": 2, "shape": (3, 4)}, parents={"chunks": "c" * 64},
        made_by="realm_retro.cli.embed", claim="no claim" not in sys.argv,
        join={"join": True, "alone": False}.get(sys.argv[-1]),
    )
except UserError as error:
    sys.exit(str(error))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Starts a process that opens a stage and waits until its input ends."""
    started = []

    def start(directory, *flags):
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(directory), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_do_not_write_one_stage(tmp_path, other_process):
    first = other_process(tmp_path / "a")
    assert first.stdout.readline() == "open\n"
    message = f"{tmp_path / 'a'}: another process is writing it; wait for it or stop it"
    second = other_process(tmp_path / "a")
    assert second.communicate()[1] == f"{message}\n"
    with pytest.raises(UserError, match="another process is writing it"):
        open_stage(tmp_path / "a")
    # One that belongs to the first may.
    assert other_process(tmp_path / "a", "no claim").stdout.readline() == "open\n"
    # A killed process is no obstacle, though it leaves the file.
    first.kill()
    first.wait()
    assert (tmp_path / "a" / artifacts.LOCK).exists()
    make(tmp_path / "a")
    assert not (tmp_path / "a" / artifacts.LOCK).exists()
    # Nor is there anything to claim in what is finished.
    assert other_process(tmp_path / "a").stdout.readline() == "open\n"
    assert load(tmp_path / "a").files.keys() == FILES.keys()


def test_two_processes_may_share_a_stage_that_can_be(tmp_path, other_process):
    first = other_process(tmp_path / "a", "alone")
    assert first.stdout.readline() == "open\n"
    refused = other_process(tmp_path / "a", "alone").communicate()[1]
    assert refused == (
        f"{tmp_path / 'a'}: another process is writing it; wait for it or stop it, or"
        " share its work with --join\n"
    )
    assert other_process(tmp_path / "a", "join").stdout.readline() == "open\n"
    mine = open_stage(tmp_path / "a", join=True)
    first.kill()
    first.wait()
    write_all(mine)
    mine.commit({"rows": 2})
    assert load(tmp_path / "a").files.keys() == FILES.keys()
    assert not (tmp_path / "a" / artifacts.LOCK).exists()


def test_a_stage_is_free_when_its_writer_lets_go(tmp_path, other_process):
    stage = open_stage(tmp_path / "a")
    again = open_stage(tmp_path / "a")  # the same process may
    assert "another process" in other_process(tmp_path / "a").communicate()[1]
    del stage, again
    assert not (tmp_path / "a" / artifacts.LOCK).exists()
    assert other_process(tmp_path / "a").stdout.readline() == "open\n"


def test_refused_settings_leave_no_claim(tmp_path, other_process):
    open_stage(tmp_path / "a")
    with pytest.raises(UserError, match="other settings"):
        open_stage(tmp_path / "a", config={"size": 3})
    assert other_process(tmp_path / "a").stdout.readline() == "open\n"


def test_a_claim_holds_while_others_try_and_let_go(tmp_path):
    """Nobody ever holds a file that was deleted before he locked it."""
    script = (
        "import pathlib, sys, time\n"
        "from realm_retro.artifacts import claimed\n"
        "from realm_retro.errors import UserError\n"
        "folder, done = pathlib.Path(sys.argv[1]), 0\n"
        "while done < 200:\n"
        "    try:\n"
        "        with claimed(folder):\n"
        "            (folder / 'inside').touch(exist_ok=False)\n"
        "            (folder / 'inside').unlink()\n"
        "            done += 1\n"
        "    except UserError:\n"
        "        time.sleep(0)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]


def test_what_is_finished_may_be_opened_without_writing(artefact):
    before = {path: path.stat().st_mtime_ns for path in artefact.parent.rglob("*")}
    assert open_stage(artefact).finished
    after = {path: path.stat().st_mtime_ns for path in artefact.parent.rglob("*")}
    assert after == before
