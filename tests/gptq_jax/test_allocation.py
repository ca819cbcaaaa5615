"""Bits by layer: the choice against brute force, what is measured against the pipeline, the budget to the byte."""

from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest
from tiny_quantization import BATCHES, float_model

from gptq_jax import allocation
from gptq_jax.allocation import Choice, allocate_bits, choose
from gptq_jax.methods import rtn
from gptq_jax.pipeline import block_specs, quantize
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.progress import Progress

SPEC = QuantSpec(bits=3, group_size=24, scale_dtype="float16")
RULES = SpecRules(default=SPEC, skip=("mlp",))  # few shapes
METHOD = rtn()  # fewest compilations; what is measured does not depend on the method
BITS = (2, 3, 4)


@pytest.fixture(scope="module")
def model():
    """Little comes of the second block's attention."""
    found = float_model()
    output = found.params["layers"][1]["self_attn"]["o_proj"]
    output["kernel"] *= 0.01
    return found


@pytest.fixture(scope="module")
def uniform(model):
    return quantize(model, BATCHES, RULES, METHOD)


def divergence(model, other):
    """KL in nats per token of the calibration, in float64 from the logits."""
    tokens = np.concatenate(BATCHES)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(each(tokens)), np.float64) for each in (model, other))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def layers_at_random(seed, count=6, step=1):
    """Sizes grow with bits, errors mostly fall; the smallest sizes are of no round number."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        weights, overhead = step * int(rng.integers(1, 9)), int(rng.integers(0, 50))
        errors = rng.uniform(0.5, 2) * 4.0 ** -np.array((2, 3, 4, 8)) * rng.uniform(0.2, 1.5, 4)
        found.append(
            [Choice(bits=b, nbytes=b * weights + overhead, error=e) for b, e in zip((2, 3, 4, 8), errors, strict=True)]
        )
    return found


def brute_force(layers, budget):
    """Of all assignments that fit the least error."""
    totals = (
        (sum(c.error for c in each), sum(c.nbytes for c in each))
        for each in product(*layers)
        if sum(c.nbytes for c in each) <= budget
    )
    return min(totals)[0]


@pytest.mark.parametrize("seed", range(8))
def test_choose_is_as_good_as_trying_everything(seed):
    layers = layers_at_random(seed, step=1 + 7 * (seed % 2))
    least, most = (sum(extreme(c.nbytes for c in each) for each in layers) for extreme in (min, max))
    for budget in np.linspace(least, most + 10, 9).astype(int).tolist():
        chosen = choose(layers, budget)
        assert all(one in each for one, each in zip(chosen, layers, strict=True))
        assert sum(c.nbytes for c in chosen) <= budget
        assert sum(c.error for c in chosen) == pytest.approx(brute_force(layers, budget), rel=1e-12)


def test_coarse_units_stay_within_the_budget_and_near_the_best(monkeypatch):
    monkeypatch.setattr(allocation, "_MOST_UNITS", 64)
    layers = [
        [replace(c, nbytes=c.nbytes * 1000 + number) for c in each] for number, each in enumerate(layers_at_random(3))
    ]
    least, most = (sum(extreme(c.nbytes for c in each) for each in layers) for extreme in (min, max))
    for budget in np.linspace(least, most, 7).astype(int).tolist():
        chosen = choose(layers, budget)
        assert sum(c.nbytes for c in chosen) <= budget
        # Rounding up takes at most one unit from each layer.
        smaller = max(budget - len(layers) * (budget - least) // 64 - len(layers), least)
        assert sum(c.error for c in chosen) <= brute_force(layers, smaller) * (1 + 1e-12)


def test_choose_refuses_less_than_the_smallest():
    with pytest.raises(ValueError, match=r"^budget=3 bytes are fewer than the 4"):
        choose([[Choice(bits=2, nbytes=4, error=0.1)]], 3)


def test_bits_go_where_predictions_need_them(model, uniform):
    """At equal bytes: relative errors alone would not tell the two blocks apart."""
    plain, uniform_report = uniform
    rules = allocate_bits(model, BATCHES, uniform_report.bits_per_weight, bits=BITS, spec=RULES, method=METHOD)
    chosen, report = quantize(model, BATCHES, rules, METHOD)
    spent, given = (sum(layer.nbytes for layer in each.layers) for each in (report, uniform_report))
    assert given - min(layer.d_in * layer.d_out // 8 for layer in report.layers) < spent <= given
    assert divergence(model, chosen) < 0.7 * divergence(model, plain)
    grids = {layer.path: layer.spec.bits for layer in report.layers}
    first, second = ([bits for path, bits in grids.items() if path.startswith(f"layers.{n}.")] for n in (0, 1))
    assert max(second) <= min(first)
    assert sum(second) < 3 * len(second) < sum(first)


def test_layers_that_must_be_alike_get_one_grid(model, monkeypatch):
    """What slices of one parameter are held to."""
    made = type(model).calibration
    alike = (tuple(f"layers.0.self_attn.{name}_proj" for name in "qk"),)
    monkeypatch.setattr(type(model), "calibration", lambda *args: replace(made(*args), alike=alike))
    for budget in (3.2, 3.7, 4.4):
        rules = allocate_bits(model, BATCHES, budget, bits=BITS, spec=RULES, method=METHOD)
        one, other = (rules.spec_for(path) for path in alike[0])
        assert one == other


def test_errors_are_divergences_that_are_expected(model, monkeypatch):
    """All layers on one grid: what the sum of errors says is what comes of it, but for what is not additive."""
    seen = []
    monkeypatch.setattr(allocation, "choose", lambda choices, budget: [seen.append(c) or c[0] for c in choices])
    rules = allocate_bits(model, BATCHES, 8.0, bits=(4,), spec=RULES, method=METHOD)
    found = divergence(model, quantize(model, BATCHES, rules, METHOD)[0])
    assert 0.5 < sum(choice.error for (choice,) in seen) / found < 2


def test_without_a_known_head_errors_are_relative_and_behind_float_layers(model, monkeypatch):
    made, seen = type(model).calibration, []
    monkeypatch.setattr(type(model), "calibration", lambda *args: replace(made(*args), head=None))
    monkeypatch.setattr(allocation, "choose", lambda choices, budget: [seen.append(c) or c[0] for c in choices])
    allocate_bits(model, BATCHES, 8.0, bits=(3,), spec=RULES, method=METHOD)
    last = "layers.1.self_attn.o_proj"
    others = tuple(f"layers.{index}.self_attn.{name}_proj" for index in range(2) for name in "qkvo")[:-1]
    _, report = quantize(model, BATCHES, replace(RULES, skip=("mlp", *others)), METHOD)
    (layer,), (choice,) = report.layers, seen[-1]
    assert (layer.path, layer.nbytes) == (last, choice.nbytes)
    assert choice.error == pytest.approx(layer.relative_error**2, rel=1e-5)


def test_rules_keep_what_they_say_of_other_things(model):
    given = replace(RULES, overrides=(("o_proj", (("bits", 4),)), ("k_proj", (("group_size", -1),))))
    done = []
    rules = allocate_bits(
        model, BATCHES, 4.1, bits=(2, 3), spec=given, method=METHOD, on_step=lambda *now: done.append(now)
    )
    specs = block_specs(model.calibration([], []), rules)
    for path, spec in specs.items():
        if "mlp" in path:
            assert spec is None
        elif "o_proj" in path:
            assert spec == replace(SPEC, bits=4)
        else:
            assert spec == replace(SPEC, bits=spec.bits, group_size=-1 if "k_proj" in path else 24)
    assert {spec.bits for spec in specs.values() if spec} == {2, 3, 4}
    # Two blocks, there and back; of each q, k and v on two grids, o on one.
    assert done == [(number, 18) for number in range(1, 19)]


def test_an_interrupted_run_goes_on_and_other_budgets_need_nothing_new(model, tmp_path, monkeypatch):
    def start(budget, **options):
        kept = Progress(tmp_path / "kept", {"of": "this"}, steps="blocks")
        return allocate_bits(model, BATCHES, budget, bits=BITS, spec=RULES, method=METHOD, progress=kept, **options)

    def stop(done, total):
        if done == 18:  # four steps there and back, twelve candidates of the first block, two of the second
            raise KeyboardInterrupt

    peace = {
        budget: allocate_bits(model, BATCHES, budget, bits=BITS, spec=RULES, method=METHOD) for budget in (3.4, 4.0)
    }
    monkeypatch.setattr("gptq_jax.storage.progress.EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        start(3.4, on_step=stop)
    done = []
    monkeypatch.setattr(allocation, "fisher_traces", None)
    assert start(3.4, on_step=lambda *now: done.append(now)) == peace[3.4]
    assert done == [(number, 28) for number in (4, *range(16, 29))]
    monkeypatch.setattr(allocation, "_solved", None)
    assert start(4.0) == peace[4.0] != peace[3.4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": ()}, "bits=() is empty"),
        ({"bits": (3, 5)}, "bits=5 is not supported"),
        ({"target_bpw": 2.5}, "target_bpw=2.5 is less than the 2.694 bits per weight that the smallest grids"),
        ({"target_bpw": float("nan")}, "target_bpw=nan must be a positive number"),
        ({"target_bpw": -1.0}, "target_bpw=-1.0 must be a positive number"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_bad_input_is_said_before_the_work(model, monkeypatch, change, words):
    monkeypatch.setattr(allocation, "_measure", None)
    arguments = {"source": model, "batches": BATCHES, "target_bpw": 3.5, "spec": SPEC, **change}
    with pytest.raises(ValueError) as error:
        allocate_bits(**arguments)
    assert str(error.value).startswith(words)
