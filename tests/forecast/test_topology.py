"""Names of topologies, and what is missing to compile for them."""

import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.forecast import topology
from opensora_jax.forecast.chips import CHIPS
from opensora_jax.forecast.topology import check_compiler, example, parse_topology
from opensora_jax.training.flops import PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5p:4x4x4", 64, 64), ("v6e:16x16", 256, 256), ("tpu7x:2x2x1", 4, 8), ("v5e:2x4x1", 8, 8), ("h100x16", 16, 16)],
)
def test_a_topology_has_chips_and_devices(name, chips, devices):
    found = parse_topology(name)
    assert (found.chips, found.devices) == (chips, devices)
    assert parse_topology(str(found)) == found


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_every_chip_has_a_peak_and_an_example(chip):
    assert PEAK_FLOPS[chip.kind] == chip.peak_flops
    assert parse_topology(example(chip)).chip is chip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "is not known: use one such as v4:4x4x4, v5e:16x16, v5p:4x4x4"),
        ("v5q:4x4x4", "is not known: use one"),
        ("v5p-128", "is no topology: use one such as"),
        ("v5p:4x4", "v5p has 3 dimensions, as in v5p:4x4x4"),
        ("v6e:2x2x2", "v6e has 2 dimensions, as in v6e:16x16"),
        ("v5e:32x32", "1024 chips: a slice of v5e has at most 256"),
        ("h100:8", "h100 is written as in h100x8"),
        ("v5x8", "is not known"),
        ("h100x12", "more than 8 GPUs are a multiple of 8"),
    ],
)
def test_other_names_are_refused_with_what_there_is(name, said):
    with pytest.raises(UserError, match=said):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "command"), [("v5p", r'pip install "libtpu==[\d.*]+";'), ("h100", r"pip install .*gpu\]")]
)
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch, name, command):
    monkeypatch.setattr(topology, "_is_there", lambda module: False)
    with pytest.raises(UserError, match=command):
        check_compiler(CHIPS[name])


def test_dimensions_close_to_rings_where_the_makers_say():
    assert parse_topology("v5p:4x4x8").rings == (True, True, True)
    assert parse_topology("v5p:2x4x4").rings == (False, False, False)  # no whole cube
    assert parse_topology("v6e:16x16").rings == (True, True)
    assert parse_topology("v6e:8x16").rings == (False, True)
