"""Statistics and comparison, against independent formulas (NumPy, SciPy, the standard library)."""

import math
import statistics

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.spatial.distance as distance
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from activation_record import ActivationRecord, LayerActivations
from activation_statistics import METRICS, compare_activations, get_activation_statistics
from forward_pass import LayerError, SiteError

NAMES = ["h.0", "h.1"]


def record_of(values, layer="h.0", site="resid_post", n_tokens=None, positions=None):
    """A record whose one tensor holds ``values`` ``[position, …]``."""
    tensor = torch.as_tensor(values)[None]
    count = n_tokens or tensor.shape[1]
    acts = LayerActivations({layer: tensor}, NAMES)
    fields = {} if positions is None else {"positions": positions}
    if site != "resid_post":
        fields["site_activations"] = {site: acts}
        acts = LayerActivations({}, NAMES)
    tokens = [f"t{i}" for i in range(count)]
    return ActivationRecord("p", tokens, list(range(count)), acts, **fields)


def random_rows(n=5, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)) + 0.3


# --- Statistics -----------------------------------------------------------------------------------


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 7)),
        elements=st.floats(-1000, 1000, width=32),
    )
)
def test_statistics_against_the_standard_library(values):
    stats = get_activation_statistics(record_of(values), 0)
    flat = [float(v) for v in values.ravel()]
    assert stats["mean"] == pytest.approx(statistics.fmean(flat), abs=1e-9)
    assert stats["std"] == pytest.approx(statistics.pstdev(flat), abs=1e-7)
    assert stats["median"] == pytest.approx(statistics.median(flat))
    assert (stats["min"], stats["max"]) == (min(flat), max(flat))
    rows = [math.hypot(*map(float, row)) for row in values]
    assert stats["norm"] == pytest.approx(statistics.fmean(rows))
    assert stats["norm_total"] == pytest.approx(math.hypot(*flat))
    assert stats["sparsity"] == pytest.approx(sum(abs(v) < 1e-6 for v in flat) / len(flat))
    assert stats["nan_count"] == stats["inf_count"] == 0


def test_a_mean_of_many_bfloat16_values_is_right():
    values = torch.full((100, 768), 1.0078125, dtype=torch.bfloat16)
    assert get_activation_statistics(record_of(values), 0)["mean"] == 1.0078125
    halves = torch.full((100, 768), 60000.0, dtype=torch.float16)
    norm = get_activation_statistics(record_of(halves), 0)["norm"]
    assert norm == pytest.approx(60000 * math.sqrt(768), rel=1e-12)


def test_sparsity_on_both_sides_of_its_threshold():
    values = torch.tensor([[0.0, 0.99e-6, -0.99e-6, 1.01e-6]], dtype=torch.float64)
    assert get_activation_statistics(record_of(values), 0)["sparsity"] == 0.75


def test_values_that_are_not_finite_are_counted_and_left_out():
    values = torch.tensor([[3.0, 4.0, math.nan], [math.inf, -math.inf, 12.0]])
    stats = get_activation_statistics(record_of(values), 0)
    assert (stats["nan_count"], stats["inf_count"]) == (1, 2)
    assert stats["mean"] == 19 / 3
    assert (stats["min"], stats["median"], stats["max"]) == (3, 4, 12)
    assert stats["norm"] == (5 + 12) / 2
    assert stats["norm_total"] == 13


@pytest.mark.parametrize("values", [torch.zeros(0, 4), torch.full((2, 2), math.nan)])
def test_statistics_of_nothing(values):
    stats = get_activation_statistics(record_of(values), 0)
    assert stats.pop("nan_count") == values.numel()
    assert stats.pop("inf_count") == 0
    assert all(math.isnan(value) for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_every_dtype(dtype):
    stats = get_activation_statistics(record_of(torch.tensor([[0, 1, 1, 0]]).to(dtype)), 0)
    assert stats["mean"] == 0.5
    assert all(isinstance(value, float | int) for value in stats.values())


def test_statistics_of_another_site_and_layer():
    record = record_of(torch.ones(3, 2, 2), "h.1", "head_out")
    assert get_activation_statistics(record, -1, site="head_out")["norm"] == 2
    with pytest.raises(LayerError, match=r"layer 0 .* was not recorded"):
        get_activation_statistics(record, "h.0", site="head_out")
    with pytest.raises(SiteError, match="'mlp_out' was not recorded"):
        get_activation_statistics(record, 1, site="mlp_out")


# --- Comparison -----------------------------------------------------------------------------------

ORACLES = {
    "cosine": lambda x, y: 1 - distance.cosine(x, y),
    "correlation": lambda x, y: scipy.stats.pearsonr(x, y).statistic,
    "dot": np.dot,
    "l2": distance.euclidean,
    "l1": distance.cityblock,
    "linf": distance.chebyshev,
    "mse": lambda x, y: distance.sqeuclidean(x, y) / len(x),
    "relative_l2": lambda x, y: distance.euclidean(x, y) / distance.norm(x),
}


def test_every_metric_has_an_oracle():
    assert ORACLES.keys() == METRICS.keys()


@pytest.mark.parametrize("metric", METRICS)
def test_records_of_equal_length_are_compared_position_by_position(metric):
    x, y = random_rows(seed=1), random_rows(seed=2)
    value = compare_activations(record_of(x), record_of(y), 0, metric)
    assert type(value) is float
    assert value == pytest.approx(
        np.mean([ORACLES[metric](a, b) for a, b in zip(x, y, strict=True)])
    )


@pytest.mark.parametrize("metric", METRICS)
def test_records_of_different_length_are_compared_at_the_last_token(metric):
    x, y = random_rows(5, seed=1), random_rows(3, seed=2)
    value = compare_activations(record_of(x), record_of(y), 0, metric)
    assert value == pytest.approx(ORACLES[metric](x[-1], y[-1]))


@pytest.mark.parametrize("metric", METRICS)
def test_a_record_against_itself(metric):
    record = record_of(random_rows())
    value = compare_activations(record, record, 0, metric)
    if metric in ("cosine", "correlation"):
        assert value == pytest.approx(1)
        assert value <= 1
    elif metric != "dot":
        assert value == 0


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "relative_l2"])
def test_metrics_are_symmetric(metric):
    x, y = record_of(random_rows(seed=1)), record_of(random_rows(seed=2))
    assert compare_activations(x, y, 0, metric) == compare_activations(y, x, 0, metric)


def test_relative_l2_is_relative_to_the_first_record():
    x, y = record_of([[3.0, 4.0]]), record_of([[0.0, 0.0]])
    assert compare_activations(x, y, 0, "relative_l2") == 1
    assert compare_activations(y, x, 0, "relative_l2") == math.inf
    assert compare_activations(y, y, 0, "relative_l2") == 0


def test_similarities_of_vectors_without_a_direction_are_zero():
    zero, one = record_of(torch.zeros(2, 7)), record_of(torch.randn(2, 7))
    constant = record_of(torch.full((2, 7), 0.1))
    assert compare_activations(zero, one, 0, "cosine") == 0
    assert compare_activations(zero, zero, 0, "cosine") == 0
    assert compare_activations(constant, one, 0, "correlation") == 0
    assert compare_activations(constant, constant, 0, "correlation") == 0
    assert compare_activations(constant, constant, 0, "cosine") == pytest.approx(1)


@pytest.mark.parametrize("metric", METRICS)
def test_nan_propagates(metric):
    x = record_of([[1.0, math.nan, 2.0]])
    assert math.isnan(compare_activations(x, record_of([[1.0, 2.0, 3.0]]), 0, metric))


def test_position():
    x, y = random_rows(5, seed=1), random_rows(3, seed=2)
    first, second = record_of(x), record_of(y)
    for position, (a, b) in {0: (0, 0), 2: (2, 2), -1: (4, 2), -3: (2, 0), (3, -2): (3, 1)}.items():
        value = compare_activations(first, second, 0, "l2", position=position)
        assert value == pytest.approx(distance.euclidean(x[a], y[b]))
    with pytest.raises(ValueError, match=r"position 3 is not held by .*it holds 0-2 of 3 tokens"):
        compare_activations(first, second, 0, position=3)
    with pytest.raises(ValueError, match="position -4"):
        compare_activations(first, second, 0, position=-4)


def test_positions_are_absolute_in_a_record_that_holds_only_some():
    x, y = random_rows(2, seed=1), random_rows(2, seed=2)
    first = record_of(x, n_tokens=6, positions=[2, 5])
    second = record_of(y, n_tokens=4, positions=[2, 3])
    expected = distance.euclidean(x[0], y[0])
    assert compare_activations(first, second, 0, "l2", position=2) == pytest.approx(expected)
    expected = distance.euclidean(x[1], y[1])
    assert compare_activations(first, second, 0, "l2") == pytest.approx(expected)
    assert compare_activations(first, second, 0, "l2", position=-1) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"it holds 2, 5 of 6 tokens"):
        compare_activations(first, second, 0, position=3)


def test_last_tokens_that_do_not_correspond_are_refused():
    first = record_of(random_rows(2), n_tokens=6, positions=[0, 1])
    second = record_of(random_rows(4))
    with pytest.raises(ValueError, match=r"0-1 of 6 tokens, the second 0-3 of 4 tokens; give pos"):
        compare_activations(first, second, 0)


@pytest.mark.parametrize(
    ("pool", "oracle"),
    [("mean", lambda x: x.mean(0)), ("max", lambda x: x.max(0)), ("last", lambda x: x[-1])],
)
def test_pool(pool, oracle):
    x, y = random_rows(5, seed=1), random_rows(3, seed=2)
    value = compare_activations(record_of(x), record_of(y), 0, "l1", pool=pool)
    assert value == pytest.approx(distance.cityblock(oracle(x), oracle(y)))


def test_heads_are_taken_together_as_one_vector():
    x, y = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    first, second = record_of(x, site="query"), record_of(y, site="query")
    value = compare_activations(first, second, 0, "l2", site="query")
    assert value == pytest.approx((x - y).flatten(1).norm(dim=1).mean().item())


def test_patterns_are_compared_query_by_query():
    x, y = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    records = [
        ActivationRecord("p", list("abcd"), [0] * 4, LayerActivations({}, NAMES), {"h.0": tensor})
        for tensor in (x, y)
    ]
    value = compare_activations(*records, 0, "l1", site="attn_pattern")
    assert value == pytest.approx((x - y).abs().sum((0, 1, 3)).mean().item())


def test_aliases():
    x, y = record_of(random_rows(seed=1)), record_of(random_rows(seed=2))
    for alias, name in {"euclidean": "l2", "manhattan": "l1", "pearson": "correlation"}.items():
        assert compare_activations(x, y, 0, alias) == compare_activations(x, y, 0, name)


def test_what_cannot_be_compared():
    x = record_of(random_rows())
    with pytest.raises(
        ValueError, match=r"no metric 'kosine'; expected one of cosine, correlation"
    ):
        compare_activations(x, x, 0, "kosine")
    with pytest.raises(ValueError, match="8 features per position, the second 9"):
        compare_activations(x, record_of(random_rows(width=9)), 0)
    with pytest.raises(ValueError, match="no pool 'sum'"):
        compare_activations(x, x, 0, pool="sum")
    with pytest.raises(ValueError, match="not both"):
        compare_activations(x, x, 0, position=1, pool="mean")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_activations(record_of(torch.zeros(0, 8)), x, 0)
    with pytest.raises(LayerError):
        compare_activations(x, x, 1)


def test_bfloat16_is_compared_in_float64():
    x = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    y = torch.full((1, 4096), 0.2, dtype=torch.bfloat16)
    exact = float(x[0, 0]) * float(y[0, 0]) * 4096
    assert compare_activations(record_of(x), record_of(y), 0, "dot") == pytest.approx(
        exact, rel=1e-12
    )
