"""What a program sends and moves, read from its text."""
# ruff: noqa: E501  (the text is as XLA prints it)

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realm_retro.parallel import hlo, hlo_groups, hlo_traffic
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


@pytest.mark.parametrize(
    ("lines", "moved"),
    [
        # 64 of 256 columns are read and written; the core's own memory is free.
        (
            [
                "%s = ((f32[256,256]{1,0}), f32[256,64]{1,0}, s32[]{:S(2)}) slice-start(%big), slice={[0:256], [0:64]}",
                "%t = f32[256,64]{1,0} slice-done(%s)",
            ],
            2 * 256 * 64 * 4,
        ),
        (
            [
                "%s = ((f32[256,256]{1,0}), f32[256,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%big), slice={[0:256], [0:64]}",
                "%t = f32[256,64]{1,0:S(1)} slice-done(%s)",
            ],
            256 * 64 * 4,
        ),
        (
            [
                "%s = (f32[256,256]{1,0}, f32[256,256]{1,0}, u32[]{:S(2)}) copy-start(%big)",
                "%t = f32[256,256]{1,0} copy-done(%s)",
            ],
            2 * 256 * 256 * 4,
        ),
        (
            [
                "%s = (f32[256,256]{1,0:S(1)}, f32[256,256]{1,0}, u32[]{:S(2)}) copy-start(%big)",
                "%t = f32[256,256]{1,0:S(1)} copy-done(%s)",
            ],
            256 * 256 * 4,
        ),
        (["%t = f32[256,256]{1,0} broadcast(%x.0), dimensions={1}"], 32 + 256 * 1024),
        (["%t = f32[256,256]{1,0} iota(), iota_dimension=0"], 256 * 1024),
    ],
)
def test_what_is_started_is_moved_once(program, lines, moved):
    lines = ["%big = f32[256,256]{1,0} parameter(3)", *lines]
    text = PROGRAM.replace(
        "  %zero.1 =", "".join(f"  {x}\n" for x in lines) + "  %zero.1 ="
    )
    before = hlo_traffic.traffic(program)
    assert hlo_traffic.traffic(hlo.parse(text)) - before == moved


# A gather beside a product, as XLA prints it for TPUs: begun, carried on, awaited.
ASYNC = """\
%begin (b: f32[8]) -> (f32[8], f32[64]) {
  %b = f32[8]{0} parameter(0)
  %g.0 = f32[64]{0} all-gather(%b), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c.0 = (f32[8]{0}, f32[64]{0}) custom-call(%b, %g.0)
}

%async_collective_fusion.1 (b.1: f32[8], w.1: f32[64]) -> (f32[8], f32[64], f32[8]) {
  %b.1 = f32[8]{0} parameter(0)
  %w.1 = f32[64]{0} parameter(1)
  %g.1 = f32[64]{0} all-gather(%b.1), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c.1 = (f32[8]{0}, f32[64]{0}, f32[8]{0}) custom-call(%b.1, %w.1, %g.1)
}

%end (b.2: f32[8], w.2: f32[64]) -> f32[64] {
  %b.2 = f32[8]{0} parameter(0)
  %w.2 = f32[64]{0} parameter(1)
  %g.2 = f32[64]{0} all-gather(%b.2), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c.2 = f32[64]{0} custom-call(%b.2, %w.2, %g.2)
}

%all-reduce-scatter.1 (b.3: f32[64]) -> f32[8] {
  %b.3 = f32[64]{0} parameter(0)
  %r.3 = f32[64]{0} all-reduce(%b.3), channel_id=10, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %s.3 = f32[8]{0} slice(%r.3), slice={[0:8]}
}

"""
CALLS = """\
  %async-collective-start = (f32[8]{0}, f32[64]{0}) fusion(%x.0), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %e.0 = f32[8]{0} get-tuple-element(%async-collective-start), index=0
  %e.1 = f32[64]{0} get-tuple-element(%async-collective-start), index=1
  %beside = (f32[8]{0}, f32[64]{0}, f32[8]{0}) fusion(%e.0, %e.1), kind=kOutput, output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}, calls=%async_collective_fusion.1
  %async-collective-done = f32[64]{0} fusion(%e.0, %e.1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  %scattered = f32[8]{0} fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.1
"""


def test_a_collective_in_fusions_of_a_tpu_counts_once(program):
    text = PROGRAM.replace("%body (t:", ASYNC + "%body (t:")
    found = hlo.parse(text.replace("  %zero.1 =", CALLS + "  %zero.1 ="))
    gathers = [one for one in found.collectives(8) if len(one.group) == 8]
    assert sorted((one.kind, one.times, one.sent) for one in gathers) == [
        ("all-gather", 1, 7 * 32),
        ("all-reduce", 1, 2 * 32 * 7 / 8),
        ("reduce-scatter", 1, 256 * 7 / 8),
    ]
    # The share is read and the whole written; the product beside it; the scatter.
    moved = hlo_traffic.traffic(found) - hlo_traffic.traffic(program)
    assert moved == 256 + 32 + (256 + 32)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8,'b'=1] {'a'}, x", tuple(range(8))),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        (
            "replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}",
            (0, 2),
        ),
        ("source_target_pairs={{3,1},{1,0}}", (3, 1)),
        ("dimensions={0}", tuple(range(8))),
    ],
)
def test_groups_of_devices(text, group):
    assert hlo_groups.group(text, 8) == group


def test_all_pairs_of_a_permutation():
    text = "source_target_pairs={{0,1},{1,7}}, channel_id=1"
    assert hlo_groups.pairs(text) == ((0, 1), (1, 7))
    assert hlo_groups.pairs("replica_groups={{0,1}}") == ()


def test_only_what_a_loop_compares_with_is_its_limit():
    text = PROGRAM.replace(
        "  %limit = s32[] constant(12)",
        "  %other = s32[] constant(1000)\n  %limit = s32[] constant(12)",
    )
    times = {one.kind: one.times for one in hlo.parse(text).collectives(8)}
    assert times["all-gather"] == 12


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
