"""Everything that `cli.train` trains, at toy size and on real artefacts: one table.

    retro         RETRO
    retrofit      its cross-attention and encoder alone, over a frozen plain decoder
    realm_host    REALM's pre-training that searches on the host, one step ahead
    realm_device  the same, searching on the devices, inside the step
    qa            REALM's fine-tuning for questions

Every system's batch and every matrix can be cut in eight.
"""

import jax
import tiny_qa
import toy_pretraining
import toy_retro
from etils import epath
from toy_pretraining import changed

from realm_retro.cli import train
from realm_retro.parallel.mesh import MeshConfig, make_mesh

NAMES = ("retro", "retrofit", "realm_host", "realm_device", "qa")


def workdir_of(folder, system):
    """The system's workdir under `folder`, with all that a training reads."""
    place = folder / system.partition("_")[0].replace("fit", "")
    workdir = epath.Path(place / "work")
    if not workdir.exists():
        place.mkdir(exist_ok=True)
        _prepare(place, workdir, system)
    if system == "retrofit" and not (workdir / "runs" / "plain").exists():
        config = toy_retro.make_config(place, "plain", train={"steps": 10})
        train.run(config, workdir, mesh_of(1, 1, 1))
    return workdir


def make_config(folder, system, *, name, steps=20, mesh=None, **sections):
    """The system's config.

    Args:
      folder: as of `workdir_of`.
      system: one of `NAMES`.
      name: of the run.
      steps: of the run; each is logged.
      mesh: sizes (data, fsdp, tensor) for `cli.train`; all devices on data by default.
      **sections: what else is to change; see `toy_pretraining.changed`.
    """
    place = workdir_of(folder, system).parent
    schedule = {"steps": steps, "batch_size": 8, "log_every": 1, "checkpoint_every": 20}
    shared = {
        "name": name,
        "mesh": dict(zip(("data", "fsdp", "tensor"), mesh or (-1, 1, 1), strict=True)),
        "optimizer": {"peak_learning_rate": 1e-3, "warmup_steps": 2},
    }
    sections["train"] = {**schedule, **sections.get("train", {})}
    if system.startswith("retro"):
        return changed(toy_retro.make_config(place, system), **shared, **sections)
    heads = {"num_heads": 8}
    if system == "qa":
        made = tiny_qa.config(place / "work" / "q.jsonl")
        return changed(made, **{**shared, "model": heads, **sections})
    placement = {"placement": system.removeprefix("realm_")}
    sections["pretrain"] = {**placement, **sections.get("pretrain", {})}
    realm = {**shared, "model": heads, "refresh": {"every": 6, "shard_rows": 16}}
    return toy_pretraining.make_config(place, **{**realm, **sections})


def trained(folder, system, sizes, *, name, **options):
    """Trains in this process on the first devices; returns what was logged."""
    workdir = workdir_of(folder, system)
    config = make_config(folder, system, name=name, **options)
    train.run(config, workdir, mesh_of(*sizes))
    return toy_pretraining.records(config, workdir)


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data, fsdp, tensor), devices)


def _prepare(place, workdir, system):
    if system == "qa":
        tiny_qa.write_passages(workdir)
        tiny_qa.write_questions(workdir / "q.jsonl")
    elif system.startswith("retro"):
        toy_retro.write_corpus(place)
        toy_retro.prepared(toy_retro.make_config(place), workdir)
    else:
        toy_pretraining.write_rivers(place)
        toy_pretraining.prepared(toy_pretraining.make_config(place), workdir)
