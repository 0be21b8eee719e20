"""The picture of a steering sweep: what is drawn is what was given."""

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from steering_figure import plot_steering

EFFECT = np.array([[0.1, 0.5, 0.9], [0.4, 0.5, np.nan]])
COST = np.array([[20.0, 3.0, 900.0], [4.0, 3.0, 5.0]])
COEFFICIENTS = (-2.0, 0.0, 1.5)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_tables_and_trade_off_hold_the_numbers(tmp_path):
    figure = plot_steering(
        EFFECT,
        COST,
        COEFFICIENTS,
        ["3", "6"],
        effect_name="share",
        unsteered=(0.5, 3.0),
        title="happy",
        save_path=tmp_path / "sweep.png",
    )
    assert isinstance(figure, Figure)
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    left, middle, right = figure.axes[:3]
    np.testing.assert_array_equal(left.images[0].get_array().filled(np.nan), EFFECT)
    np.testing.assert_array_equal(middle.images[0].get_array(), COST)
    assert [label.get_text() for label in left.get_xticklabels()] == ["-2", "0", "+1.5"]
    assert [label.get_text() for label in middle.get_yticklabels()] == ["3", "6"]
    assert texts(left) == ["0.10", "0.50", "0.90", "0.40", "0.50"]
    assert texts(middle) == ["20", "3.00", "900", "4.00", "3.00", "5.00"]
    for line, costs, effects in zip(right.lines, COST, EFFECT, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), costs)
        np.testing.assert_array_equal(line.get_ydata(), effects)
    assert [t.get_text() for t in right.get_legend().texts] == ["layer 3", "layer 6", "unsteered"]
    np.testing.assert_array_equal(right.collections[0].get_offsets(), [[3.0, 0.5]])
    assert left.get_title() == right.get_ylabel() == "share"
    ticks = [float(label.get_text().replace(",", "")) for label in right.get_xticklabels()]
    assert len([tick for tick in ticks if 3 <= tick <= 900]) >= 2


def test_axes_of_the_caller_are_drawn_on():
    figure, axes = pyplot.subplots(1, 3)
    try:
        assert plot_steering(EFFECT, COST, COEFFICIENTS, axes=axes) is figure
        assert all(ax.has_data() for ax in axes)
    finally:
        pyplot.close(figure)


def test_a_single_layer_is_enough():
    figure = plot_steering(EFFECT[:1], COST[:1], COEFFICIENTS)
    assert len(figure.axes[2].lines) == 1
    assert pyplot.get_fignums() == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"both be \[layer, coefficient\]"):
        plot_steering(EFFECT, COST[:1], COEFFICIENTS)
    with pytest.raises(ValueError, match="with 2 coefficients"):
        plot_steering(EFFECT, COST, COEFFICIENTS[:2])
    with pytest.raises(ValueError, match="layer_labels"):
        plot_steering(EFFECT, COST, COEFFICIENTS, ["a"])
    figure = Figure()
    with pytest.raises(ValueError, match="3 axes"):
        plot_steering(EFFECT, COST, COEFFICIENTS, axes=figure.subplots(1, 2))
