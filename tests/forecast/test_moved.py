"""Bytes that instructions move: whole arrays, or the slices that they take of them."""

import pytest

from opensora_jax.forecast.hlo import Module
from opensora_jax.forecast.moved import in_memory, moved_bytes

TEXT = """HloModule m

%taking (a: f32[57,100], i: s32[]) -> f32[100] {
  %a = f32[57,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,100]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,100}
  ROOT %b = f32[100]{0} bitcast(%s)
}

%outer (a.1: f32[57,100], i.1: s32[], y: f32[100]) -> f32[100] {
  %a.1 = f32[57,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %y = f32[100]{0} parameter(2)
  %inner = f32[100]{0} fusion(%a.1, %i.1), kind=kLoop, calls=%taking
  ROOT %add = f32[100]{0} add(%inner, %y)
}

%putting (c: f32[57,100], x: f32[1,100], j: s32[]) -> f32[57,100] {
  %c = f32[57,100]{1,0} parameter(0)
  %x = f32[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %u = f32[57,100]{1,0} dynamic-update-slice(%c, %x, %j, %z.1)
}

ENTRY %main (p: f32[57,100], q: s32[]) -> f32[100] {
  %p = f32[57,100]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %r = f32[100]{0} parameter(2)
  %v = f32[1,100]{1,0:T(8,128)S(1)} parameter(3)
  %whole = f32[57,100]{1,0} negate(%p)
  %part = f32[100]{0} fusion(%p, %q, %r), kind=kLoop, calls=%outer
  %bare = f32[1,100]{1,0} dynamic-slice(%p, %q, %q), dynamic_slice_sizes={1,100}
  ROOT %put = f32[57,100]{1,0} fusion(%p, %v, %q), kind=kLoop, calls=%putting
}
"""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("whole", 2 * 57 * 400),
        ("part", 400 + 4 + 400 + 400),  # the slice, its place, the other operand, the result
        ("bare", 2 * 400),
        ("put", 400 + 4),  # the update, which comes from the core's own memory, and its place
    ],
)
def test_bytes_are_those_that_are_touched(name, size):
    module = Module(TEXT)
    by_name = {one.name: one for one in module[module.entry]}
    one = by_name[name]
    assert moved_bytes(module, one, [by_name[operand] for operand in one.operands]) == size


def test_arrays_in_the_cores_memory_move_nothing():
    assert in_memory("(f32[10]{0:T(128)S(1)}, bf16[10]{0:T(256)(128)(2,1)}, f32[3])") == 20 + 12
