"""The pickle in a PyTorch checkpoint, read as data: nothing that it names is imported, and nothing of it is called.

A pickle is a program that may call any function by its name, so Python's own machine is not used. `pickletools` of the
standard library splits the stream into instructions, and the machine below knows those of protocols 2 to 5 that put
together numbers, strings and containers, and the few names that describe a tensor.
Source: torch/serialization.py, torch/_utils.py (what torch.save writes), pickletools.py (what an instruction means).
"""

import mmap
import pickletools
from collections.abc import Callable
from typing import Any

from opensora_jax.weights.torch_names import Storage, call, fill, meaning, storage_of


def read_pickle(stream: mmap.mmap, storages: dict[str, Storage]) -> Any:
    """Returns the value of the pickle that starts here, made of built-in types and `torch_names.StoredTensor`.

    `storages` gains the storages that the pickle refers to, and `stream` is left after the pickle.
    Raises: ForbiddenName; ValueError for what is damaged or cannot be part of a checkpoint.
    """
    machine = _Machine(storages)
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type] # it has the methods used
            machine.run(opcode.name, argument)
        (value,) = machine.stack
    except (LookupError, TypeError) as error:
        raise ValueError(f"its pickle is inconsistent: {type(error).__name__}") from error
    return value


# instructions that push their own argument: numbers, bytes and text
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_TEXT = {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_ARGUMENT = _NUMBERS | _BYTES | _TEXT
# and those that push a new value
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


class _Machine:
    """A pickle half read: a stack of values, marks in the stack, and values remembered by number."""

    def __init__(self, storages: dict[str, Storage]):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _ARGUMENT:
            self.stack.append(argument)
        elif name in _NEW:
            self.stack.append(_NEW[name]())
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._gather(name, argument)

    def _gather(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._pop(int(name[-1]))))
            case "APPEND":
                _extend(self._pop(1), self.stack[-1])
            case "APPENDS":
                _extend(self._since_mark(), self.stack[-1])
            case "SETITEM":
                fill(self._pop(2), self.stack[-1])
            case "SETITEMS":
                fill(self._since_mark(), self.stack[-1])
            case _:
                self._refer(name, argument)

    def _refer(self, name: str, argument: Any) -> None:
        match name:
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(meaning(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                self.stack.append(meaning(".".join(self._pop(2))))
            case "REDUCE":
                self.stack.append(call(*self._pop(2)))
            case "BINPERSID":
                self.stack.append(self._stored(*self._pop(1)))
            case "BUILD":  # attributes, such as the _metadata of a state dict
                self._pop(1)
                fill([], self.stack[-1])
            case _:
                raise ValueError(f"its pickle has the instruction {name}, which torch.save does not write")

    def _pop(self, count: int) -> list[Any]:
        """Returns the last values, taken off the stack."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise LookupError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _stored(self, reference: Any) -> Storage:
        kind, *details = reference
        if kind != "storage":
            raise ValueError("it refers to something other than a storage")
        storage = storage_of(*details)
        self.storages.setdefault(storage.key, storage)
        return storage


def _extend(items: list[Any], target: Any) -> None:
    if type(target) is not list:
        raise ValueError("it appends to what is no list")
    target.extend(items)
