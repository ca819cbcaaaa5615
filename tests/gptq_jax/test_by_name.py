"""Names of methods, alone and around one another."""

import pytest

from gptq_jax.by_name import make_method
from gptq_jax.methods import coordinate_descent, fractional_zeros, gptaq, gptq, qep, rtn
from gptq_jax.tuning import block_tuning, learned_rounding


def test_names_compose_from_the_outside_in():
    assert make_method("rtn", {"grid": "mse"}) is rtn(grid="mse")
    assert make_method("qep", {"order": "natural"}) is qep(gptq(order="natural"))
    assert make_method("qep+descent+gptq", {}, alpha=0.75) is qep(coordinate_descent(gptq()), alpha=0.75)
    assert make_method("descent+rtn", {}) is coordinate_descent(rtn())
    assert make_method("gptaq", {}, alpha=0.5) is gptaq(alpha=0.5)
    assert make_method("tune", {}) == gptq()._replace(tuning=block_tuning())
    assert make_method("tune+qep", {"order": "natural"}).tuning is block_tuning()
    assert make_method("autoround", {"grid": "mse"}) == rtn(grid="mse")._replace(tuning=learned_rounding())
    assert make_method("qep+autoround+gptq", {}).name == "qep"
    assert make_method("qep+autoround+gptq", {}).tuning is learned_rounding()
    found = make_method("awq+rtn", {})
    assert found.rewrite.name == "awq"
    assert found._replace(rewrite=None) == rtn()
    for name, options, grid in (
        ("awq+rtn", {}, "minmax"),
        ("awq+qep", {}, "ldl"),
        ("awq+gptq", {"grid": "mse"}, "mse"),
        ("awq+own_methods:clip_search", {}, "minmax"),
    ):
        assert dict(make_method(name, options).rewrite.settings)["awq_grid"] == grid
    assert make_method("fractions+qep", {}) is fractional_zeros(qep(gptq()))
    distilled = make_method("distill+tune+qep", {})
    assert (distilled.finish.name, distilled.tuning, distilled.name) == ("distill", block_tuning(), "qep")
    assert dict(make_method("eora", {}).finish.settings) == {"rank": 16, "eora_alpha": 0.0}
    assert dict(make_method("eora+qep", {}, alpha=0.75).finish.settings) == {"rank": 16, "eora_alpha": 0.75}
    assert make_method("hadamard+qep+own_methods:clip_search", {}).rewrite.name == "hadamard"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hadamard", {}),
        ("hadamard_values", {"rotated_values": True}),
        ("hadamard_online", {"rotated_values": True, "rotated_down": True}),
    ],
)
def test_rotations_have_names(name, settings):
    found = make_method(f"{name}+gptq", {})
    assert found._replace(rewrite=None) == gptq()
    assert found.rewrite.name == "hadamard"
    assert dict(found.rewrite.settings) == {"rotation_seed": 0, **settings}


@pytest.mark.parametrize(
    ("name", "alpha", "message"),
    [
        ("best", None, "'best' is none of gptq"),
        ("best+gptq", None, "'best' is none of qep, descent, fractions, hadamard"),
        ("awq+hadamard+rtn", None, "rewrites the model twice"),
        ("tune+autoround+gptq", None, "tunes each block twice: leave out 'tune'"),
        ("distill+eora+gptq", None, "has two ends: leave out 'distill'"),
        ("gptq", 0.5, "--alpha 0.5 goes with qep or gptaq"),
        ("qep+gptaq", None, "makes up for earlier layers itself"),
    ],
)
def test_what_cannot_be_is_named(name, alpha, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, {}, alpha=alpha)
