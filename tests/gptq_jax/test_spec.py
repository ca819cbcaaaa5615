import pytest

from gptq_jax.spec import QuantSpec, SpecRules, parse_override


@pytest.mark.parametrize(
    ("group_size", "d_in", "group_rows", "groups"),
    [(128, 576, 128, 5), (128, 512, 128, 4), (-1, 576, 576, 1), (128, 64, 64, 1), (1, 3, 1, 3)],
)
def test_groups(group_size: int, d_in: int, group_rows: int, groups: int) -> None:
    spec = QuantSpec(group_size=group_size)
    assert spec.group_rows(d_in) == group_rows
    assert spec.groups(d_in) == groups


def test_equal_specs_are_one_static_argument() -> None:
    assert hash(QuantSpec(bits=3)) == hash(QuantSpec(bits=3))
    assert QuantSpec(bits=3).max_code == 7


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"bits=5 is not supported: use one of \[2, 3, 4, 8\]"),
        ({"group_size": 0}, ValueError, "group_size=0 is neither positive nor -1"),
        ({"group_size": -2}, ValueError, "group_size=-2 is neither positive nor -1"),
        ({"group_size": 64.0}, TypeError, "group_size"),
        ({"group_size": True}, TypeError, "group_size=True is not an integer"),
        ({"scale_dtype": "int8"}, ValueError, "scale_dtype='int8' is not supported"),
    ],
)
def test_what_a_spec_refuses(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantSpec(**fields)  # type: ignore[arg-type]


def test_the_first_override_that_matches_wins_and_skip_goes_before() -> None:
    rules = SpecRules(
        default=QuantSpec(group_size=64),
        skip=("lm_head",),
        overrides=(parse_override("down=bits:8"), parse_override(r"layers\.0\.=bits:3,symmetric:false")),
    )
    assert rules.spec_for("layers.1.up") == QuantSpec(group_size=64)
    assert rules.spec_for("layers.0.up") == QuantSpec(bits=3, group_size=64, symmetric=False)
    assert rules.spec_for("layers.0.down") == QuantSpec(bits=8, group_size=64)
    assert rules.spec_for("lm_head.down") is None


def test_an_unused_regex_is_named_with_examples() -> None:
    rules = SpecRules(skip=("up",), overrides=(parse_override("dwon=bits:8"),))
    rules.check_used(["layers.0.up", "layers.0.dwon"])
    with pytest.raises(ValueError, match=r"no layer matches 'dwon'; the layers are named like 'layers.0.up'"):
        rules.check_used(["layers.0.up"])


@pytest.mark.parametrize("pattern", ["(", "[a"])
def test_a_broken_regex_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        SpecRules(skip=(pattern,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down=bits:3,group_size:-1", ("down", (("bits", 3), ("group_size", -1)))),
        ("a=b=symmetric:true", ("a=b", (("symmetric", True),))),
    ],
)
def test_parse_override(text: str, expected: object) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["down", "=bits:3", "down=", "down=bits", "down=bits:x", "down=damp:1"])
def test_an_override_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="override"):
        parse_override(text)


def test_an_override_that_makes_no_valid_spec() -> None:
    with pytest.raises(ValueError, match="override 'down': bits=5 is not supported"):
        SpecRules(overrides=(parse_override("down=bits:5"),))
