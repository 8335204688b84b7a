"""The bytes that an instruction moves between a device's memory and its cores; where it takes a slice, the slice.

Source: the rules of openxla/xla, `xla/service/hlo_cost_analysis.cc` (fusions).
"""

import re

from opensora_jax.forecast.hlo import HOST, SCRATCH, Instruction, Module, shape_bytes

SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "get-tuple-element", "reshape")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")


def moved_bytes(module: Module, one: Instruction, operands: list[Instruction]) -> int:
    """Returns what an instruction with these operands reads and writes."""
    inside = one.called[0] if one.opcode == "fusion" and one.called else None
    if one.opcode in SLICES:
        return 2 * in_memory(one.shape)
    if one.opcode == "dynamic-update-slice":
        return 2 * in_memory(operands[1].shape)
    if inside is None:
        return sum(in_memory(other.shape) for other in (one, *operands))
    read = sum(min(in_memory(operand.shape), _read(module, inside, place)) for place, operand in enumerate(operands))
    return read + min(in_memory(one.shape), _written(module, inside))


def in_memory(shape: str) -> int:
    """Returns the bytes of the arrays of a shape that lie in a device's memory, and not in its core's."""
    return sum(shape_bytes(array) for array in _ARRAY.findall(shape) if SCRATCH not in array)


def device_bytes(shape: str) -> int:
    """Returns the bytes of the arrays of a shape that lie on the device: what a copy to the host or back moves."""
    return sum(shape_bytes(array) for array in _ARRAY.findall(shape) if HOST not in array)


def _read(module: Module, computation: str, place: int) -> int:
    """Returns how much of a parameter a fused computation reads."""
    parameter = next(one for one in module[computation] if one.opcode == "parameter" and one.literal == str(place))
    return _used(module, computation, parameter)


def _used(module: Module, computation: str, value: Instruction) -> int:
    total = 0
    for user in module[computation]:
        if value.name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # written in its place
        elif user.opcode in VIEWS:
            total += _used(module, computation, user)
        elif user.opcode == "fusion" and user.called:
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            total += sum(_read(module, user.called[0], place) for place in places)
        else:
            return value.bytes
    return min(total, value.bytes)


def _written(module: Module, computation: str) -> int:
    """Returns how much a fused computation writes: of an array that it updates in its place, the update."""
    by_name = {one.name: one for one in module[computation]}
    root = next(one for one in by_name.values() if one.is_root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for one in results:
        while one.opcode in VIEWS and one.operands[0] in by_name:
            one = by_name[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            total += by_name[one.operands[1]].bytes
        elif one.opcode == "fusion" and one.called:
            total += _written(module, one.called[0])
        else:
            total += one.bytes
    return total
