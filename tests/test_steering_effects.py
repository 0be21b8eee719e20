"""What a sweep says of its numbers: effects, errors and perplexities by hand, and its file."""

import dataclasses

import numpy as np
import pytest

from forward_pass import InputError, RecordFileError
from steering_effects import SteeringCell, SteeringSweep, WordBalance

N = 40
COEFFICIENTS = (-1.0, 0.0, 2.0)


def made(scores=None, nats=None, weights=None, layers=(3, 6), n=N):
    """A sweep of two layers and three coefficients; layer 3 breaks the text, layer 6 does not."""
    shape = (len(layers), len(COEFFICIENTS), n)
    rng = np.random.default_rng(0)
    if scores is None:
        scores = np.broadcast_to([[[0.0], [0.5], [1.0]], [[0.3], [0.5], [0.9]]], shape)
        scores = scores[: len(layers)]
    cost = np.broadcast_to([[[30.0], [10.0], [50.0]], [[12.0], [10.0], [14.0]]], shape)
    texts = np.empty(shape, dtype=object)
    for place in np.ndindex(shape):
        texts[place] = f" text {place}"
    return SteeringSweep(
        layers=layers,
        coefficients=COEFFICIENTS,
        prompts=tuple(f"prompt {i}" for i in range(n)),
        scores=np.array(scores, dtype=float),
        weights=rng.integers(1, 5, shape).astype(float) if weights is None else weights,
        nats=np.array(cost if nats is None else nats, dtype=float),
        n_tokens=np.full(shape, 10),
        texts=texts,
        effect_name="share",
    )


# --- Measures -------------------------------------------------------------------------------------


def test_words_are_counted_whole_and_in_any_case():
    words = WordBalance.of(["Happy", "good"], ["sad", "Élan"])
    text = "HAPPY, goodness! Good sadly sad; unhappy. good élan 'happy'"
    assert words.count(text) == (4, 2)
    assert words.measure(text) == (pytest.approx(4 / 6), 6)
    share, weight = words.measure("nothing")
    assert np.isnan(share)
    assert weight == 0


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([], ["sad"]), "positive_words holds single words .* came none"),
        ((["happy"], []), "negative_words holds single words"),
        ((["very happy"], ["sad"]), "came 'very happy'"),
        ((["happy"], ["sad", ""]), "came ''"),
        ((["happy", "Sad"], ["sad"]), "'sad' is in positive_words and in negative_words"),
    ],
)
def test_word_lists_that_measure_nothing_are_refused(lists, message):
    with pytest.raises(InputError, match=message):
        WordBalance.of(*lists)


def test_the_effect_is_the_share_of_all_words_counted():
    """Not the mean of the texts' shares: a text that says little counts little."""
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 4, (2, 2, 3, N))
    counted = positive + negative
    with np.errstate(invalid="ignore"):
        sweep = made(scores=positive / counted, weights=counted.astype(float))
    np.testing.assert_allclose(sweep.effect, positive.sum(-1) / counted.sum(-1))


def test_the_standard_error_is_that_of_a_bootstrap():
    rng = np.random.default_rng(2)
    shape = (2, 3, 200)
    weights, scores = rng.integers(0, 6, shape).astype(float), rng.random(shape)
    scores[weights == 0] = np.nan
    sweep = made(scores=scores, weights=weights, nats=np.ones(shape), n=200)
    chosen = rng.integers(0, 200, (4000, 200))
    w, s = weights[1, 2][chosen], np.nan_to_num(scores[1, 2])[chosen]
    spread = ((w * s).sum(1) / w.sum(1)).std()
    assert sweep.standard_error[1, 2] == pytest.approx(spread, rel=0.1)
    even = made(weights=np.ones((2, 3, N)), scores=rng.random((2, 3, N)))
    np.testing.assert_allclose(even.standard_error, even.scores.std(-1) / np.sqrt(N))


def test_nothing_counted_is_no_effect():
    weights = np.ones((2, 3, N))
    weights[0, 0] = 0
    scores = np.full((2, 3, N), 0.5)
    scores[0, 0] = np.nan
    sweep = made(scores=scores, weights=weights)
    assert np.isnan(sweep.effect[0, 0])
    assert np.isnan(sweep.standard_error[0, 0])
    assert np.isfinite(sweep.effect).sum() == 5


def test_perplexity_is_over_tokens_not_over_texts():
    sweep = made()
    nats, tokens = np.array(sweep.nats), np.array(sweep.n_tokens)
    nats[0, 0, 0], tokens[0, 0, 0] = 5.0, 1
    sweep = dataclasses.replace(sweep, nats=nats, n_tokens=tokens)
    expected = np.exp((5 + 30 * (N - 1)) / (1 + 10 * (N - 1)))
    assert sweep.perplexity[0, 0] == pytest.approx(expected)
    assert sweep.perplexity[1, 2] == pytest.approx(np.exp(1.4))


# --- Finding a cell -------------------------------------------------------------------------------


def test_the_best_cell_is_fluent():
    sweep = made()
    base = np.exp(1.0)
    assert sweep.unsteered == (pytest.approx(0.5), pytest.approx(base))
    expected = (6, 2.0, pytest.approx(0.9), pytest.approx(np.exp(1.4)))
    assert tuple(sweep.best()) == expected
    assert sweep.best(high=False)[:2] == (6, -1.0)
    assert sweep.best(fluent=1e3)[:2] == (3, 2.0)
    assert sweep.best(fluent=1e3, high=False)[:2] == (3, -1.0)
    assert sweep.best_layer() == 6
    assert sweep.best_layer(fluent=1e3) == 3
    assert isinstance(sweep.cell(3, 0.0), SteeringCell)


@pytest.mark.parametrize(("fluent", "found"), [(1.2214, False), (1.2215, True)])
def test_the_limit_of_fluency_is_where_it_says(fluent, found):
    """The most fluent steered cell has e^1.2 against e^1: 1.22140… times as much."""
    sweep = made()
    if found:
        assert sweep.best(fluent)[:2] == (6, -1.0)
    else:
        with pytest.raises(InputError, match=r"at most 1\.2214 times the unsteered 2\.72"):
            sweep.best(fluent)


def test_of_equal_effects_the_more_fluent_wins():
    scores = np.full((2, 3, N), 0.5)
    scores[:, 2] = 1.0
    assert made(scores=scores).best(fluent=1e3)[:2] == (6, 2.0)
    assert made(scores=scores).best_layer(fluent=1e3) == 6


def test_a_cell_without_effect_is_never_the_best():
    scores = np.array(made().scores)
    scores[1] = np.nan
    sweep = made(scores=scores, weights=np.isfinite(scores).astype(float))
    assert sweep.best(fluent=1e3).layer == 3


def test_samples_are_prompt_and_continuation():
    sweep = made()
    assert sweep.samples(6, 2)[1] == "prompt 1 text (1, 2, 1)"
    for layer, coefficient in ((4, 2), (6, 1)):
        with pytest.raises(InputError, match=r"was not tried: layers are \[3, 6\]"):
            sweep.samples(layer, coefficient)
        with pytest.raises(InputError, match="was not tried"):
            sweep.cell(layer, coefficient)


# --- Out ------------------------------------------------------------------------------------------


def test_the_frame_is_tidy():
    sweep = made()
    frame = sweep.to_frame()
    assert len(frame) == 2 * 3 * N
    row = frame[(frame.layer == 6) & (frame.coefficient == 2.0) & (frame["sample"] == 4)].iloc[0]
    assert (row.prompt, row.continuation) == ("prompt 4", " text (1, 2, 4)")
    assert (row.score, row.nats, row.n_tokens) == (0.9, 14.0, 10)
    by_cell = frame.assign(hit=frame.score * frame.weight).groupby(["layer", "coefficient"])
    effect = by_cell.hit.sum() / by_cell.weight.sum()
    np.testing.assert_allclose(effect.to_numpy(), sweep.effect.ravel())


def test_text_and_repr_are_short():
    sweep = made()
    lines = sweep.to_text().splitlines()
    assert lines[1].split() == ["layer", "-1", "+0", "+2"]
    assert lines[3].split()[:3] == ["6", "0.300", "(3.32)"]
    assert repr(sweep) == "SteeringSweep('share', 2 layers × 3 coefficients, 40 continuations each)"


def test_it_can_be_drawn():
    figure = made().plot(title="x")
    assert figure.axes[0].get_title() == "share"
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["3", "6"]


def test_everything_survives_the_file(tmp_path):
    before = made()
    before.save(tmp_path / "new" / "sweep.safetensors")
    after = SteeringSweep.load(tmp_path / "new" / "sweep.safetensors")
    for field in dataclasses.fields(SteeringSweep):
        one, other = getattr(before, field.name), getattr(after, field.name)
        assert type(one) is type(other)
        same = np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        assert same, field.name
    (tmp_path / "junk").write_bytes(b"no such file, this is, not at all")
    with pytest.raises(RecordFileError, match="steering sweep"):
        SteeringSweep.load(tmp_path / "junk")


def test_tables_that_do_not_fit_are_refused():
    sweep = made()
    with pytest.raises(InputError, match=r"nats must be \[layer, coefficient, sample\]"):
        dataclasses.replace(sweep, nats=sweep.nats[:, :2])
    with pytest.raises(InputError, match="must ascend and hold 0"):
        dataclasses.replace(sweep, coefficients=(1.0, 0.0, 2.0))
    with pytest.raises(InputError, match="must ascend and hold 0"):
        dataclasses.replace(sweep, coefficients=(-1.0, 0.5, 2.0))
