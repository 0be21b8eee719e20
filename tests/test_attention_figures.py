"""Pictures of attention: the numbers given, tokens told apart, every head in its place."""

import numpy as np
import pytest

import attention_figures as figures
from attention_result import KINDS, AttentionPatterns, HeadSummary

HOSTILE = (" the", "$a_b$", " the", "\n", " extraordinarilylongtoken", "<script>", "中")


def patterns(heads, length, seed=0):
    """Return random causal patterns ``[head, query, key]``, each row of sum 1."""
    raw = np.random.default_rng(seed).random((heads, length, length))
    raw *= np.tri(length)
    return raw / raw.sum(-1, keepdims=True)


def shown(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_a_pattern_has_its_numbers_and_its_tokens():
    table = patterns(1, len(HOSTILE))[0]
    ax = figures.plot_pattern(table, HOSTILE, title="head 3.1").axes[0]
    np.testing.assert_array_equal(shown(ax), table)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:4] == ["·the₀", "$a_b$", "·the₂", "↵"]
    assert labels == [label.get_text() for label in ax.get_xticklabels()]
    assert ax.get_title() == "head 3.1"
    assert ax.images[0].get_clim() == (0.0, 1.0)
    written = {(t.get_position()): t.get_text() for t in ax.texts}
    assert written[(0, 0)] == "1.00"
    assert written[(1, 3)] == f"{table[3, 1]:.2f}".lstrip("0")
    assert (3, 1) not in written  # a token does not look ahead


def test_one_strong_cell_is_no_outlier():
    """The scale of other heat maps would cut it off; attention is mostly like that."""
    table = np.tri(30) * 1e-3
    table[20, 3] = 0.9
    ax = figures.plot_pattern(table, ["a"] * 30).axes[0]
    assert ax.images[0].get_clim() == (0.0, 0.9)
    assert not ax.collections


def test_chosen_rows_keep_their_tokens():
    table = patterns(1, 5)[0]
    ax = figures.plot_pattern(table, list("abcde"), queries=[4, 2], top=0.5).axes[0]
    np.testing.assert_array_equal(shown(ax), table[[4, 2]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["e", "c"]
    assert ax.images[0].get_clim() == (0.0, 0.5)
    with pytest.raises(ValueError, match="tokens must hold 5 labels; it holds 4"):
        figures.plot_pattern(table, list("abcd"))


def test_a_small_pattern_keeps_the_largest_of_what_it_merges():
    table = patterns(1, 101)[0]
    small = figures.shrunk(table, 10)
    assert small.shape == (10, 10)
    edges = [*np.linspace(0, 101, 10, endpoint=False).astype(int), 101]
    for row, column in np.ndindex(10, 10):
        patch = table[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        assert small[row, column] == patch.max()
    assert figures.shrunk(table, 101) is table


def test_all_heads_lie_in_rows_of_layers():
    of_layers = [patterns(3, 6, 1), patterns(2, 6, 2)]
    ax = figures.plot_all_heads(of_layers, [2, 7]).axes[0]
    sheet = shown(ax)
    for row, of_layer in enumerate(of_layers):
        for head, table in enumerate(of_layer):
            top, left = 1 + 7 * row, 1 + 7 * head
            np.testing.assert_array_equal(sheet[top : top + 6, left : left + 6], table)
    assert np.isnan(sheet[8:14, 15:21]).all()  # layer 7 has no third head
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "7"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    centre = ax.get_xticks()[1]
    assert 8 <= centre <= 13


def test_the_heads_of_one_layer_are_named_where_they_lie():
    table = patterns(6, 4)
    ax = figures.plot_all_heads([table], [5]).axes[0]
    assert [text.get_text() for text in ax.texts] == [f"5.{head}" for head in range(6)]
    assert shown(ax).shape == (2 * 5 + 1, 4 * 5 + 1)
    np.testing.assert_array_equal(shown(ax)[6:10, 6:10], table[5])
    assert shown(figures.plot_all_heads([table], [5], columns=3).axes[0]).shape == (11, 16)


def test_a_thousand_heads_make_one_sheet():
    figure = figures.plot_all_heads([patterns(32, 100, seed) for seed in range(32)], range(32))
    assert len(figure.axes) == 2
    width, height = figure.get_size_inches()
    assert max(width, height) < 18
    with pytest.raises(ValueError, match="1 layers of patterns came with 2 layer numbers"):
        figures.plot_all_heads([patterns(1, 3)], [0, 1])
    with pytest.raises(ValueError, match="no head to draw"):
        figures.plot_all_heads([np.zeros((0, 3, 3))], [0])


def test_scores_are_grids_from_zero():
    tables = {"induction": np.full((12, 6), 1e-3), "entropy": np.ones((12, 6)) * 2}
    tables["induction"][4, 4] = 0.9
    figure = figures.plot_head_scores(tables, range(12), title="heads")
    first, second = figure.axes[:2]
    np.testing.assert_array_equal(shown(first), tables["induction"])
    assert first.images[0].get_clim() == (0.0, 0.9)
    assert second.images[0].get_clim() == (0.0, 2.0)
    assert (first.get_title(), second.get_title()) == ("induction", "entropy")
    assert {ax.get_ylabel() for ax in figure.axes[2:]} == {"share of attention", "nats"}
    with pytest.raises(ValueError, match="at least one table"):
        figures.plot_head_scores({}, [])


def test_a_row_of_unequal_panels_hides_what_is_left():
    tables = {f"kind {i}": np.ones((3, 2)) for i in range(5)}
    figure = figures.plot_head_scores(tables, [0, 1, 2])
    assert sum(ax.get_visible() for ax in figure.axes[:8]) == 5


def test_results_draw_themselves(tmp_path):
    table = patterns(4, 5).astype("float32")
    found = AttentionPatterns((table, table), (1, 3), tuple("abcde"), tuple(range(5)))
    assert found.plot(3, 2).axes[0].get_title() == "head 3.2"
    assert len(found.plot(1).axes[0].texts) == 4
    assert len(found.plot().axes[0].get_yticks()) == 2
    found.plot(3, 2, save_path=tmp_path / "head")
    assert (tmp_path / "head.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="head 2 of which layer"):
        found.plot(head=2)
    values = np.random.default_rng(0).random((len(KINDS), 2, 4))
    values[list(KINDS).index("no_token")] = 0
    summary = HeadSummary(values, tuple(KINDS), (1, 3), (9,) * len(KINDS), 1, 10, "prompts")
    titles = [ax.get_title() for ax in summary.plot().axes if ax.images]
    assert "no token" not in titles and len(titles) == len(KINDS) - 1
    assert summary.rank("induction").plot().axes[0].get_title() == "induction"
    assert [ax.get_title() for ax in summary.plot("sink", "entropy").axes[:2]] == [
        "first token",
        "entropy",
    ]
