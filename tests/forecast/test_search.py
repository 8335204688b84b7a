"""Other ways to run a bucket: those that the rules allow, in the order of a rough sum."""

import pytest

from opensora_jax.config.build import build
from opensora_jax.forecast import programs
from opensora_jax.forecast.jobs import make_groups, parse_lines
from opensora_jax.forecast.search import Work, candidates, meshes
from opensora_jax.forecast.topology import parse_topology
from tests.forecast import small

GIB = 2**30


@pytest.mark.parametrize(("name", "heads"), [("v5p:2x2x2", 24), ("v5e:4x4", 6), ("h100x8", 24)])
def test_meshes_follow_the_rules(name, heads):
    topology = parse_topology(name)
    found = list(meshes(topology, heads))
    assert len({str(mesh) for mesh in found}) == len(found)
    for mesh in found:
        data, fsdp, seq, tensor = (mesh[axis] for axis in ("data", "fsdp", "seq", "tensor"))
        assert data * fsdp * seq * tensor == topology.devices
        assert heads % tensor == 0
        assert mesh["seq_method"] == ("ulysses" if heads % (seq * tensor) == 0 else "ring")
        assert topology.chip.is_gpu or fsdp < topology.devices
    assert any(mesh["fsdp"] == 8 for mesh in found) == (topology.chip.is_gpu or topology.devices > 8)


def job(name: str = "v5e:2x2"):
    return make_groups(small.training(), parse_topology(name), parse_lines(["32px,9"]), {})[0].wanted[0].job


def test_the_best_come_first_and_every_mesh_has_its_turn():
    found = candidates(job(), parse_topology("v5e:2x2"), 5, 16 * GIB)
    assert len(found) == 5
    assert [one.rough_seconds for one in found] == sorted(one.rough_seconds for one in found)
    tried = [str(one.job.sections["mesh"]) for one in found]
    assert max(tried.count(mesh) for mesh in tried) <= 2
    for one in found:
        sections = build(programs.TrainSections, one.job.sections, "config")
        size, parts = one.job.subject["batch_size"], sections.accumulation_steps
        samples = size * parts * sections.mesh.data * sections.mesh.fsdp
        assert samples in (8, 16, 32)  # those of the config, the half and twice
        assert f"batch size {size} x {parts}" in one.settings


def test_where_memory_is_short_a_step_is_taken_in_parts():
    asked, topology = job(), parse_topology("v5e:1x1")
    mesh = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"}
    limit = Work.of(asked, topology).bytes(mesh, 2, "offload", (9, 9))  # of two samples at once
    found = candidates(asked, topology, 5, int(limit))
    taken = {(one.job.subject["batch_size"], one.job.sections["accumulation_steps"]) for one in found}
    assert taken == {(1, 8)}  # half of the 16 samples, in as many parts as are tried


def test_what_cannot_fit_is_left_out():
    assert candidates(job(), parse_topology("v5e:2x2"), 5, 1000) == []
    topology, asked = parse_topology("v5e:2x2"), job()
    work = Work.of(asked, topology)
    mesh = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"}
    halves = mesh | {"fsdp": 2}
    assert work.bytes(halves, 4, "full", (9, 9)) < work.bytes(mesh, 4, "full", (9, 9))
    assert work.bytes(mesh, 4, "offload", (9, 9)) < work.bytes(mesh, 4, "full", (9, 9))
    assert work.bytes(mesh, 4, "full", (9, 9)) < work.bytes(mesh, 4, "full", (0, 0))
    assert work.bytes(mesh, 4, "full", (9, 9)) < work.bytes(mesh, 8, "full", (9, 9))


def test_recomputing_and_sending_take_time():
    work = Work.of(job(), parse_topology("v5p:4x4x4"))
    mesh = {"data": 64, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"}
    plain = work.seconds(mesh, 4, "full", (0, 0))
    assert plain < work.seconds(mesh, 4, "save_attention", (9, 9)) < work.seconds(mesh, 4, "full", (9, 9))
    ring = {"data": 8, "fsdp": 1, "seq": 8, "tensor": 1, "seq_method": "ring"}
    assert work.seconds(ring | {"seq_method": "ulysses"}, 4, "full", (0, 0)) < work.seconds(ring, 4, "full", (0, 0))
