"""The text of a compiled program: which instructions run in which order, and how often.

XLA prints a module as computations of one instruction a line, in the order in which they run
(`is_scheduled=true`). Fused computations are read for the collectives inside them alone: what a fusion takes stands in
its own line, as the compiler's `estimated_cycles`.
Source: the HLO text format of openxla/xla, `xla/hlo/parser`; `estimated_cycles` is written by libtpu.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
NO_ARRAYS = ("token", "opaque")
PRODUCTS = ("convolution", "dot")
HOST, SCRATCH = "S(5)", "S(1)"  # in a layout: memory of the host, and of the core itself

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""  # what stands in the brackets of a constant or a parameter
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the result, without the padding of its layout."""
        return shape_bytes(self.shape)

    @property
    def cycles(self) -> int | None:
        """What the compiler thinks that it takes, None where it does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """Where in the traced program it comes from, "" where the compiler made it up."""
        found = re.search(r'op_name="(?:jit\(\w+\)/)?([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        found = [name for name in _CALLED.findall(self.attributes) if self.opcode not in _REDUCTIONS]
        branches = _BRANCHES.search(self.attributes)
        return found + ([name.strip().lstrip("%") for name in branches[1].split(",")] if branches else [])

    def called_as(self, role: str) -> str:
        """Returns the computation that plays a role, such as "body"."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        assert found is not None
        return found[1]

    def attribute(self, name: str) -> str | None:
        """Returns the text of an attribute in braces or brackets, such as replica_groups; of a mesh with its axes."""
        found = re.search(rf"\b{name}=", self.attributes)
        if found is None:
            return None
        text = self.attributes[found.end() :]
        return text[: text.index("}") + 1] if text.startswith("mesh[") else _until_comma(text)


_REDUCTIONS = {"reduce", "reduce-window", "sort", "scatter", "select-and-scatter", "map", *COLLECTIVES}


class Module:
    """A compiled module."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        self._parsed: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[str] | None = None
        for line in text.splitlines():
            if lines is not None and (line == "}" or line.startswith("}, execution_thread=")):
                lines = None
            elif lines is not None and line.startswith("  "):
                lines.append(line)
            elif lines:  # attributes may hold text of several lines
                lines[-1] += line
            elif line.endswith("{") and (header := _HEADER.match(line)):
                lines = self._lines[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
        if not self.entry:
            raise ValueError("this is no text of a compiled module: it has no ENTRY")

    def __getitem__(self, computation: str) -> list[Instruction]:
        """Returns the instructions of a computation, in the order in which they run."""
        if computation not in self._parsed:
            self._parsed[computation] = [parsed for line in self._lines[computation] if (parsed := parse_line(line))]
        return self._parsed[computation]

    @cached_property
    def with_collectives(self) -> frozenset[str]:
        """Names of the computations that hold a collective themselves."""
        return self._holding(rf" (?:{'|'.join(COLLECTIVES)})(?:-start)?\(")

    @cached_property
    def with_products(self) -> frozenset[str]:
        """Names of the computations that hold a product of matrices or a convolution themselves."""
        return self._holding(rf" (?:{'|'.join(PRODUCTS)})\(")

    def _holding(self, pattern: str) -> frozenset[str]:
        search = re.compile(pattern).search
        return frozenset(name for name, lines in self._lines.items() if any(map(search, lines)))

    def trips(self, loop: Instruction, computation: str) -> int | None:
        """Returns how often the body of a `while` in a computation runs; None where the text does not tell."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = {one.name: one for one in self[loop.called_as("condition")]}
        root = next(one for one in condition.values() if one.is_root)
        return self._counted(root, condition, loop, computation)

    def _counted(
        self, root: Instruction, condition: dict[str, Instruction], loop: Instruction, computation: str
    ) -> int | None:
        """Returns how often a counter that grows by one stays below the constant that the condition compares it to."""
        if root.opcode == "fusion":  # the comparison of a fused condition, its parameters being the fusion's operands
            inner = self[root.called_as("calls")]
            given = {one.name: condition[root.operands[int(one.literal)]] for one in inner if one.opcode == "parameter"}
            condition = condition | {one.name: one for one in inner} | given
            root = next(one for one in inner if one.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition.get(name) for name in root.operands)
        if counter is None or limit is None or counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        return int(limit.literal) - self._initial(loop, int(counter.attribute("index") or 0), computation)

    def _initial(self, loop: Instruction, index: int, computation: str) -> int:
        """Returns the constant at which a loop's counter starts: 0 where it cannot be seen."""
        by_name = {one.name: one for one in self[computation]}
        found = by_name.get(loop.operands[0])
        if found is not None and found.opcode == "tuple":
            found = by_name.get(found.operands[index])
        while found is not None and found.opcode in ("copy", "bitcast", "convert"):
            found = by_name.get(found.operands[0])
        return int(found.literal) if found is not None and found.opcode == "constant" else 0


def shape_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape, "(f32[2,3]{1,0}, bf16[4])"."""
    return sum(_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(shape))


def array_shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, dimensions) of all arrays in a shape."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(shape)]


@cache
def _array_bytes(dtype: str, dims: str) -> int:
    count = 1
    for size in filter(None, dims.split(",")):
        count *= int(size)
    return -(-count * _bits(dtype) // 8)


def _bits(dtype: str) -> int:
    """Returns the bits of a value: "pred" takes 8, "f8e4m3fn" 8, "bf16" 16."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8 * (dtype not in NO_ARRAYS)


def parse_line(line: str) -> Instruction | None:
    """Returns the instruction of a line, None for a line that holds none."""
    name, equals, rest = line.partition(" = ")
    if not equals:
        return None
    is_root, name = name.lstrip().startswith("ROOT "), name.split()[-1].lstrip("%")
    shape = _closed(rest) if rest.startswith("(") else rest.partition(" ")[0]
    opcode, bracket, _ = rest[len(shape) :].lstrip().partition("(")
    if not bracket:
        return None
    start = rest.index(opcode + "(", len(shape)) + len(opcode)
    inside = _closed(rest[start:])
    attributes = rest[start + len(inside) :].lstrip(", ")
    inside = inside[1:-1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, attributes, "" if operands else inside, is_root)


def _closed(text: str) -> str:
    """Returns the start of a text up to the bracket that closes its first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[: found.end()]
    return text


def _until_comma(text: str) -> str:
    """Returns the start of a text up to a comma outside of brackets."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if depth < 0 or (letter == "," and not depth):
            return text[:place]
    return text


def fused(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """Yields the collectives in the computation that a fusion, or an asynchronous call, runs."""
    for name in instruction.called:
        if name in module.with_collectives:
            yield from (one for one in module[name] if one.opcode.removesuffix("-start") in COLLECTIVES)
