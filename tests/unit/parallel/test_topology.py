import pytest

from realm_retro.errors import UserError
from realm_retro.parallel import topology


def test_a_topology_is_read_and_written():
    found = topology.parse("v5e:8x8")
    assert (found.chips, found.hosts, found.accelerator) == (64, 16, "v5litepod-64")
    assert str(found) == "v5e:8x8"
    assert topology.parse("v5p:4x4x8").accelerator == "v5p-256"  # of two cores each
    assert topology.parse("v4:2x2x1").hosts == 1
    # Eight v5e chips share a host; in larger slices four do.
    assert [topology.parse(f"v5e:{shape}").hosts for shape in ("2x4", "4x4")] == [1, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write CHIP:AxB"),
        ("v5e", "write CHIP:AxB"),
        ("v9:2x2", "chips are v4, v5e, v5p"),
        ("v5e:2x2x2", "v5e has 2 dimensions, not 3; write v5e:4x4"),
        ("v5p:4x4", "v5p has 3 dimensions, not 2; write v5p:4x4x4"),
        ("v5e:0x4", "'0x4' is no grid"),
        ("v5e:4x", "'4x' is no grid"),
        ("v5e:axb", "'axb' is no grid"),
    ],
)
def test_what_is_no_topology_is_refused_in_one_line(text, said):
    with pytest.raises(UserError) as error:
        topology.parse(text)
    assert said in str(error.value)
    assert f"--topology={text}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_group_sends_along_the_dimensions_that_it_spans():
    line, ring = topology.parse("v5e:8x8"), topology.parse("v5e:16x16")
    row = [(0, y) for y in range(8)]
    square = [(x, y) for x in range(8) for y in range(8)]
    assert line.bandwidth(row) == 50e9
    assert line.bandwidth(square) == 100e9
    # A part of a ring is a line; a whole one has a link in each direction.
    assert ring.bandwidth(row) == 50e9
    assert ring.bandwidth([(0, y) for y in range(16)]) == 100e9
    cube = topology.parse("v5p:4x4x4")
    assert cube.bandwidth([(0, 0, 0), (1, 1, 1)]) == 300e9
    assert cube.bandwidth([(0, y, z) for y in range(4) for z in range(2)]) == 300e9


def test_exchanges_wait_for_the_links_between_two_halves():
    line, ring = topology.parse("v5e:8x8"), topology.parse("v5e:16x16")
    row = [(0, y) for y in range(8)]
    # Four chips send half of their bytes over one link.
    assert line.exchange_bandwidth(row) == 25e9
    assert ring.exchange_bandwidth([(0, y) for y in range(16)]) == 25e9
    square = [(x, y) for x in range(8) for y in range(8)]
    assert line.exchange_bandwidth(square) == 25e9
    assert line.exchange_bandwidth(row[:2]) == 50e9


def test_distances_are_the_shortest():
    line, ring = topology.parse("v5e:8x8"), topology.parse("v5e:16x16")
    assert line.distance((0, 0), (7, 3)) == 10
    assert ring.distance((0, 0), (15, 3)) == 4


def test_numbers_of_the_chips_agree_with_each_other():
    for chip in topology.CHIPS.values():
        assert chip.dimensions in (2, 3)
        # 100 to 300 operations for a byte of memory, and memory beats the links.
        assert 100 < chip.flops / chip.hbm_bandwidth < 300
        assert chip.hbm_bandwidth > 2 * chip.dimensions * chip.link_bandwidth
        assert chip.source.startswith("https://")
