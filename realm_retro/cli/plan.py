r"""Says what a training would need, before it is paid for.

Compiles the very train step of a config for a slice of TPUs, without having one, and
prints the memory of a chip, what a step computes and sends, how long the run takes at
best, and the disk and host memory of its artefacts. Nothing is read but the config,
and of an encoder that it names (config.encoder.path) the file config.json.

  python -m realm_retro.cli.plan --config=configs/retro/retro_172m.py --topology=v5e:8x8

It needs the TPU compiler, ``pip install 'realm_retro[tpu]'``; without it only shapes
and shardings are worked out, and the output says what was not checked. The topology
may stand in the config (config.plan.topology). The exit status is 1 where the training
does not fit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import ml_collections
from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, plan_compile, plan_report, plan_storage, plan_time
from realm_retro.cli.plan_task import PlanConfig, make, state_bytes
from realm_retro.errors import UserError
from realm_retro.parallel import topology
from realm_retro.parallel.mesh import MeshConfig, make_abstract_mesh, make_mesh
from realm_retro.parallel.topology import Topology
from realm_retro.typing import JsonDict

TOPOLOGY = flags.DEFINE_string(
    "topology", "", "TPU chips, such as v5e:8x8; config.plan.topology if empty."
)
AS_JSON = flags.DEFINE_bool("as_json", False, "Print the plan as JSON.")
COMPILE = flags.DEFINE_bool(
    "compile", True, "Compile the step; else shapes alone, which takes seconds."
)
_DOES_NOT_FIT = 1
_SHAPES_ONLY = (
    "activations and temporaries, memory traffic and communication, and whether the"
    " compiler accepts the program"
)
_LOOPS = (
    "how often {} loops of the program and {} of the jaxpr turn: each counts as one"
    " turn, so that operations, traffic and time are too low"
)


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Prints the plan of a config; the workdir is not touched."""
    del workdir
    # Or JAX would look for TPUs wherever libtpu is installed.
    jax.config.update("jax_platforms", "cpu")
    settings = config_lib.build(
        PlanConfig, config_lib.section(config, "plan"), name="config.plan"
    )
    place = topology.parse(chosen(TOPOLOGY.value, settings))
    found = plan(config, settings, place, compile_it=COMPILE.value)
    if AS_JSON.value:
        common.say(json.dumps(found, indent=2))
    else:
        for line in plan_report.lines(found):
            common.say(line)
    if found["fits"] is False:
        sys.exit(_DOES_NOT_FIT)


def chosen(flag: str, settings: PlanConfig) -> str:
    """The topology of the flag, or else of the config.

    Raises:
      UserError: neither names one.
    """
    if not (flag or settings.topology):
        raise UserError(
            "--topology is missing, and config.plan.topology too: name TPU chips, such"
            " as v5e:8x8"
        )
    return flag or settings.topology


def plan(
    config: ml_collections.ConfigDict,
    settings: PlanConfig,
    place: Topology,
    *,
    compile_it: bool = True,
) -> JsonDict:
    """The plan of a config for some chips, as JSON values.

    Args:
      config: the run's.
      settings: its section ``plan``.
      place: the chips.
      compile_it: False for shapes alone, as where there is no compiler.

    Raises:
      UserError: the config is wrong, or does not fit the topology.
    """
    can = topology.can_compile()
    notes = []
    if not (can and compile_it):
        why = "libtpu is not installed" if not can else "--nocompile"
        notes.append(f"{_SHAPES_ONLY} ({why})")
    shape = config_lib.build(
        MeshConfig, config_lib.section(config, "mesh"), name="config.mesh"
    )
    if notes:
        mesh: Any = make_abstract_mesh(shape, place.chips)
    else:
        mesh = make_mesh(shape, topology.devices(place))
    task = make(config, settings, mesh)
    state = state_bytes(task)
    traced, flops = plan_compile.trace(task)
    compiled = {} if notes else plan_compile.compiled(traced, flops, mesh, place)
    if "refused" in compiled:
        notes.append(f"what comes after memory ({compiled['refused']})")
    if compiled.get("unknown_loops") or flops.unknown_loops:
        notes.append(
            _LOOPS.format(compiled.get("unknown_loops", 0), flops.unknown_loops)
        )
    if "refused" in compiled and compiled["needed"] is None:
        compiled["needed"] = _least(state) + compiled["temporaries"]
    needed = compiled.get("needed")
    capacity = compiled.get("capacity") or place.chip.hbm_bytes
    refused = "refused" in compiled
    fits, verdict = _verdict(_least(state), needed, capacity, refused=refused)
    return {
        "config": config.name,
        "task": task.name,
        "weights": state.pop("weights"),
        "topology": {
            "name": str(place),
            "chips": place.chips,
            "hosts": place.hosts,
            "accelerator": place.accelerator,
        },
        "mesh": dict(mesh.shape),
        "notes": notes,
        "fits": fits,
        "verdict": verdict,
        "memory": {
            "capacity": capacity,
            **state,
            **{n: compiled.get(n) for n in ("temporaries", "outputs", "program")},
            "needed": needed,
        },
        "compiled": compiled,
        "flops": {
            "counted": flops.total,
            "passes": flops.passes,
            "formula": task.recipe.flops_per_step,
            "unknown_loops": flops.unknown_loops,
        },
        "time": plan_time.step_time(
            flops,
            task.recipe.flops_per_step,
            place,
            traffic=compiled.get("traffic"),
            communication=compiled.get("communication_seconds"),
            repeated=compiled.get("repeated", 1.0),
            steps=task.train.steps,
        ),
        "steps": task.train.steps,
        "batch_size": task.train.batch_size,
        "storage": plan_storage.storage(config, settings, task),
    }


def _least(state: JsonDict) -> int:
    """Bytes that a chip holds before it computes anything."""
    return sum(state[name] for name in ("parameters", "optimizer", "index", "batch"))


def _verdict(
    least: int, needed: int | None, capacity: int, *, refused: bool
) -> tuple[bool | None, str]:
    """Whether it fits, None where that is not known, and why."""
    if needed is None and least <= capacity:
        left = (capacity - least) / 1e9
        return None, f"weights and batch fit; {left:.1f} GB are left for the rest"
    used = least if needed is None else needed
    if refused or used > capacity:
        return False, f"DOES NOT FIT: {used / 1e9:.2f} GB of {capacity / 1e9:.2f}"
    return True, f"fits: {used / capacity:.0%} of the memory"


def entry() -> None:
    """The console script."""
    common.run(main, name="plan", required=("config",))


if __name__ == "__main__":
    entry()
