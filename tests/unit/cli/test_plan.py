"""Plans of small trainings by shapes alone, and how they are told."""

import json
import pathlib

import jax
import ml_collections
import pytest
import toy_pretraining

from realm_retro import config as config_lib
from realm_retro.cli import plan, plan_compile, plan_report, plan_time
from realm_retro.cli.plan_task import PlanConfig
from realm_retro.errors import UserError
from realm_retro.parallel import topology
from realm_retro.train.flop_count import Flops

PLACE = topology.parse("v5e:2x4")
MODEL = {
    "vocab_size": 512,
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 2,
    "head_dim": 16,
    "ffw_dim": 64,
    "chunk_length": 16,
    "cca_layers": (2,),
    "encoder_layers": 1,
    "encoder_dim": 16,
    "encoder_num_heads": 1,
    "encoder_head_dim": 16,
    "encoder_ffw_dim": 32,
    "remat": True,
}


def retro(**changes):
    config = {
        "name": "tiny",
        "seed": 0,
        "model": MODEL,
        "neighbours": {"k": 3},
        "embed": {"dtype": "float16"},
        "index": {"backend": "exact"},
        "optimizer": {"warmup_steps": 1},
        "train": {"steps": 1000, "batch_size": 16, "sequence_chunks": 4, "keep": 2},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        "plan": {"rows": 1000, "documents": 10},
    }
    return toy_pretraining.changed(ml_collections.ConfigDict(config), **changes)


def planned(config, place=PLACE):
    settings = config_lib.build(PlanConfig, config.plan, name="config.plan")
    return plan.plan(config, settings, place, compile_it=False)


@pytest.fixture(scope="module")
def tiny():
    return planned(retro())


def test_memory_of_the_state_is_its_share(tiny):
    memory = tiny["memory"]
    # Weights that 8 chips cut, in float32, and two moments of each; norms stay whole.
    assert tiny["weights"] * 4 / 8 < memory["parameters"] < tiny["weights"] * 4 / 6
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    # Two rows of 64 tokens: three int32 and a bool each; 4 chunks of 2 x 32 neighbours.
    assert memory["batch"] == 2 * (64 * 13 + 4 * 2 * 32 * 5)
    assert memory["index"] == 0
    assert memory["whole"] == {}


def test_it_says_what_was_not_checked(tiny):
    (note,) = tiny["notes"]
    assert "activations and temporaries" in note
    assert tiny["fits"] is None
    assert "left for the rest" in tiny["verdict"]
    assert tiny["time"]["memory"] is None
    text = "\n".join(plan_report.lines(tiny))
    assert "NOT CHECKED: activations" in text
    assert "v5e:2x4: 8 chips, 1 host (v5litepod-8)" in text


def test_counted_operations_are_those_of_the_formula(tiny):
    flops = tiny["flops"]
    # The count has recomputation, the formula every key that is masked.
    assert 0.9 < flops["counted"] / flops["formula"] < 1.6
    assert flops["unknown_loops"] == 0


def test_artefacts_by_their_formats(tiny):
    items = {item["name"]: item for item in tiny["storage"]["items"]}
    assert items["chunks"]["disk"] == 1000 * (16 * 2 + 24) + 10 * 33
    assert items["embeddings"]["disk"] == 1000 * 384 * 2
    assert items["index"]["disk"] == 1000 * (384 * 4 + 8)
    assert items["neighbours"]["disk"] == 1000 * 3 * 12
    assert items["checkpoints"]["disk"] == pytest.approx(
        (2 + 1) * 3 * 4 * tiny["weights"], rel=1e-3
    )


def test_one_part_of_the_index_is_in_memory_at_a_time():
    # ScaNN, of 1,000 rows: 385 numbers, an id, and 129 codes of half a byte twice.
    row = 385 * 4 + 8 + 2 * (129 / 2 + 4)
    for part_rows, held in ((300, 300), (5000, 1000)):
        index = {"backend": "scann", "part_rows": part_rows}
        found = planned(retro(index=index))["storage"]["items"]
        items = {item["name"]: item for item in found}
        assert items["neighbours"]["memory"] == held * row
        assert items["index"]["memory"] == 3 * held * 385 * 4
        assert items["index"]["disk"] == 1000 * row


def test_a_plain_decoder_needs_neither_index_nor_neighbours():
    config = retro(model={"cca_layers": ()}, train={"neighbours": 0})
    found = planned(config)
    names = [item["name"] for item in found["storage"]["items"]]
    assert names == ["chunks", "checkpoints"]


def test_a_plan_is_json(tiny):
    assert json.loads(json.dumps(tiny))["topology"]["name"] == "v5e:2x4"


def test_replicated_weights_are_named():
    model = {"vocab_size": 4096, "model_dim": 128, "cca_layers": ()}
    found = planned(retro(model=model, mesh={"fsdp": 1, "data": -1}))
    table, size = "['params']['embed']['table']", 4096 * 128 * 4
    whole = found["memory"]["whole"]
    assert [n for n in whole if n.startswith("parameters")] == [f"parameters{table}"]
    assert set(whole.values()) == {size}
    assert len([name for name in whole if name.startswith("moments")]) == 2
    text = "\n".join(plan_report.lines(found))
    assert f"whole on every chip: parameters{table}, 0.002 GB" in text


def test_a_state_that_is_too_large_does_not_fit():
    model = {"model_dim": 4096, "ffw_dim": 2**20, "cca_layers": ()}
    config = retro(model=model)
    found = planned(config)
    assert found["fits"] is False
    assert found["verdict"].startswith("DOES NOT FIT")


def realm(task, **changes):
    config = toy_pretraining.make_config(pathlib.Path("nowhere"))
    config = toy_pretraining.changed(config, task=task, **changes)
    config.plan = {"rows": 10_000, "documents": 100}
    return config


@pytest.mark.parametrize("task", ["realm_ict", "realm_finetune", "realm_pretrain"])
def test_every_task_is_planned(task):
    found = planned(realm(task, train={"batch_size": 8}))
    assert found["task"] == task
    assert found["flops"]["counted"] > 0
    assert found["memory"]["index"] == 0


def test_an_index_on_the_devices_is_in_the_plan():
    search = {"placement": "device", "vectors": "bfloat16"}
    found = planned(realm("realm_pretrain", train={"batch_size": 8}, pretrain=search))
    # 1,250 rows a chip: a vector of 8, 4 + 24 wordpieces, two lengths and a document.
    assert found["memory"]["index"] == 1250 * (8 * 2 + (4 + 24) * 2 + 3 * 4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: retro(mesh={"fsdp": 3}), "config.mesh: data=1 x fsdp=3 x tensor=1"),
        (lambda: retro(task="nothing"), "config.task='nothing' is not known"),
        (
            lambda: toy_pretraining.changed(
                realm("realm_pretrain", pretrain={"placement": "device"}),
                plan={"rows": 0},
            ),
            "config.plan.rows=0: say how many passages the corpus has",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(config, said):
    with pytest.raises(UserError) as error:
        planned(config())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_topology_must_be_named():
    with pytest.raises(UserError, match=r"--topology is missing"):
        plan.chosen("", PlanConfig())
    assert plan.chosen("", PlanConfig(topology="v4:2x2x1")) == "v4:2x2x1"
    assert plan.chosen("v5e:2x2", PlanConfig(topology="v4:2x2x1")) == "v5e:2x2"


def test_the_roofline_is_the_longest_of_three():
    flops = Flops(total=8e12, passes=8 * 197e12 * 0.1, once=8e12)
    found = plan_time.step_time(
        flops,
        8 * 197e12 * 0.05,
        PLACE,
        traffic=819e9 * 0.2,
        communication=0.3,
        steps=1000,
    )
    assert found["compute"] == pytest.approx(0.1)
    assert found["memory"] == pytest.approx(0.2)
    assert found["roofline"] == pytest.approx(0.3)
    assert found["serial"] == pytest.approx(0.6)
    assert found["mfu"] == pytest.approx(0.05 / 0.3)
    assert found["days"] == pytest.approx(300 / 86400)
    assert found["device_hours"] == pytest.approx(8 * 300 / 3600)
    assert found["serial_days"] == pytest.approx(600 / 86400)


def test_the_compilers_refusal_is_read():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of \
memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(train_step)/loss" source_file="x.py" source_line=3
     Shape: f32[16384,128000]{1,0:T(8,128)}
     Unpadded size: 7.81G
"""
    assert plan_compile.refusal(message) == {
        "needed": round(23.5 * 2**30),
        "capacity": round(15.75 * 2**30),
    }
    assert plan_compile.refusal("INTERNAL: something else") is None
    temporaries = "Allocation size required for HLO temporaries (20.00G)"
    assert plan_compile.refusal(temporaries) == {
        "needed": None,
        "temporaries": 20 * 2**30,
    }


class Refusing:
    """A traced step that the compiler has no room for."""

    def __init__(self, message):
        self.message = message

    def lower(self):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "said", "with_state"),
    [
        ("Used 15.90G of 15.75G hbm. Exceeded by 150M.", 15.9, False),
        # Weights, moments and batch come on top.
        ("required for HLO temporaries (15.70G)", 15.7, True),
    ],
)
def test_what_the_compiler_refuses_does_not_fit(message, said, with_state, monkeypatch):
    monkeypatch.setattr(topology, "can_compile", lambda: True)
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices()[:8])
    real = plan_compile.trace
    monkeypatch.setattr(
        plan_compile, "trace", lambda task: (Refusing(message), real(task)[1])
    )
    config = retro()
    settings = config_lib.build(PlanConfig, config.plan, name="config.plan")
    found = plan.plan(config, settings, PLACE)
    assert found["fits"] is False
    assert "DOES NOT FIT" in found["verdict"]
    memory = found["memory"]
    state = sum(memory[name] for name in ("parameters", "optimizer", "index", "batch"))
    assert memory["needed"] == round(said * 2**30) + with_state * state


def test_work_that_chips_repeat_takes_its_time():
    flops = Flops(total=8e12, passes=8 * 197e12 * 0.1, once=8e12)
    given = {"traffic": None, "communication": None, "steps": 1}
    times = [
        plan_time.step_time(flops, 1.0, PLACE, repeated=by, **given)["compute"]
        for by in (0.0, 1.0, 2.5)
    ]
    assert times == pytest.approx([0.1, 0.1, 0.25])


def test_loops_that_nobody_can_count_are_told(tiny):
    told = {**tiny, "notes": [plan._LOOPS.format(2, 0)]}
    text = "\n".join(plan_report.lines(told))
    assert "NOT CHECKED: how often 2 loops of the program" in text


def test_no_device_of_the_plan_is_touched(tiny):
    assert jax.devices()[0].platform == "cpu"
