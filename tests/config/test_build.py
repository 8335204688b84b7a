"""config.build makes dataclasses of config sections and names the field that does not fit."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict, config_dict

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    strides: tuple[int, int, int]
    betas: tuple[float, ...] = (0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Outer:
    width: int
    rate: float
    name: str
    causal: bool
    folder: Path
    inner: Inner
    kind: Literal["linear", "cosine"] = "linear"
    limit: float | None = None
    buckets: dict[str, dict[int, tuple[float, int]]] = dataclasses.field(default_factory=dict)
    size: int | tuple[int, int] = 7
    anything: Any = None

    def __post_init__(self):
        if self.width % 7:
            raise ValueError(f"width {self.width} is not a multiple of 7")


def section(**changes):
    values = {
        "width": 7,
        "rate": 2,
        "name": "a",
        "causal": True,
        "folder": "out",
        "inner": {"strides": (1, 2, 2)},
    }
    return values | changes


def refusal(**changes) -> str:
    with pytest.raises(UserError) as caught:
        build(Outer, ConfigDict(section(**changes)), "config.outer")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("container", [dict, ConfigDict])
def test_a_section_becomes_its_dataclass(container):
    built = build(Outer, container(section(limit=3)), "config.outer")
    assert built == Outer(7, 2.0, "a", True, Path("out"), Inner((1, 2, 2)), limit=3.0)
    assert isinstance(built.rate, float)
    assert isinstance(built.limit, float)


def test_lists_from_json_become_tuples():
    values = section(inner={"strides": [1, 2, 3], "betas": [1, 2, 3]}, anything=[{"a": [1]}])
    built = build(Outer, values, "config.outer")
    assert built.inner == Inner((1, 2, 3), (1.0, 2.0, 3.0))
    assert built.anything == ({"a": (1,)},)


def test_a_table_of_buckets_keeps_its_integer_keys():
    built = build(Outer, ConfigDict(section(buckets={"48px": {5: (1, 3)}})), "config.outer")
    assert built.buckets == {"48px": {5: (1.0, 3)}}


def test_a_near_miss_is_suggested():
    assert refusal(widht=7) == "config.outer has no field 'widht'; did you mean 'width'?"


def test_an_unknown_field_far_from_all_lists_what_there_is():
    assert "it has anything, buckets, causal" in refusal(zzz=1)


def test_a_missing_field_is_named_with_its_type():
    values = section()
    del values["inner"]
    with pytest.raises(UserError, match=r"config\.outer\.inner is missing: it takes a section \(strides, betas\)"):
        build(Outer, values, "config.outer")


def test_the_one_tuple_that_the_command_line_makes_of_a_scalar_is_refused():
    assert refusal(inner={"strides": (2,)}) == "config.outer.inner.strides takes 3 values (int, int, int): got (2,)"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": 7.0}, "config.outer.width takes int: got 7.0"),
        ({"width": True}, "config.outer.width takes int: got True"),
        ({"rate": False}, "config.outer.rate takes float: got False"),
        ({"rate": "2"}, "config.outer.rate takes float: got '2'"),
        ({"causal": 1}, "config.outer.causal takes bool: got 1"),
        ({"name": None}, "config.outer.name takes str: got None"),
        ({"kind": "step"}, "config.outer.kind takes 'linear' or 'cosine': got 'step'"),
        ({"limit": "no"}, "config.outer.limit takes float: got 'no'"),
        ({"size": "7"}, "config.outer.size takes int or 2 values (int, int): got '7'"),
        ({"inner": 3}, "config.outer.inner takes a section with fields: got 3"),
        ({"inner": {"strides": (1, 2, "2")}}, "config.outer.inner.strides[2] takes int: got '2'"),
        (
            {"buckets": {"48px": {5: (1,)}}},
            "config.outer.buckets['48px'][5] takes 2 values (float, int): got (1,)",
        ),
        ({"width": 5}, "config.outer: width 5 is not a multiple of 7"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(changes, complaint):
    assert refusal(**changes) == complaint


def test_a_required_placeholder_without_a_value_says_how_to_set_it():
    values = ConfigDict(section(rate=config_dict.required_placeholder(float)))
    with pytest.raises(UserError, match=r"config\.outer\.rate has no value yet: set it with --config\.outer\.rate="):
        build(Outer, values, "config.outer")


def test_an_annotation_that_configs_cannot_hold_is_a_bug_not_a_user_error():
    @dataclasses.dataclass
    class Odd:
        members: set[int]

    with pytest.raises(TypeError, match=r"config\.odd\.members: configs cannot hold"):
        build(Odd, {"members": 1}, "config.odd")
