"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from realm_retro.typing import JsonDict

_GB = 1e9


def lines(plan: JsonDict) -> Iterator[str]:
    """The lines of a plan that `cli.plan` made."""
    place = plan["topology"]
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    yield f"{plan['config']}: {plan['task']}, {plan['weights'] / 1e6:,.1f}M parameters"
    hosts = "1 host" if place["hosts"] == 1 else f"{place['hosts']} hosts"
    yield (
        f"  on {place['name']}: {place['chips']} chips, {hosts}"
        f" ({place['accelerator']}), mesh {mesh}"
    )
    for note in plan["notes"]:
        yield f"  NOT CHECKED: {note}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _work(plan)
    yield ""
    yield from _storage(plan["storage"])


def _memory(plan: JsonDict) -> Iterator[str]:
    memory = plan["memory"]
    yield f"Memory of one chip, GB ({_gb(memory['capacity'])} are there)"
    for name in (
        "parameters",
        "optimizer",
        "index",
        "batch",
        "temporaries",
        "outputs",
        "program",
        "needed",
    ):
        value = memory.get(name)
        if value is not None:
            yield f"  {name:<12} {_gb(value):>9}"
    yield f"  {plan['verdict']}"
    for name, size in memory["whole"].items():
        yield f"  whole on every chip: {name}, {_gb(size)} GB"
    compiled = plan["compiled"]
    for array in compiled.get("arrays") or compiled.get("buffers") or ():
        source = array["source"][-70:]
        yield f"  {_gb(array['bytes']):>9}  {array['shape']:<34} {source}"


def _work(plan: JsonDict) -> Iterator[str]:
    flops, time, compiled = plan["flops"], plan["time"], plan["compiled"]
    yield "A step"
    yield (
        f"  operations   {flops['counted']:.3e} counted in the jaxpr with the trip"
        f" counts of its scans, {flops['formula']:.3e} by the model's formula"
    )
    if flops["passes"] > 1.001 * flops["counted"]:
        yield f"               {flops['passes']:.3e} as bfloat16 passes"
    if "repeated" in compiled:
        yield (
            f"               each done {compiled['repeated']:.2f} times over all chips,"
            " by the compiler's count; computing takes as often as long"
        )
        yield f"  memory       {_gb(compiled['traffic'])} GB read and written by a chip"
        for kind, entry in compiled["collectives"].items():
            yield (
                f"  {kind:<18} {entry['times']:>6} times {_gb(entry['bytes']):>9} GB"
                f" {1e3 * entry['seconds']:>9.2f} ms"
            )
        for one in compiled["largest_collectives"]:
            yield (
                f"    {1e3 * one['seconds']:>8.2f} ms  {one['times']} x {one['kind']}"
                f" over {one['devices']}: {one['shape'][:60]} {one['source'][-60:]}"
            )
    yield (
        "  seconds      "
        + ", ".join(
            f"{name} {time[name]:.4f}"
            for name in ("compute", "memory", "communication")
            if time[name] is not None
        )
    )
    yield _run("roofline", time, "")
    if time["serial"] > time["roofline"]:
        yield _run("no overlap", time, "serial_")
    yield f"  of {plan['steps']:,} steps of {plan['batch_size']:,}"


def _run(name: str, time: JsonDict, prefix: str) -> str:
    seconds = time["serial" if prefix else "roofline"]
    return (
        f"  {name:<12} {seconds:.4f} s a step, model FLOP utilisation"
        f" {time[f'{prefix}mfu']:.1%}, {time[f'{prefix}days']:.1f} days,"
        f" {time[f'{prefix}device_hours']:,.0f} device-hours"
    )


def _storage(storage: JsonDict) -> Iterator[str]:
    yield "Artefacts, GB        disk   memory  of"
    for item in storage["items"]:
        yield (
            f"  {item['name']:<15} {_gb(item['disk']):>8} {_gb(item['memory']):>8}"
            f"  {item['who']}"
        )
    yield f"  {'together':<15} {_gb(storage['disk']):>8}"
    yield (
        f"  host memory: {_gb(storage['training'])} a training process,"
        f" {_gb(storage['largest_memory'])} the largest of all"
    )
    yield f"  not in it: {storage['unknown']}"


def _gb(size: float) -> str:
    return f"{size / _GB:,.3f}"
