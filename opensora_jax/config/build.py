"""Turns a section of a config into the dataclass that code works with, and refuses what does not fit.

An ml_collections config checks little: a scalar given to a tuple becomes a 1-tuple, a section read back from
JSON has lists for tuples, and a misspelt key only shows when it is read. So every section passes through
`build` once, at the edge, where a message can name the field as the user types it: `config.model.width`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from opensora_jax.config.errors import UserError

T = TypeVar("T")


def build(cls: type[T], section: Any, where: str) -> T:
    """Returns `cls` made of a ConfigDict or dict; messages call that section `where`, as in "config.model".

    Lists become tuples, ints become floats where a float is declared, strings become paths where a `Path` is,
    nested sections become nested dataclasses. Fields with a default may be absent.
    Raises: UserError for an unknown, missing or mistyped field, and for a ValueError of `cls.__post_init__`.
    """
    if not isinstance(section, ConfigDict | Mapping):
        raise UserError(f"{where} takes a section with fields: got {section!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in section:
        if name not in fields:
            raise UserError(f"{where} has no field {name!r}; {suggestion(name, fields)}")
    values = {}
    for name, field in fields.items():
        if name in section:
            values[name] = convert(_read(section, name, where), hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is missing: it takes {describe(hints[name])}; add it to the config")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """Returns `value` as the annotation `hint` wants it.

    Raises: UserError when it does not fit; TypeError for an annotation that configs cannot hold.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        return _checked(value, value in arguments, hint, where)
    if hint is tuple or origin is tuple:
        return _convert_tuple(value, arguments, hint, where)
    if origin in (dict, Mapping):
        pairs = _checked(value, isinstance(value, ConfigDict | Mapping), hint, where).items()
        return {convert(k, arguments[0], where): convert(v, arguments[1], f"{where}[{k!r}]") for k, v in pairs}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(typing.cast(type, hint), value, where)  # type: ignore
    if hint in _SCALARS:
        accepts, make = _SCALARS[hint]
        return make(_checked(value, isinstance(value, accepts) and type(value) is not _not(hint), hint, where))
    raise TypeError(f"{where}: configs cannot hold {hint!r}")


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """Returns "did you mean 'lr'?" for a near miss, else what there is to choose from."""
    names = sorted(str(item) for item in known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names) or 'none'}"


def describe(hint: Any) -> str:
    """Returns an annotation in the words of an error message: "2 values (int, int)"."""
    arguments = typing.get_args(hint)
    if hint is types.NoneType:
        return "None"
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if typing.get_origin(hint) is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} values ({', '.join(map(describe, arguments))})"
    if typing.get_origin(hint) is tuple:
        return f"a list of values ({describe(arguments[0])}, ...)"
    if dataclasses.is_dataclass(hint):
        return f"a section ({', '.join(field.name for field in dataclasses.fields(hint))})"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


_SCALARS: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    bool: (bool, bool),
    int: (int, int),
    float: (int | float, float),
    str: (str, str),
    Path: (str | Path, Path),
    types.NoneType: (types.NoneType, lambda value: value),
}


def _not(hint: type) -> type | None:
    """Returns the subclass that Python accepts for `hint` but a config must not: True is no number."""
    return bool if hint in (int, float) else None


def _checked(value: Any, fits: bool, hint: Any, where: str) -> Any:
    if not fits:
        raise UserError(f"{where} takes {describe(hint)}: got {_plain(value)!r}")
    return value


def _read(section: ConfigDict | Mapping[str, Any], name: str, where: str) -> Any:
    try:
        return section[name]
    except RequiredValueError:
        raise UserError(f"{where}.{name} has no value yet: set it with --{where}.{name}=...") from None


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """Converts to the first option that fits; with one besides None, its own message is the clearest."""
    if value is None and types.NoneType in options:
        return None
    real = [option for option in options if option is not types.NoneType]
    if len(real) == 1:
        return convert(value, real[0], where)
    for option in real:
        try:
            return convert(value, option, where)
        except UserError:
            continue
    raise UserError(f"{where} takes {' or '.join(map(describe, options))}: got {_plain(value)!r}")


def _convert_tuple(value: Any, items: tuple[Any, ...], hint: Any, where: str) -> tuple[Any, ...]:
    """Converts a list or tuple; the length counts, since the command line turns a scalar into a 1-tuple."""
    _checked(value, isinstance(value, list | tuple), hint, where)
    if not items:
        return _plain(value)
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    _checked(value, len(value) == len(items), hint, where)
    pairs = zip(value, items, strict=True)
    return tuple(convert(item, item_hint, f"{where}[{index}]") for index, (item, item_hint) in enumerate(pairs))


def _plain(value: Any) -> Any:
    """Returns the value as plain Python: sections as dicts, lists as tuples."""
    if isinstance(value, ConfigDict | Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value
