"""What a program sends and moves, read from its text."""
# ruff: noqa: E501  (the text is as XLA prints it)

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realm_retro.parallel import hlo, hlo_traffic
from realm_retro.parallel.mesh import MeshConfig, make_mesh

PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[12,256,128], p1: s32[]) -> f32[256,128] {
  %p0 = f32[12,256,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,256,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,128}
  ROOT %flat = f32[256,128]{1,0} bitcast(%slice)
}

%body (t: (s32[], f32[12,256,128], bf16[64,128])) -> (s32[], f32[12,256,128], bf16[64,128]) {
  %t = (s32[], f32[12,256,128]{2,1,0:T(8,128)}, /*index=2*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %stack = f32[12,256,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %layer = f32[256,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused
  %near = f32[256,128]{1,0:T(8,128)S(1)} copy(%layer)
  %gathered = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/gather"}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[12,256,128], bf16[64,128]) tuple(%next, %stack, %x)
}

%condition (t.1: (s32[], f32[12,256,128], bf16[64,128])) -> pred[] {
  %t.1 = (s32[], f32[12,256,128], bf16[64,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.0: f32[8], w: f32[12,256,128], y: bf16[64,128]) -> f32[8] {
  %x.0 = f32[8]{0} parameter(0)
  %w = f32[12,256,128]{2,1,0:T(8,128)} parameter(1)
  %y = bf16[64,128]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[12,256,128], bf16[64,128]) tuple(%zero.1, %w, %y)
  %loop = (s32[], f32[12,256,128], bf16[64,128]) while(%start), condition=%condition, body=%body
  %reduce-start = f32[8]{0} all-reduce-start(%x.0), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %reduce-done = f32[8]{0} all-reduce-done(%reduce-start)
  %alone = f32[8]{0} all-reduce(%reduce-done), channel_id=3, replica_groups={{0},{1}}, to_apply=%add
  ROOT %shifted = f32[8]{0} collective-permute(%alone), channel_id=4, source_target_pairs={{0,1},{1,0}}
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


def test_collectives_count_as_often_as_their_loop_turns(program):
    gather, reduce, shift = sorted(program.collectives(8), key=lambda one: one.kind)
    assert [one.kind for one in (gather, reduce, shift)] == [
        "all-gather",
        "all-reduce",
        "collective-permute",
    ]
    # bfloat16 [64, 128] of each of four chips, twelve times.
    assert (gather.times, gather.bytes, gather.payload) == (12, 16_384, 65_536)
    assert gather.group == (0, 2, 4, 6)
    assert gather.sent == 12 * 3 * 16_384
    assert gather.source == "jit(f)/gather"
    # Started and awaited is once; a group of one sends nothing.
    assert (reduce.times, reduce.bytes, len(reduce.group)) == (1, 32, 8)
    assert reduce.sent == 2 * 32 * 7 / 8
    assert (shift.group, shift.sent) == ((0, 1), 32)


def test_memory_is_moved_by_what_is_sliced_and_not_fused(program):
    layer, x, gathered = 256 * 128 * 4, 64 * 128 * 2, 256 * 128 * 2
    # In the loop: the fusion reads one layer of twelve (and its number) and writes it;
    # the copy goes to the core's own memory; the gather; a sum of two numbers.
    turn = (layer + 4 + layer) + layer + (x + gathered) + 12
    # The condition compares two numbers; outside three collectives of 8 numbers.
    assert hlo_traffic.traffic(program) == 12 * (turn + 9) + 3 * 64


def test_a_trip_count_that_is_written_down_wins(program):
    told = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    times = {one.kind: one.times for one in hlo.parse(told).collectives(8)}
    assert times["all-gather"] == 5
    assert program.unknown_loops() == 0


def test_a_loop_without_a_limit_counts_once_and_is_told():
    endless = re.sub(
        r"%limit = s32\[\] constant\(12\)", "%limit = s32[] add(%i.1, %i.1)", PROGRAM
    )
    found = hlo.parse(endless)
    assert found.unknown_loops() == 1
    assert {one.times for one in found.collectives(8)} == {1}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("(f32[2], (s8[3], u16[4]{0}))", 8 + 3 + 8),
        ("s4[7]", 3),
        ("f8e4m3fn[10]", 10),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_the_largest_arrays(program):
    (size, shape, _), *_ = hlo_traffic.largest(program, 3)
    assert (size, shape) == (256 * 128 * 4, "f32[256,128]")


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        hlo.parse("HloModule nothing\n")


def test_a_program_of_this_compiler():
    """A scan that gathers a layer's weights in each of 5 turns, and one sum."""
    mesh = make_mesh(MeshConfig(1, 8, 1))

    def place(*names):
        return NamedSharding(mesh, PartitionSpec(*names))

    def f(x, layers):
        def turn(x, w):
            w = jax.lax.with_sharding_constraint(w, place())
            return jnp.tanh(x @ w), None

        return jax.lax.scan(turn, x, layers)[0].sum()

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place("fsdp"))
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=place(None, "fsdp"))
    text = jax.jit(f, out_shardings=place()).lower(x, w).compile().as_text()
    assert text is not None
    found = hlo.parse(text)
    assert found.unknown_loops() == 0
    by_kind = {one.kind: one for one in found.collectives(8)}
    assert by_kind.keys() == {"all-gather", "all-reduce"}
    gather = by_kind["all-gather"]
    assert (gather.times, gather.payload) == (5, 32 * 32 * 4)
    assert (by_kind["all-reduce"].times, by_kind["all-reduce"].bytes) == (1, 4)
    assert hlo_traffic.traffic(found) > 5 * 32 * 32 * 4
