"""Groups of devices, the mesh axes they run along, and what the links between them take."""

import pytest

from opensora_jax.forecast.hlo import parse_line
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.forecast.traffic import HOP_SECONDS, Collective, Network, axes_of, read_collective, read_groups

MESH = {"data": 2, "fsdp": 3, "seq": 5, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("mesh['axis_0'=2,'axis_1'=3] {'axis_1'}", ((0, 1, 2), (3, 4, 5))),
        ("mesh['axis_0'=2,'axis_1'=3] {'axis_0'}", ((0, 3), (1, 4), (2, 5))),
        ("mesh['a'=1,'b'=3,'c'=2], device_ids=([2,3]T(1,0)) {'c'}", ((0, 3), (1, 4), (2, 5))),
        ("mesh['a'=1,'b'=3,'c'=2], device_ids=([2,3]T(1,0)) {'b'}", ((0, 1, 2), (3, 4, 5))),
        ("mesh['a'=3,'b'=2], device_ids=(5,4,3,2,1,0) {'b'}", ((5, 4), (3, 2), (1, 0))),
        ("{}", ((0, 1, 2, 3, 4, 5),)),
        ("mesh['a'=3,'b'=2] {}", ((0,), (1,), (2,), (3,), (4,), (5,))),
        ("mesh['a'=3,'b'=2] {'b':(1)2}", ()),
        ("a form of tomorrow", ()),
    ],
)
def test_groups_in_all_forms(text, groups):
    assert read_groups(text, 6) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 5, 10), (1, 6, 11)), "fsdp"),
        (((0, 1, 2, 3, 4),), "seq"),
        (((0, 15),), "data"),
        ((tuple(range(30)),), "data+fsdp+seq"),
        (((0, 1), (1, 2), (4, 0)), "seq"),
        (((0,), (1,)), "-"),
    ],
)
def test_axes_are_those_along_which_a_group_differs(groups, axes):
    assert axes_of(groups, MESH) == axes


def test_what_a_device_sends():
    groups = ((0, 1, 2, 3),)
    assert Collective("all-gather", groups, 100, 400).sent == 300
    assert Collective("reduce-scatter", groups, 400, 100).sent == 300
    assert Collective("all-reduce", groups, 400, 400).sent == 600
    assert Collective("all-to-all", groups, 400, 400).sent == 300
    assert Collective("collective-permute", ((0, 1), (1, 0)), 400, 400).sent == 400


def test_a_started_collective_gives_back_its_operand_too():
    operand = parse_line("  %x = bf16[4,140]{1,0} parameter(0)")
    started = parse_line(
        "  %s = (bf16[4,140]{1,0}, bf16[4,140]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
        "channel_id=1, source_target_pairs={{0,1},{1,0}}"
    )
    assert read_collective(started, {"x": operand}, 2) == Collective("collective-permute", ((0, 1), (1, 0)), 1120, 1120)
    gathered = parse_line("  %g = (bf16[4,140], bf16[8,140]) all-gather-start(%x), replica_groups=[1,2]<=[2]")
    assert read_collective(gathered, {"x": operand}, 2).gotten == 2240


def test_the_axes_of_a_mesh_stand_behind_its_devices():
    line = parse_line(
        "  %g = bf16[8,140]{1,0} all-gather(%x), channel_id=2, replica_groups=mesh['a'=1,'b'=2,'c'=2], "
        "device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}, use_global_device_ids=true"
    )
    operand = parse_line("  %x = bf16[4,140]{1,0} parameter(0)")
    assert read_collective(line, {"x": operand}, 4) == Collective("all-gather", ((0, 1), (2, 3)), 1120, 2240)


def network(name: str, *, efficiency: float = 1.0) -> Network:
    """Returns a slice whose devices are numbered along its last dimension first."""
    topology = parse_topology(name)
    places = [()]
    for size in topology.shape:
        places = [(*place, n) for place in places for n in range(size)]
    return Network(topology, tuple(places), efficiency)


LINK = 100e9  # of a v5p


def test_a_gather_uses_both_ways_of_a_ring_and_one_of_a_line():
    ring = Collective("all-gather", ((0, 1, 2, 3),), 100_000_000, 400_000_000)
    assert network("v5p:4x4x4").seconds(ring) == pytest.approx(3e8 / (2 * LINK) + 2 * HOP_SECONDS)
    assert network("v5p:2x2x4").seconds(ring) == pytest.approx(3e8 / LINK + 4 * HOP_SECONDS)
    assert network("v5p:1x1x3").seconds(Collective("all-gather", ((0, 1, 2),), 1, 300_000_000)) == pytest.approx(
        2e8 / LINK + 3 * HOP_SECONDS
    )


def test_a_gather_over_a_plane_uses_the_links_of_both_dimensions():
    plane = tuple(range(16))
    found = network("v5p:4x4x4").seconds(Collective("all-gather", (plane,), 1, 1_600_000_000))
    assert found == pytest.approx(1.5e9 / (4 * LINK) + 4 * HOP_SECONDS)


def test_groups_between_each_others_chips_share_the_links():
    near = Collective("all-gather", ((0, 1),), 1, 200_000_000)
    apart = Collective("all-gather", ((0, 2),), 1, 200_000_000)
    net = network("v5p:4x4x4")
    assert net.seconds(near) == pytest.approx(1e8 / LINK, rel=0.01)
    assert net.seconds(apart) == pytest.approx(1e8 / LINK, rel=0.01)  # two ways, of which each is shared by two
    line = network("v5p:1x1x3")
    assert line.seconds(Collective("all-gather", ((0, 2),), 1, 200_000_000)) == pytest.approx(2e8 / LINK, rel=0.01)


def test_an_exchange_is_bound_by_the_middle_of_a_ring():
    ring = Collective("all-to-all", ((0, 1, 2, 3),), 400_000_000, 400_000_000)
    # half of what two of the four send crosses the middle, over two links each way
    assert network("v5p:4x4x4").seconds(ring) == pytest.approx(4e8 * 4 / 8 / LINK, rel=0.01)
    pair = Collective("all-to-all", ((0, 1),), 400_000_000, 400_000_000)
    assert network("v5p:2x2x2").seconds(pair) == pytest.approx(2e8 / LINK, rel=0.01)


def test_messages_to_neighbours_take_the_shortest_way_and_share_links():
    net = network("v5p:1x1x4")
    around = Collective("collective-permute", ((0, 1), (1, 2), (2, 3), (3, 0)), 100_000_000, 100_000_000)
    assert net.seconds(around) == pytest.approx(1e8 / LINK, rel=0.01)
    line = network("v5p:1x1x3")
    back = Collective("collective-permute", ((0, 1), (1, 2), (2, 0)), 100_000_000, 100_000_000)
    assert line.seconds(back) == pytest.approx(1e8 / LINK, rel=0.01)  # the way back has its own direction
    crossing = Collective("collective-permute", ((0, 2), (1, 2)), 100_000_000, 100_000_000)
    assert line.seconds(crossing) == pytest.approx(2e8 / LINK, rel=0.01)


def test_both_devices_of_a_chip_share_its_links():
    topology = parse_topology("tpu7x:2x2x1")
    places = tuple((x, y, 0) for x in range(2) for y in range(2) for _ in range(2))
    net = Network(topology, places, 1.0)
    apart = net.seconds(Collective("all-gather", ((0, 4), (1, 5)), 1, 200_000_000))  # one device of each chip
    whole = net.seconds(Collective("all-gather", ((0, 1, 4, 5),), 1, 400_000_000))
    assert apart == pytest.approx(2 * 1e8 / LINK, rel=0.01)
    assert whole == pytest.approx(3e8 / LINK, rel=0.01)
    assert net.seconds(Collective("all-gather", ((0, 1),), 1, 200_000_000)) < 1e8 / LINK / 10
    for groups in ((0, 4), (1, 5)), ((0, 1, 4, 5),):  # either way both devices send half of theirs to the other chip
        exchange = Collective("all-to-all", groups, 400_000_000, 400_000_000)
        assert net.seconds(exchange) == pytest.approx(2 * 2e8 / LINK, rel=0.01)


def test_gpus_reach_each_other_through_a_switch_and_other_nodes_through_networks():
    topology = parse_topology("h100x16")
    net = Network(topology, tuple((n,) for n in range(16)), 1.0)
    within = net.seconds(Collective("all-gather", (tuple(range(8)),), 1, 800_000_000))
    assert within == pytest.approx(7e8 / 450e9, rel=0.01)
    pair = net.seconds(Collective("all-gather", ((0, 8),), 1, 200_000_000))
    assert pair == pytest.approx(1e8 / 50e9, rel=0.01)
    whole = net.seconds(Collective("all-gather", (tuple(range(16)),), 1, 1_600_000_000))
    assert whole == pytest.approx(1.5e9 / 400e9, rel=0.01)
    exchange = net.seconds(Collective("all-to-all", (tuple(range(16)),), 400_000_000, 400_000_000))
    assert exchange == pytest.approx(2e8 / 50e9, rel=0.01)  # half of it is for the other node
    near = net.seconds(Collective("all-to-all", (tuple(range(8)),), 400_000_000, 400_000_000))
    assert near == pytest.approx(3.5e8 / 450e9, rel=0.01)


def test_nothing_is_sent_by_one_device():
    assert network("v5p:2x2x1").seconds(Collective("all-reduce", ((0,), (1,)), 100, 100)) == 0
