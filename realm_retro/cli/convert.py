r"""Published REALM and BERT checkpoints in and out, without torch.

In, with --input: Hugging Face folders of RealmEmbedder, RealmScorer,
RealmKnowledgeAugEncoder, RealmReader, RealmForOpenQA, or of a BERT; safetensors or
PyTorch files. Several make one model; an embedder beside a RealmForOpenQA becomes its
document tower.

Reads   the folders of --input, the block records of --records
Writes  WORKDIR/weights   our parameters, vectors of blocks, blocks.jsonl (a corpus)

  python -m realm_retro.cli.convert --workdir=/tmp/realm \
      --input=~/realm-cc-news-pretrained-embedder --input=~/realm-orqa-nq-openqa \
      --records=~/realm-orqa-nq-openqa/block_records.npy

Out, with --output: safetensors that transformers reads (4.57 is the last release with
REALM). With --config the newest checkpoint of that run, else WORKDIR/weights.

Reads   WORKDIR/runs/NAME, or WORKDIR/weights
Writes  OUTPUT/query, OUTPUT/document, OUTPUT/encoder, OUTPUT/reader, as far as trained

  python -m realm_retro.cli.convert --config=configs/realm/quickstart.py \
      --workdir=/tmp/realm --output=/tmp/published --format=bert
"""

from __future__ import annotations

import time

import jax
from absl import flags
from etils import epath

from realm_retro import artifacts, disk, progress
from realm_retro import config as config_lib
from realm_retro.arrays import flatten
from realm_retro.cli import common, towers
from realm_retro.errors import UserError
from realm_retro.interop import block_records, export, weights
from realm_retro.interop import realm as published_realm
from realm_retro.interop.bert import CONFIG as CONFIG_FILE
from realm_retro.interop.tensors import files_of
from realm_retro.typing import Config, JsonDict, Params

FOLDER = "weights"

_INPUT = flags.DEFINE_multi_string(
    "input", [], "The folder of a published checkpoint; may be repeated."
)
_RECORDS = flags.DEFINE_string(
    "records", None, "The texts of a RealmForOpenQA's blocks: .npy, .npz, .jsonl, .txt."
)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write checkpoints for others.")
_FORMAT = flags.DEFINE_enum(
    "format", "realm", ["realm", "bert"], "Of --output: whole parts, or their BERTs."
)


def main(config: Config | None, workdir: epath.Path) -> None:
    """Converts in one direction; see the module docstring."""
    inputs = [epath.Path(path).expanduser() for path in _INPUT.value]
    if bool(inputs) == bool(_OUTPUT.value):
        raise UserError(
            "name --input=FOLDER to read a published checkpoint, or --output=FOLDER to"
            " write one; one of the two"
        )
    if inputs:
        records = epath.Path(_RECORDS.value).expanduser() if _RECORDS.value else None
        read_in(inputs, records, workdir / FOLDER)
    else:
        output = epath.Path(_OUTPUT.value or "").expanduser()
        write_out(config, workdir, output, _FORMAT.value)


def read_in(
    inputs: list[epath.Path], records: epath.Path | None, directory: epath.Path
) -> None:
    """Converts published checkpoints into the artefact ``weights``."""
    started = time.monotonic()
    published = published_realm.merge(
        [(path, published_realm.load(path)) for path in inputs]
    )
    if records is not None and published.vectors is None:
        raise UserError(
            f"--records={records}: no --input has block vectors that they could"
            " belong to; leave it out, or name the folder of a RealmForOpenQA"
        )
    stage = weights.open_stage(directory, _checksums(inputs, records))
    if stage.finished:
        common.say(f"weights: finished already, in {directory}")
        return
    with stage.released_on_error():
        blocks = None if records is None else block_records.read(records)
        weights.write(stage, published, blocks)
    _report(published, time.monotonic() - started)
    if published.vectors is not None and records is None:
        common.say(
            "weights: the texts of the blocks are missing; to answer questions over"
            f" them delete {directory} and run again with --records=FILE"
        )


def write_out(
    config: Config | None, workdir: epath.Path, output: epath.Path, kind: str
) -> None:
    """Writes each part as a checkpoint of its own."""
    model, parts = _trained(config, workdir) if config else _converted(workdir)
    for name, params in sorted(parts.items()):
        if name == "head":
            continue  # of a BERT, whose own folder has it
        if name == "bert":
            params = {"bert": params}
        other = kind == "bert" or name == "bert"
        as_kind = export.BERT if other else export.KINDS[name]
        export.save(output / name, as_kind, model, params)
        common.say(f"convert: {name} as {as_kind} in {output / name}")


def _trained(config: Config, workdir: epath.Path) -> tuple[JsonDict, Params]:
    """All parts of a run's newest checkpoint."""
    params = towers.run_params(config, workdir, config.name)
    model = towers.model_config(config)
    return config_lib.as_dict(model), jax.device_get(params)


def _converted(workdir: epath.Path) -> tuple[JsonDict, Params]:
    directory = workdir / FOLDER
    if not disk.there(directory / artifacts.MANIFEST):
        raise UserError(
            f"{directory}: weights missing; run: python -m {weights.MADE_BY}"
            f" --workdir={workdir} --input=FOLDER, or name a run with --config"
        )
    published = weights.load(directory)
    return published.model, published.parts


def _checksums(inputs: list[epath.Path], records: epath.Path | None) -> dict[str, str]:
    files = [f for path in inputs for f in (path / CONFIG_FILE, *files_of(path))]
    files += [] if records is None else [records]
    found: dict[str, str] = {}
    with progress.bar(total=len(files), unit="files", label="checksums") as bar:
        for number, path in enumerate(files):
            # Two folders have files of the same name.
            found[f"{number} {path.name}"] = artifacts.sha256(path)
            bar.update()
    return found


def _report(published: published_realm.Published, seconds: float) -> None:
    flat = flatten(published.parts)
    numbers = sum(value.size for value in flat.values())
    common.say(
        f"weights: {', '.join(sorted(published.parts))}: {numbers:,} numbers in"
        f" {seconds:.1f} s"
    )
    if published.unused:
        common.say(
            f"weights: {len(published.unused)} tensors left out that the published"
            f" model never reads: {', '.join(published.unused[:3])}"
            f"{', …' if len(published.unused) > 3 else ''}"
        )
    if published.vectors is not None:
        common.say(f"weights: {len(published.vectors):,} vectors of blocks")
    fields = ", ".join(f"{name}={value!r}" for name, value in published.model.items())
    common.say(f"weights: config.model must have {fields}")


def entry() -> None:
    """Console script."""
    common.run(main, name="convert", required=("workdir",))


if __name__ == "__main__":
    entry()
