"""A schedule with two clocks: what runs beside the network, and what waits for it."""

import pytest

from opensora_jax.forecast.hlo import Module
from opensora_jax.forecast.timeline import Assumptions, Timeline
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.forecast.traffic import Collective, Network

CYCLES = 1_750_000  # a millisecond of a v5p
GROUPS = "replica_groups={{0,1}}"
GATHER = f"channel_id=1, {GROUPS}, dimensions={{0}}"
BYTES = 160_000_000  # gathered: half of them are sent, in a millisecond


class Quiet(Network):
    """A network in which a gather of `BYTES` takes a millisecond."""

    def seconds(self, collective: Collective) -> float:
        return collective.sent / 80e9


def span(text: str, kernel_flops=lambda call: None, topology: str = "v5p:2x1x1", **assumed):
    topology = parse_topology(topology)
    network = Quiet(topology, ((0, 0, 0), (1, 0, 0)), 1.0)
    mesh = {"data": 1, "fsdp": 2, "seq": 1, "tensor": 1}
    return Timeline(Module(text), topology.chip, network, mesh, kernel_flops, Assumptions(**assumed)).read()


NOTHING = "%f (x: f32[3]) -> f32[3] {\n  ROOT %x = f32[3]{0} parameter(0)\n}\n\n"


def fusion(name: str, operand: str, milliseconds: int = 1) -> str:
    config = f'backend_config={{"estimated_cycles":"{milliseconds * CYCLES}"}}'
    return f"  %{name} = f32[3]{{0}} fusion(%{operand}), kind=kLoop, calls=%f, {config}\n"


def program(*lines: str, before: str = "") -> str:
    start = "  %p = f32[3]{0} parameter(0)\n  %x = bf16[40000000]{0} parameter(1)\n"
    before = before if "%f (" in before else f"{NOTHING}{before}"
    return (
        f"HloModule m, is_scheduled=true\n\n{before}ENTRY %main (p: f32[3]) -> f32[3] {{\n{start}{''.join(lines)}}}\n"
    )


def test_a_collective_alone_is_waited_for():
    found = span(
        program(fusion("a", "p"), f"  %g = bf16[80000000]{{0}} all-gather(%x), {GATHER}\n", fusion("b", "a", 2))
    )
    assert found.seconds == pytest.approx(4e-3)
    assert (found.fusions, found.exposed) == (pytest.approx(3e-3), pytest.approx(1e-3))
    (sent,) = found.traffic
    assert (sent.kind, sent.axis, sent.times, sent.overlapped) == ("all-gather", "fsdp", 1, 0)
    assert sent.bytes == BYTES // 2


@pytest.mark.parametrize(("beside", "waited"), [(1, 0.0), (0, 1e-3)])
def test_one_that_starts_early_runs_beside_what_follows(beside, waited):
    start = f"  %s = (bf16[40000000], bf16[80000000]) all-gather-start(%x), {GATHER}\n"
    done = "  %d = bf16[80000000]{0} all-gather-done(%s)\n"
    found = span(program(start, fusion("a", "p") if beside else "", done))
    assert found.exposed == pytest.approx(waited, abs=1e-9)
    assert found.traffic[0].overlapped == 1


def test_one_on_a_sparse_core_runs_beside_what_follows():
    inner = f"  ROOT %g = bf16[80000000]{{0}} all-gather(%q), {GATHER}\n"
    head = "%aside (q: bf16[40000000]) -> bf16[80000000] {\n  %q = bf16[40000000]{0} parameter(0)\n"
    aside = f'{head}{inner}}}, execution_thread="sparsecore"\n\n'
    call = 'call-start(%x), async_execution_thread="sparsecore", to_apply=%aside'
    start = f"  %s = ((bf16[40000000]), bf16[80000000]) {call}\n"
    done = "  %d = bf16[80000000]{0} call-done(%s)\n"
    found = span(program(start, fusion("a", "p"), done, fusion("b", "a"), before=aside))
    assert (found.seconds, found.exposed) == (pytest.approx(2e-3), pytest.approx(0, abs=1e-9))
    assert (found.traffic[0].times, found.traffic[0].overlapped) == (1, 1)


def test_a_call_that_holds_a_collective_takes_all_that_it_runs():
    head = "%inner (q: bf16[40000000]) -> bf16[80000000] {\n  %q = bf16[40000000]{0} parameter(0)\n"
    gather = f"  ROOT %g = bf16[80000000]{{0}} all-gather(%q), {GATHER}\n"
    inner = f"{NOTHING}{head}{fusion('c', 'q', 2)}{gather}}}\n\n"
    call = "  %k = bf16[80000000]{0} call(%x), to_apply=%inner\n"
    found = span(program(call, fusion("a", "p"), before=inner))
    assert (found.fusions, found.exposed) == (pytest.approx(3e-3), pytest.approx(1e-3))


def test_one_that_is_started_in_several_steps_is_waited_for_at_the_end():
    start = f"  %s = (bf16[40000000], bf16[80000000]) all-gather-start(%x), {GATHER}\n"
    update = "  %u = (bf16[40000000], bf16[80000000]) async-update(%s)\n"
    done = "  %d = bf16[80000000]{0} async-done(%u)\n"
    found = span(program(start, update, done, fusion("a", "p")))
    assert (found.seconds, found.exposed) == (pytest.approx(2e-3), pytest.approx(1e-3))


def test_gpus_wait_for_what_is_started_early():
    start = f"  %s = (bf16[40000000], bf16[80000000]) all-gather-start(%x), {GATHER}\n"
    moves = "  %c = f32[3000000]{0} copy(%p)\n"
    found = span(program(start, moves, "  %d = bf16[80000000]{0} all-gather-done(%s)\n"), topology="h100x2")
    assert found.exposed == pytest.approx(1e-3)
    assert found.traffic[0].overlapped == 0


def test_groups_in_a_form_that_is_not_known_are_named():
    found = span(program(f"  %g = bf16[80000000]{{0}} all-gather(%x), {GATHER.replace('{{0,1}}', 'some')}\n"))
    assert (found.exposed, found.unknown) == (0, {"the groups of collective g"})


def test_two_at_a_time_share_the_network():
    starts = [f"  %s{n} = (bf16[40000000], bf16[80000000]) all-gather-start(%x), {GATHER}\n" for n in range(2)]
    dones = [f"  %d{n} = bf16[80000000]{{0}} all-gather-done(%s{n})\n" for n in range(2)]
    found = span(program(*starts, fusion("a", "p"), *dones))
    assert found.exposed == pytest.approx(1e-3)


def test_one_that_is_spread_over_fusions_runs_from_the_first_to_the_last():
    config = 'frontend_attributes={chain_id="26"}, backend_config={"async_collective_fusion_config":{}}'
    inner = f"  ROOT %g = bf16[80000000]{{0}} all-gather(%q), {GATHER}, {config}\n"
    parts = "".join(
        f"%part.{n} (q: bf16[40000000]) -> bf16[80000000] {{\n  %q = bf16[40000000]{{0}} parameter(0)\n{inner}}}\n\n"
        for n in range(3)
    )
    calls = [f"  %c{n} = bf16[80000000]{{0}} fusion(%x), kind=kCustom, calls=%part.{n}\n" for n in range(3)]
    calls[1] = calls[1].replace("calls=", f'backend_config={{"estimated_cycles":"{CYCLES // 2}"}}, calls=')
    found = span(program(*calls, before=parts))
    assert [(one.times, one.overlapped) for one in found.traffic] == [(1, 1)]
    assert found.exposed == pytest.approx(0.5e-3)
    assert found.seconds == pytest.approx(1e-3)


def test_loops_count_as_often_as_they_run_and_of_branches_the_longest():
    parts = f"""%body (t: (s32[], f32[3])) -> (s32[], f32[3]) {{
  %t = (s32[], f32[3]) parameter(0)
{fusion("a", "t")}  ROOT %g = bf16[80000000]{{0}} all-gather(%x), {GATHER}
}}

%long (u: f32[3]) -> f32[3] {{
  %u = f32[3]{{0}} parameter(0)
{fusion("b", "u", 5)}}}

%short (v: f32[3]) -> f32[3] {{
  %v = f32[3]{{0}} parameter(0)
{fusion("c", "v", 2)}}}

"""
    loop = '  %w = (s32[], f32[3]) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    branch = "  %i = f32[3]{0} conditional(%p, %p), branch_computations={%short, %long}\n"
    found = span(program(loop, branch, before=parts))
    assert found.fusions == pytest.approx(12e-3)
    assert found.seconds == pytest.approx(19e-3)
    assert (found.traffic[0].times, found.traffic[0].bytes) == (7, 7 * BYTES // 2)


def test_a_kernel_takes_its_operations_at_the_stated_efficiency():
    call = '  %flash.3 = f32[3]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n'
    found = span(program(call), lambda call: 459e9 if call.name == "flash.3" else None, kernel_efficiency=0.5)
    assert found.kernels == pytest.approx(2e-3)
    assert (found.kernel_calls, found.unknown) == (1, set())
    assert span(program(call)).unknown == {"the operations of kernel flash.3"}


def test_copies_to_the_host_are_waited_for_and_prefetches_are_not():
    start = "  %s = (f32[4000000]{0:S(5)}, f32[4000000]{0}, u32[]) copy-start(%y)\n"
    lines = "  %y = f32[4000000]{0} parameter(2)\n", start, "  %d = f32[4000000]{0:S(5)} copy-done(%s)\n"
    assert span(program(*lines)).host == pytest.approx(1e-3)
    assert span(program(*(line.replace("S(5)", "S(1)") for line in lines))).seconds == 0


OUT = (
    "  %s = ((bf16[7,2000000]{1,0:S(5)}, bf16[1,2000000]{1,0}, s32[]), bf16[7,2000000]{1,0:S(5)}, u32[]) "
    "dynamic-update-slice-start(%kept, %y, %n)\n"
)
BACK = (
    "  %s = ((bf16[7,2000000]{1,0:S(5)}, s32[]), bf16[1,2000000]{1,0}, u32[]) "
    "dynamic-slice-start(%kept, %n), dynamic_slice_sizes={1,2000000}\n"
)


@pytest.mark.parametrize("start", [OUT, BACK])
def test_slices_that_are_kept_by_the_host_run_beside_what_follows(start):
    done = f"  %d = bf16[1] {'dynamic-update-slice' if start is OUT else 'dynamic-slice'}-done(%s)\n"
    megabytes = 4.0 + (8e-6 if start is OUT else 4e-6) + 4e-6
    alone = span(program(start, done))
    assert alone.host == pytest.approx(megabytes / 16e3, rel=1e-5)  # at 16 GB/s
    beside = span(program(start, fusion("a", "p"), done))
    assert (beside.host, beside.seconds) == (0, pytest.approx(1e-3))


def test_products_are_told_from_other_fusions_and_these_from_their_bytes():
    product = """%mul (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%f (x: f32[3]) -> f32[3] {
  %x = f32[3]{0} parameter(0)
  ROOT %n = f32[3]{0} negate(%x)
}

"""
    multiply = fusion("m", "p", 4).replace("calls=%f", "calls=%mul")
    found = span(program(multiply, fusion("a", "p", 2), before=product), memory_efficiency=0.5)
    assert (found.products, found.fusions) == (pytest.approx(4e-3), pytest.approx(2e-3))
    assert found.moving == pytest.approx(24 / (2765e9 * 0.5))


def test_instructions_without_an_estimate_take_their_bytes():
    copy = "  %c = bf16[40000000]{0} copy(%x)\n"
    found = span(program(copy), memory_efficiency=1.0)
    assert found.unestimated == pytest.approx(2 * 80e6 / 2765e9)
