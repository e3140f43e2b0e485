"""Tuning tables are read, checked by path, and give defaults and candidates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile import ConfigError
from sparse_compile.kernels import tuning_tables
from sparse_compile.kernels.conditions import Condition
from sparse_compile.kernels.tuning_tables import Fact, Table, round_up

TEXT = """
kernel = "page_bound"
module = "range_kernels"
key = ["head_dim", "n_pages:pow2", "n_tokens:nearest"]
[default]
num_warps = 4
[[space]]
when = "head_dim <= 128 and block_m * num_warps <= 256"
block_m = [16, 64, 128]
num_warps = [2, 4, 8]
"""
FACTS = {"head_dim": 128, "n_pages": 64, "n_tokens": 64, "itemsize": 2}


def parsed(text: str) -> Table:
    return tuning_tables.parse(text, "tables/page_bound.toml", "page_bound")


WRONG = {  # what is replaced, by what, and the first line of the error
    "string": ("[16, 64,", '[16, "64",', 'space[0].block_m[1] is "64" (a string).'),
    "boolean": ("num_warps = 4", "num_warps = true", "default.num_warps is True (a bool)."),
    "float": ("num_warps = 4", "num_warps = 4.0", "default.num_warps is 4.0."),
    "no-power-of-two": ("[2, 4, 8]", "[2, 3, 8]", "space[0].num_warps[1] is 3."),
    "too-large": ("[16, 64,", "[16, 512,", "space[0].block_m[1] is 512."),
    "too-small": ("[16, 64,", "[8, 64,", "space[0].block_m[0] is 8."),
    "no-list": ("[16, 64, 128]", "16", "space[0].block_m is 16."),
    "empty-list": ("[16, 64, 128]", "[]", "space[0].block_m is [] (a list)."),
    "other-kernel": ('"page_bound"', '"page_bond"', 'kernel is "page_bond" (a string).'),
    "fact": ("n_pages:pow2", "n_pages:pow3", 'key[1] is "n_pages:pow3" (a string).'),
    "key-type": ('["head_dim", ', "[1, ", "key[0] is 1."),
    "both": ('"head_dim", ', '"num_warps", "head_dim", ', "key is about num_warps"),
    "condition-name": ("head_dim <= 128 and", "head_dum <= 128 and", "space[0].when is"),
    "condition-type": ('"head_dim <= 128 and block_m * num_warps <= 256"', "5", "when is 5."),
    "value-of-no-space": ("128 and block_m", "128 and block_n", "space[0].when is"),
    "module": ('"range_kernels"', '"rings"', 'module is "rings" (a string).'),
    "module-without-tiles": ('"range_kernels"', '"checks"', 'module is "checks" (a string).'),
}
UNKNOWN = {
    "in-space": ("num_warps = [", "num_warp = [", 'space[0] has the unknown key "num_warp"'),
    "in-default": ("num_warps = 4", "warps = 4", 'default has the unknown key "warps"'),
    "at-top": ('module = "', 'modul = "', 'the unknown key "modul"'),
}


@pytest.mark.parametrize("name", [*WRONG, *UNKNOWN])
def test_errors_have_file_path_value_and_advice(name: str) -> None:
    old, new, first = {**WRONG, **UNKNOWN}[name]
    assert TEXT.count(old) >= 1
    with pytest.raises(ConfigError) as caught:
        parsed(TEXT.replace(old, new, 1))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("tables/page_bound.toml")
    assert first in lines[0]
    assert lines[1].startswith("  Expected ")
    assert len(lines) == 3


def test_the_error_of_the_style_guide() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(TEXT.replace("[16, 64,", '[16, "64",'))
    assert str(caught.value) == (
        'tables/page_bound.toml: space[0].block_m[1] is "64" (a string).\n'
        "  Expected an integer power of two from 16 to 256.\n"
        "  Write the number without quotes; `sparse-compile tune --check` validates all tables "
        "without a GPU."
    )


def test_toml_that_is_none_has_its_line() -> None:
    with pytest.raises(ConfigError, match=r"tables/page_bound.toml:2: .*\n  Expected valid TOML"):
        parsed(TEXT.replace('"page_bound"', "page_bound"))


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match='Did you mean "block_m"'):
        parsed(TEXT.replace("block_m = [", "blok_m = ["))
    with pytest.raises(ConfigError, match='Did you mean "range_forward"'):
        tuning_tables.load("range_forwart")


def test_defaults_and_candidates() -> None:
    table = parsed(TEXT)
    assert table.names == ("block_m", "block_n", "num_warps", "num_stages")
    found = table.candidates(FACTS)
    assert found[0] == table.default == {"num_warps": 4}
    assert {(one["block_m"], one["num_warps"]) for one in found[1:]} == {
        (16, 2), (16, 4), (16, 8), (64, 2), (64, 4), (128, 2)
    }  # fmt: skip
    assert len(found) == 7
    assert table.candidates({**FACTS, "head_dim": 256}) == [{"num_warps": 4}]


@given(st.integers(1, 2**40))
def test_buckets_are_the_next_power_of_two(value: int) -> None:
    bucket = round_up(value)
    assert bucket.bit_count() == 1
    assert bucket // 2 < value <= bucket
    assert round_up(bucket) == bucket
    assert Fact("n", "pow2").bucket(value) == Fact("n", "nearest").bucket(value) == bucket
    assert Fact("n", "").bucket(value) == value


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_buckets_ascend(a: int, b: int) -> None:
    assert round_up(min(a, b)) <= round_up(max(a, b))


FORMULAS = ["a + b * 2 <= c", "not a > b", "a // 3 % 2 == 1 or b != c", "max(a, b) - min(b, c) > -a",
            "1 < a < b <= c", "(a and b) or not (c or a)"]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
@given(a=st.integers(-5, 50), b=st.integers(-5, 50), c=st.integers(-5, 50))
def test_conditions_are_what_python_would_compute(formula: str, a: int, b: int, c: int) -> None:
    names = {"a": a, "b": b, "c": c}
    assert Condition(formula, names)(names) == bool(eval(formula, {}, dict(names)))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "a.__class__", "a[0]", "lambda: a", "(a for a in b)",
        "a if b else a", "f'{a}'", "a ** 9", "a << 40", "max(a)", "max(*a)", "open(a, b)", "2.5 < a",
        "'x' < a", "True", "a :=", "", "a is b", "a in b", "a @ b",
    ],
)  # fmt: skip
def test_conditions_run_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"holds|cannot be read|speaks of"):
        Condition(text, ["a", "b"])


def test_a_division_by_zero_does_not_hold() -> None:
    assert not Condition("8 // a > 1", ["a"])({"a": 0})


@pytest.mark.parametrize("kernel", tuning_tables.names())
def test_our_tables_have_something_to_tune_for_the_listed_shapes(kernel: str) -> None:
    from sparse_compile.tuner.shapes import LIST
    from sparse_compile.tuner.workloads import WORKLOADS

    table = tuning_tables.load(kernel)
    for shape in LIST:
        facts = {**table.bucketed(WORKLOADS[kernel].facts(shape)), "itemsize": 2}
        assert 4 <= len(table.candidates(facts)) <= 64


def test_a_module_may_import_its_tiles() -> None:
    forward, gradient = (
        tuning_tables.tile_names(f"block_sparse_{name}", "") for name in ("forward", "backward")
    )
    assert forward == gradient == ("block_m", "block_n", "num_warps", "num_stages")
