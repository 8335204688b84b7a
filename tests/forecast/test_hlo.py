"""Compiled text, in the forms that libtpu prints: which instructions there are, and how often loops run."""

import pytest

from opensora_jax.forecast.hlo import Module, array_shapes, fused, parse_line, shape_bytes

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[3]{0})->f32[3]{0}}

%fused_computation.7 (param_0.1: bf16[128,512]) -> bf16[512,512] {
  %param_0.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true
}

%region_2.cond (wide.param: (s32[], f32[3])) -> pred[] {
  %constant.13 = s32[]{:T(128)} constant(19), metadata={op_name="jit(step)/while"}
  %wide.param = (s32[]{:T(128)}, f32[3]{0}) parameter(0)
  %get-tuple-element.10 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  ROOT %lt.4 = pred[]{:T(512)} compare(%get-tuple-element.10, %constant.13), direction=LT
}

%region_1.body (wide.param.1: (s32[], f32[3])) -> (s32[], f32[3]) {
  %wide.param.1 = (s32[]{:T(128)}, f32[3]{0}) parameter(0)
  %get-tuple-element.20 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %constant.1 = s32[]{:T(128)} constant(1)
  %add.5 = s32[]{:T(128)} add(%get-tuple-element.20, %constant.1)
  %get-tuple-element.21 = f32[3]{0} get-tuple-element(%wide.param.1), index=1
  %fusion.3 = f32[3]{0} fusion(%get-tuple-element.21), kind=kLoop, calls=%fused_computation.8, \
backend_config={"window_config":{"estimated_cycles":"2126","iteration_bounds":["1"]}}
  ROOT %tuple.4 = (s32[]{:T(128)}, f32[3]{0}) tuple(%add.5, %fusion.3)
}

ENTRY %main.1_spmd (param: f32[3]) -> f32[3] {
  %param = f32[3]{0} parameter(0)
  %constant.2 = s32[]{:T(128)} constant(2)
  %copy.1 = s32[]{:T(128)} copy(%constant.2)
  %tuple.1 = (s32[]{:T(128)}, /*index=1*/f32[3]{0}) tuple(%copy.1, %param)
  %flash.3 = (f32[2,512,128]{2,1,0:T(8,128)}, bf16[2,3]{1,0}) custom-call(%param, /*index=1*/%copy.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/flash/pallas_call"}
  %while.155 = (s32[]{:T(128)}, f32[3]{0}) while(%tuple.1), condition=%region_2.cond, body=%region_1.body
  ROOT %get-tuple-element.1 = f32[3]{0} get-tuple-element(%while.155), index=1
}
"""


@pytest.fixture
def module():
    return Module(TEXT)


def test_instructions_come_in_the_order_in_which_they_run(module):
    assert module.entry == "main.1_spmd"
    assert [one.opcode for one in module[module.entry]] == [
        *("parameter", "constant", "copy", "tuple", "custom-call", "while", "get-tuple-element"),
    ]
    body = {one.name: one for one in module["region_1.body"]}
    assert body["fusion.3"].cycles == 2126
    assert body["fusion.3"].called == ["fused_computation.8"]
    assert body["add.5"].operands == ("get-tuple-element.20", "constant.1")
    assert body["tuple.4"].is_root
    assert body["add.5"].cycles is None


def test_attributes_may_go_over_several_lines(module):
    kernel = next(one for one in module[module.entry] if one.name == "flash.3")
    assert kernel.operands == ("param", "copy.1")
    assert "flash/pallas_call" in kernel.attributes
    assert kernel.bytes == 2 * 512 * 128 * 4 + 6 * 2


def test_a_loop_runs_from_where_its_counter_starts(module):
    loop = next(one for one in module[module.entry] if one.opcode == "while")
    assert module.trips(loop, module.entry) == 19 - 2
    known = parse_line(
        '  %w = (s32[]) while(%t), condition=%region_2.cond, body=%b, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert module.trips(known, module.entry) == 7


def test_a_loop_that_ends_by_its_data_has_no_length(module):
    text = TEXT.replace("direction=LT", "direction=NE")
    other = Module(text)
    assert other.trips(next(one for one in other[other.entry] if one.opcode == "while"), other.entry) is None


def test_collectives_inside_fusions_are_found(module):
    line = "  %async-collective-start = bf16[512,512]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.7"
    (found,) = fused(module, parse_line(line))
    assert found.opcode == "all-gather"
    assert found.attribute("replica_groups") == "{{0,1,2,3},{4,5,6,7}}"
    assert list(fused(module, module["region_1.body"][5])) == []


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[1,512,3072]{2,1,0:T(8,128)(2,1)}", 512 * 3072 * 2),
        ("(f32[2,3]{1,0}, /*index=1*/s32[]{:T(128)S(1)}, pred[5])", 24 + 4 + 5),
        ("u32[]{:S(2)}", 4),
        ("s4[3]", 2),
        ("f8e4m3fn[7]", 7),
        ("c64[3]", 24),
        ("token[]", 0),
        ("()", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


def test_shapes_of_a_tuple():
    assert array_shapes("(f32[2,3]{1,0}, s32[])") == [("f32", (2, 3)), ("s32", ())]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("HloModule x\n")
