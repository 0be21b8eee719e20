"""Tables of numbers: kept, searched, summarized, drawn."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from forward_pass import InputError, RecordFileError
from sweep_figures import MOST_ROWS, plot_sweep, sweep_table
from sweep_result import SweepResult, summarize

TOKENS = ("a", " cat", " $at", "\n")


def result(axes=("layer", "position"), shape=None, **changes):
    labels = {"layer": (0, 2, 5), "position": (0, 1, 3), "head": (1, 0), "neuron": (7, 9, 1, 4)}
    chosen = tuple(labels[axis] for axis in axes)
    shape = tuple(map(len, chosen))
    values = np.random.default_rng(0).normal(size=shape)
    fields = {
        "values": values,
        "axes": axes,
        "labels": chosen,
        "tokens": TOKENS,
        "source_tokens": ("b", *TOKENS[1:]),
        "site": "resid_pre",
        "direction": "denoising",
        "metric": "logit_diff",
        "unit": "logits",
        "normalized": False,
        "clean": 3.0,
        "corrupted": -1.0,
        "answer": " cat",
        "passes": 4,
    }
    return SweepResult(**(fields | changes))


def several(axes=("layer", "position")):
    one = result(axes)
    spread = np.abs(one.values) + 0.1
    return dataclasses.replace(
        one, stderr=spread / 2, low=one.values - spread, high=one.values + spread, count=7,
        tokens=(), source_tokens=(),
    )  # fmt: skip


# --- The result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        result(),
        result(("layer", "position", "head")),
        result(("layer",), clean=float("nan"), answer="", foil="\u2028é$"),
        result(values=np.array([[np.nan, np.inf, -np.inf]] * 3)),
        several(),
    ],
    ids=repr,
)
def test_save_and_load(made, tmp_path):
    path = tmp_path / "sweep.safetensors"
    made.save(path)
    loaded = SweepResult.load(path)
    for field in dataclasses.fields(SweepResult):
        ours, theirs = getattr(made, field.name), getattr(loaded, field.name)
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        elif ours == ours:
            assert (ours, type(ours)) == (theirs, type(theirs))
        else:
            assert theirs != theirs
    path.write_bytes(b"no")
    with pytest.raises(RecordFileError):
        SweepResult.load(path)


def test_to_frame_names_every_cell():
    made = several(("layer", "position", "head"))
    frame = made.to_frame()
    assert list(frame.columns) == ["layer", "position", "head", "value", "stderr", "low", "high"]
    assert len(frame) == made.values.size
    for _, row in frame.iterrows():
        place = tuple(
            labels.index(int(row[axis]))
            for axis, labels in zip(made.axes, made.labels, strict=True)
        )
        assert row["value"] == made.values[place]
        assert row["stderr"] == made.stderr[place]
        assert (row["low"], row["high"]) == (made.low[place], made.high[place])
    tokens = result().to_frame()["token"]
    assert list(tokens) == [" cat" if p == 1 else TOKENS[p] for p in (0, 1, 3)] * 3


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, -1.0),
        ({"direction": "noising"}, 3.0),
        ({"normalized": True}, 0.0),
        ({"normalized": True, "direction": "noising"}, 1.0),
        ({"metric": "distance", "corrupted": 0.0, "clean": 1.0}, 0.0),
        ({"metric": "distance", "corrupted": 1.0, "clean": 0.0, "direction": "noising"}, 0.0),
        ({"metric": "distance", "normalized": True, "direction": "noising"}, 1.0),
    ],
)
def test_top_counts_from_the_run_that_is_edited(changes, start):
    made = result(**changes)
    found = made.top(4)
    changes_ = np.abs(made.values - start)
    assert list(np.abs(found["value"] - start)) == sorted(changes_.ravel(), reverse=True)[:4]
    assert len(made.top(100)) == 9
    with pytest.raises(InputError, match="at least 1; came 0"):
        made.top(0)


def test_layer_effects():
    made = result(("layer",))
    assert made.layer_effects() == dict(zip((0, 2, 5), made.values, strict=True))
    with pytest.raises(InputError, match=r"axes \('layer', 'position'\), not the layer alone"):
        result().layer_effects()


def test_reprs_and_labels():
    assert repr(result()) == "SweepResult(resid_pre, 3 layer × 3 position, logit_diff, denoising)"
    assert repr(several()).endswith("denoising, 7 pairs)")
    assert "logit_diff normalized" in repr(result(normalized=True))
    assert result().value_label == "logit_diff (logits)"
    assert result(unit="").value_label == "logit_diff"
    assert result(normalized=True).value_label == "logit_diff: 0 corrupted, 1 clean"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ("layer",)}, "axes must be some of"),
        ({"axes": ("layer", "token")}, "axes must be some of"),
        ({"values": np.zeros((3, 2))}, r"values must have the shape of the labels, \(3, 3\)"),
        ({"low": np.zeros(3)}, "low must have the shape"),
    ],
)
def test_tables_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(result(), **changes)


# --- Several pairs --------------------------------------------------------------------------------


def pairs(count=6, cells=4, seed=1):
    rng = np.random.default_rng(seed)
    corrupted = rng.normal(size=count)
    clean = corrupted + rng.uniform(1, 4, size=count)
    share = rng.normal(0.5, 0.3, size=(count, cells))
    return corrupted[:, None] + share * (clean - corrupted)[:, None], clean, corrupted


@pytest.mark.parametrize("normalize", [False, True])
def test_summarize_by_loops(normalize):
    values, clean, corrupted = pairs()
    found = summarize(values, clean, corrupted, normalize, seed=5)
    count, cells = values.shape
    for cell in range(cells):
        v = values[:, cell]
        if normalize:
            ratio = sum(v - corrupted) / sum(clean - corrupted)
            # Cochran: residuals of y = v - corrupted about ratio · x, x = clean - corrupted
            rest = [(v[i] - corrupted[i]) - ratio * (clean[i] - corrupted[i]) for i in range(count)]
            x_mean = sum(clean - corrupted) / count
            error = (sum(r * r for r in rest) / (count - 1) / count) ** 0.5 / x_mean
            mean = ratio
        else:
            mean = sum(v) / count
            error = (sum((each - mean) ** 2 for each in v) / (count - 1) / count) ** 0.5
        assert found.mean[cell] == pytest.approx(mean, rel=1e-12)
        assert found.stderr[cell] == pytest.approx(error, rel=1e-9)
    again = summarize(values, clean, corrupted, normalize, seed=5)
    np.testing.assert_array_equal(found.low, again.low)
    assert (summarize(values, clean, corrupted, normalize, seed=6).low != found.low).any()
    # about ±1.96 standard errors, as for any mean of a well-behaved sample
    width = (found.high - found.low) / found.stderr
    assert ((width > 2.4) & (width < 4.6)).all()


def test_the_same_pairs_are_drawn_for_every_cell():
    """So a difference of two cells that is the same in every pair has no spread."""
    values, clean, corrupted = pairs(cells=1)
    both = np.concatenate([values, values + 2.0], 1)
    found = summarize(both, clean, corrupted, False)
    assert found.low[1] - found.low[0] == pytest.approx(2.0)
    assert found.high[1] - found.high[0] == pytest.approx(2.0)
    # runs go with their pair: a cell that is the clean run is 1 in every sample
    ends = np.stack([clean, corrupted], 1)
    found = summarize(ends, clean, corrupted, True)
    np.testing.assert_allclose([found.low, found.high], [[1, 0], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(found.stderr, 0, atol=1e-12)


def test_one_pair_has_no_spread():
    found = summarize(np.array([[1.0, 2.0]]), [3.0], [1.0], True)
    assert found.mean.tolist() == [0.0, 0.5]
    assert (found.stderr, found.low, found.high) == (None, None, None)


def test_a_pair_whose_runs_agree_does_not_blow_up_the_mean():
    values = np.array([[0.5], [4.0]])
    found = summarize(values, [0.0, 4.0], [0.0, 0.0], True)
    assert found.mean.tolist() == [4.5 / 4]  # and the samples of the first pair alone are infinite
    assert np.isinf(found.high).all()


def test_runs_that_agree_on_the_mean_cannot_be_normalized():
    with pytest.raises(InputError, match=r"same metric \(2\).*normalize=False"):
        summarize(np.zeros((2, 1)), [1.0, 3.0], [3.0, 1.0], True)


# --- Pictures -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    assert plt.get_fignums() == []


def test_the_table_of_a_sweep():
    made = result(("layer", "position", "head"))
    table = sweep_table(made)
    assert table["y_name"] == "layer.head"
    assert table["y_labels"] == ["0.1", "0.0", "2.1", "2.0", "5.1", "5.0"]
    assert len(table["x_labels"]) == 3
    for i, label in enumerate(table["y_labels"]):
        layer, head = map(int, label.split("."))
        for j in range(3):
            place = (made.labels[0].index(layer), j, made.labels[2].index(head))
            assert table["values"][i, j] == made.values[place]
    heads = sweep_table(result(("layer", "head")))
    assert (heads["y_labels"], heads["x_labels"]) == (["0", "2", "5"], ["1", "0"])
    assert heads["x_name"] == "head"
    neurons = result(("layer", "position", "neuron"))
    assert sweep_table(neurons)["values"][1, 2] == neurons.values[0, 2, 1]


def test_many_rows_keep_those_with_the_largest_change_in_order():
    values = np.zeros((4, 2, 20))
    values[1, 1, 3] = -5.0
    values[3, 0, 19] = 4.0
    made = result(
        ("layer", "position", "head"), values=values,
        labels=((0, 1, 2, 3), (0, 1), tuple(range(20))),
    )  # fmt: skip
    table = sweep_table(made)
    assert table["values"].shape == (MOST_ROWS, 2)
    assert table["note"] == f"{MOST_ROWS} of 80 with the largest change"
    assert {"1.3", "3.19"} <= set(table["y_labels"])
    assert table["values"][table["y_labels"].index("1.3")].tolist() == [0.0, -5.0]
    numbers = [tuple(map(int, label.split("."))) for label in table["y_labels"]]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "made",
    [
        result(),
        result(("layer", "head")),
        result(("layer", "position", "head")),
        result(("layer",)),
        several(("layer",)),
        result(values=np.full((3, 3), np.nan)),
    ],
    ids=repr,
)
def test_plots(made, tmp_path):
    figure = made.plot(save_path=tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert "clean into corrupted" in figure.axes[0].get_title()
    other = plot_sweep(dataclasses.replace(made, direction="noising"), title="mine")
    assert other.axes[0].get_title().startswith("mine")


def test_bars_show_numbers_and_intervals():
    made = several(("layer",))
    ax = made.plot().axes[0]
    assert [bar.get_height() for bar in ax.patches] == made.values.tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "5"]
    (lines,) = (c for c in ax.collections if hasattr(c, "get_segments"))
    ends = np.array([segment[:, 1] for segment in lines.get_segments()])
    np.testing.assert_allclose(ends, np.stack([made.low, made.high], 1))


def test_the_interactive_twin():
    pytest.importorskip("plotly")
    for made in (result(), result(("layer",)), result(("layer", "position", "head"))):
        figure = made.plot(interactive=True)
        shown = np.array(figure.data[0].z, dtype=float)
        np.testing.assert_allclose(shown, sweep_table(made)["values"])
