"""Every file of every artefact, spoilt in every way: refused by name, with the remedy.

The files are found, not listed: what an artefact holds in future is spoilt as well.
"""

import ast
import json
import pathlib
import random
import shutil

import pytest
import tiny_artefacts
from tiny_artefacts import ARTEFACTS

from realm_retro import artifacts
from realm_retro.errors import UserError

SAID = {"config", "files", "fingerprint", "format_version", "kind", "made_by", "meta"}
SAID |= {"parents"}
PACKAGE = pathlib.Path(artifacts.__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of two runs over different data."""
    folder = tmp_path_factory.mktemp("runs")
    return [tiny_artefacts.write_all(folder / str(seed), seed) for seed in range(2)]


def flipped(content, positions):
    """The content with one bit changed, for each of some random places."""
    rng = random.Random(len(content))
    edges = {0, len(content) // 2, len(content) - 1}
    for place in sorted(edges | {rng.randrange(len(content)) for _ in positions}):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << rng.randrange(8)
        yield bytes(spoilt)


# Name → (content, that of another run or None) → what is there instead; None for
# nothing at all.
DAMAGES = {
    "truncated": lambda content, other: {content[:0], content[:-1], content[: 1 << 9]},
    "lengthened": lambda content, other: {content + b"\0"},
    "flipped": lambda content, other: set(flipped(content, range(3))),
    "flipped often": lambda content, other: set(flipped(content, range(100))),
    "deleted": lambda content, other: {None},
    "from another run": lambda content, other: {other or content},
}


def replace(path, content):
    # A new file: the old one may still be memory-mapped.
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def says(manifest):
    """What a manifest says, but for its checksum and how that is called."""
    body = json.loads(manifest)
    return {name: value for name, value in body.items() if name in SAID}


def refusal(artefact, workdir):
    """The one line of an artefact's reader, or None where it reads."""
    said = None
    try:
        artefact.open(workdir)
    except UserError as error:
        said = str(error)
    assert said is None or "\n" not in said
    assert said is None or "run: python -m realm_retro.cli." in said
    return said


def test_all_kinds_are_here():
    kinds = {
        node.value.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KIND"
    }
    # A run's folder and its checkpoints have a file of their own.
    assert kinds == {artefact.kind for artefact in ARTEFACTS.values()} | {"run"}


SLOW = {"flipped often": [pytest.mark.slow]}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=SLOW.get(name, [])) for name in DAMAGES]
)
@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_spoilt_file_is_refused(runs, name, damage):
    artefact = ARTEFACTS[name]
    here, there = (pathlib.Path(run) / artefact.directory for run in runs)
    assert refusal(artefact, runs[0]) is None
    spoilt = 0
    for path in files_of(here):
        whole, twin = path.read_bytes(), there / path.relative_to(here)
        other = twin.read_bytes() if twin.exists() else None
        for content in DAMAGES[damage](whole, other) - {whole}:
            replace(path, content)
            said = refusal(artefact, runs[0])
            replace(path, whole)
            spoilt += 1
            if path.name == artifacts.REQUEST:
                assert said is None, "only who writes on reads what was asked for"
            elif path.name == artifacts.MANIFEST:
                # A space more or less says the same.
                assert said or says(content) == says(whole), content
                assert said is None or str(here) in said
            else:
                assert said, f"{path} was read: {damage}"
                assert str(path) in said
    assert spoilt


@pytest.mark.parametrize("flips", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_manifest_says_all_that_it_said(runs, name, flips):
    """What a reader takes from a manifest (sizes, scales …) has a checksum too."""
    artefact = ARTEFACTS[name]
    path = pathlib.Path(runs[0]) / artefact.directory / artifacts.MANIFEST
    whole = path.read_bytes()
    for content in flipped(whole, range(flips)):
        replace(path, content)
        said = refusal(artefact, runs[0])
        replace(path, whole)
        assert said or says(content) == says(whole), content


def test_a_manifest_of_an_earlier_release_has_no_checksum(runs, tmp_path):
    shutil.copytree(runs[0] / "chunks", tmp_path / "chunks")
    path = tmp_path / "chunks" / artifacts.MANIFEST
    body = json.loads(path.read_text())
    del body[artifacts.CHECKSUM]
    path.write_text(json.dumps(body))
    ARTEFACTS["chunks"].open(tmp_path)


# Which artefact is another run's, and who notices.
FOREIGN = [
    ("chunks", "embeddings"),
    ("chunks", "neighbours"),
    ("embeddings", "embeddings"),
    ("embeddings", "index"),
    ("index", "index"),
    ("neighbours", "neighbours"),
    ("passages", "spans"),
    ("passages", "answers"),
    ("spans", "spans"),
    ("answers", "answers"),
    ("snapshot", "version"),
    ("version", "version"),
]


@pytest.mark.parametrize(("foreign", "opened"), FOREIGN)
def test_a_whole_artefact_of_another_run_is_refused(runs, tmp_path, foreign, opened):
    shutil.copytree(runs[0], tmp_path / "run")
    directory = tmp_path / "run" / ARTEFACTS[foreign].directory
    shutil.rmtree(directory)
    shutil.copytree(runs[1] / ARTEFACTS[foreign].directory, directory)
    said = refusal(ARTEFACTS[opened], tmp_path / "run")
    assert said
    assert str(tmp_path / "run" / ARTEFACTS[opened].directory) in said
    assert "was made from" in said


def test_what_was_asked_for_can_be_lost_or_spoilt(tmp_path):
    """``request.json`` alone is read by writers; they refuse it, or write it anew."""
    arguments = {
        "kind": "chunks",
        "format_version": 1,
        "parents": {},
        "made_by": "realm_retro.cli.prepare",
    }
    artifacts.Stage.open(tmp_path, config={"seed": 1}, **arguments)
    path = tmp_path / artifacts.REQUEST
    whole = path.read_bytes()
    for content in DAMAGES["truncated"](whole, None) - {whole}:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not JSON .* delete it to go on with"):
            artifacts.Stage.open(tmp_path, config={"seed": 1}, **arguments)
    path.write_bytes(whole.replace(b'"seed": 1', b'"seed": 3'))
    with pytest.raises(UserError, match=r"config\.seed: 3 there, 1 here"):
        artifacts.Stage.open(tmp_path, config={"seed": 1}, **arguments)
    path.unlink()
    artifacts.Stage.open(tmp_path, config={"seed": 1}, **arguments)
    assert path.read_bytes() == whole
