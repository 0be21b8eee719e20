"""Sweeps against one hooked forward pass per cell, on every family and every site it has."""

import functools
import itertools
import re

import numpy as np
import pytest
import torch

import edited_runs
import families
import patching_sweep as module_under_test
from forward_pass import ArchitectureError, InputError, LayerError, Site, SiteError
from logit_metrics import Metric
from model_architecture import Architecture
from patch_oracle import assert_untouched, hooked_logits, put, recorded, state_of
from patching_sweep import patching_sweep
from sweep_cells import DEFAULT_AXES, HEAD_SITES, STREAM_SITES

CLEAN = [7, 11, 15, 6, 49, 10, 13]
CORRUPTED = [7, 11, 30, 6, 49, 21, 13]
"""They differ at positions 2 and 5, so cells at 0 and 1 are known without a run."""
ANSWER, FOIL = 40, 12
TOKENS = {"answer": ANSWER, "foil": FOIL, "show_progress": False}


@pytest.fixture(params=[0.0, 1e12], ids=["suffixes", "whole"])
def overhead(request, monkeypatch):
    monkeypatch.setattr(edited_runs, "_overhead", lambda _architecture: request.param)
    return request.param


def difference(logits):
    return float(logits[0, -1, ANSWER].double() - logits[0, -1, FOIL].double())


@functools.lru_cache(maxsize=64)
def activation(model, ids, site):
    return recorded(model, ids, site)[0]


def hooked_cell(model, site, base, source, metric=difference, **cell):
    """Return a cell's number by one pass; ``cell``: position (None is all), head, neuron."""
    there = activation(model, tuple(source), site)
    if cell.get("position") is not None:
        there = there[cell["position"]]
    return metric(hooked_logits(model, base, [(site, put(there, **cell))]))


def cells_of(result):
    return [
        (dict(zip(result.axes, entry, strict=True)), value)
        for entry, value in zip(
            itertools.product(*result.labels), result.values.ravel().tolist(), strict=True
        )
    ]


def compare(model, result, site, base, source, metric=difference, step=1, first=0):
    """Compare every ``step``-th cell with its hooked pass, to 1e-5 of the logits' scale."""
    cells = cells_of(result)[first::step]
    for cell, value in cells:
        where = Site(site, cell["layer"])
        rest = {axis: entry for axis, entry in cell.items() if axis != "layer"}
        expected = hooked_cell(model, where, base, source, metric, **rest)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4), cell
    return len(cells)


# --- Every family, every site ---------------------------------------------------------------------


def test_layer_by_position(family, monkeypatch):
    """One direction and the other in turn, in suffixes and in whole passes in turn."""
    name, model = family
    turn = list(families.FAMILIES).index(name)
    direction = ("denoising", "noising")[turn % 2]
    monkeypatch.setattr(edited_runs, "_overhead", lambda _a: 1e12 * (turn % 4 > 1))
    base, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    architecture = Architecture(model)
    compared = 0
    for number, site in enumerate(STREAM_SITES):
        have = [i for i in range(architecture.n_layers) if not architecture.missing(Site(site, i))]
        if not have:
            with pytest.raises(SiteError):
                patching_sweep(model, None, CLEAN, CORRUPTED, site, **TOKENS)
            continue
        result = patching_sweep(model, None, CLEAN, CORRUPTED, site, direction=direction, **TOKENS)
        assert result.labels == (tuple(have), tuple(range(len(CLEAN))))
        compared += compare(model, result, site, base, source, step=5, first=number % 5)
        ends = (base, source) if direction == "noising" else (source, base)
        for logits, number_ in zip(ends, (result.clean, result.corrupted), strict=True):
            assert number_ == pytest.approx(difference(hooked_logits(model, logits, [])), abs=1e-4)
    assert compared


def test_layer_by_head_and_layer_by_neuron(family, monkeypatch):
    _, model = family
    monkeypatch.setattr(edited_runs, "_overhead", lambda _a: 0.0)
    architecture = Architecture(model)
    for number, site in enumerate((*HEAD_SITES, "mlp_neurons")):
        if architecture.missing(Site(site, 1)):
            continue
        found = architecture.structure[1]
        heads = found.n_kv_heads if site in ("key", "value") else found.n_heads
        result = patching_sweep(model, None, CLEAN, CORRUPTED, site, **TOKENS)
        assert result.axes == DEFAULT_AXES[site]
        assert len(result.labels[0]) == architecture.n_layers
        if site in HEAD_SITES:
            assert result.labels[1] == tuple(range(heads))
        step = 5 if site in HEAD_SITES else 31
        compare(model, result, site, CORRUPTED, CLEAN, step=step, first=number % 3)


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "falcon_new", "gemma2", "gpt_oss"])
def test_layer_by_position_by_head(name, monkeypatch):
    model = families.build(name)
    monkeypatch.setattr(edited_runs, "_overhead", lambda _a: 0.0)
    architecture = Architecture(model)
    for number, site in enumerate(HEAD_SITES):
        if architecture.missing(Site(site, 1)):
            continue
        result = patching_sweep(
            model, None, CLEAN, CORRUPTED, site, axes=("layer", "head", "position"),
            direction="noising", **TOKENS,
        )  # fmt: skip
        assert result.axes == ("layer", "position", "head")
        compare(model, result, site, CLEAN, CORRUPTED, step=19, first=7 + number)


@pytest.mark.parametrize("site", [*STREAM_SITES, *HEAD_SITES, "mlp_neurons"])
def test_every_cell_of_gpt2(site, overhead):
    """All axes that the site allows."""
    model = families.build("gpt2")
    axes = ("layer", "position", "head" if site in HEAD_SITES else "neuron")
    chosen = {} if site in HEAD_SITES else {"neurons": [0, 17, 31]}
    result = patching_sweep(model, None, CLEAN, CORRUPTED, site, axes=axes, **chosen, **TOKENS)
    compare(model, result, site, CORRUPTED, CLEAN, step=2, first=int(overhead > 0))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "phi"])
def test_float64_agrees_to_the_last_digits(name):
    """What is left in float32 is rounding: in double the two ways agree to 1e-9."""
    model = families.build(name).double()
    for site in ("resid_pre", "resid_post", "head_out", "value"):
        result = patching_sweep(model, None, CLEAN, CORRUPTED, site, **TOKENS)
        for cell, value in cells_of(result)[::3]:
            rest = {axis: entry for axis, entry in cell.items() if axis != "layer"}
            expected = hooked_cell(model, Site(site, cell["layer"]), CORRUPTED, CLEAN, **rest)
            assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("positions", [None, "last", [2, -1]])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "mamba"])
def test_layers_alone_exchange_all_positions_asked_for_at_once(name, positions, overhead):
    model = families.build(name)
    result = patching_sweep(
        model, None, CLEAN, CORRUPTED, "resid_post", axes=("layer",), positions=positions, **TOKENS
    )
    assert result.values[-1] == pytest.approx(result.clean, abs=1e-4)
    places = range(7) if positions is None else [6] if positions == "last" else [2, 6]
    for layer in (0, 1):
        site = Site("resid_post", layer)
        there = activation(model, tuple(CLEAN), site)

        def change(shown, there=there):
            new = shown.clone()
            for place in places:
                new[0, place] = there[place]
            return new

        expected = difference(hooked_logits(model, CORRUPTED, [(site, change)]))
        assert result.values[layer] == pytest.approx(expected, rel=1e-5, abs=1e-4)


# --- What needs no run ----------------------------------------------------------------------------


def test_cells_whose_number_is_known_are_not_run(monkeypatch):
    model = families.build("llama")
    asked = []
    real = module_under_test.run_edited

    def count(arch, base, runs, *rest, **kwargs):
        asked.extend(runs)
        return real(arch, base, runs, *rest, **kwargs)

    monkeypatch.setattr(module_under_test, "run_edited", count)
    result = patching_sweep(model, None, CLEAN, CORRUPTED, "resid_post", **TOKENS)
    assert (result.values[:, :2] == result.corrupted).all()  # the tokens before are the same
    assert (result.values[-1, :-1] == result.corrupted).all()  # nothing reads them any more
    assert result.values[-1, -1] == result.clean  # everything that is read
    places = {(run.edits[0].site.layer, run.edits[0].position) for run in asked}
    assert places == {(layer, p) for layer in (0, 1) for p in (2, 3, 4, 5, 6)}
    asked.clear()
    same = patching_sweep(model, None, CLEAN, CLEAN, "attn_out", **TOKENS)
    assert not asked
    assert same.passes == 0
    assert (same.values == same.clean).all()


def test_a_metric_that_reads_all_positions(overhead):
    """Then the last layer's other positions are read, and the end of the stream is not all."""
    model = families.build("llama")

    def mean_difference(logits):
        return (logits[0, :, ANSWER].double() - logits[0, :, FOIL].double()).mean()

    for site in ("resid_pre", "resid_post", "attn_out", "key"):
        result = patching_sweep(
            model, None, CLEAN, CORRUPTED, site, axes=("layer", "position"), metric=mean_difference,
            show_progress=False,
        )  # fmt: skip
        compare(model, result, site, CORRUPTED, CLEAN, lambda z: float(mean_difference(z)))
        assert result.metric == "mean_difference"


def test_a_metric_that_reads_an_early_position(overhead):
    model = families.build("llama")
    metric = Metric("early", "logits", lambda z: z[:, 0, ANSWER] + 2 * z[:, 1, FOIL], read=(3, -1))
    result = patching_sweep(
        model, None, CLEAN, CORRUPTED, "mlp_out", metric=metric, show_progress=False
    )
    compare(
        model, result, "mlp_out", CORRUPTED, CLEAN,
        lambda z: float(z[0, 3, ANSWER] + 2 * z[0, -1, FOIL]),
    )  # fmt: skip
    only = Metric("first", "", lambda z: z[:, 0, ANSWER], read=(0,))
    early = patching_sweep(model, None, CLEAN, CORRUPTED, metric=only, show_progress=False)
    assert (early.values == early.corrupted).all()


# --- Metrics, directions, normalization -----------------------------------------------------------


def probabilities(logits):
    z = logits[0, -1].double().numpy()
    z = np.exp(z - z.max())
    return z / z.sum()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("metric", ["logit", "log_prob", "prob", "rank", "kl", "distance"])
def test_every_metric(metric, direction):
    model = families.build("gpt2")
    clean, corrupted = (hooked_logits(model, ids, []) for ids in (CLEAN, CORRUPTED))
    base, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    start, end = (corrupted, clean) if direction == "denoising" else (clean, corrupted)

    def by_hand(logits):
        p, q = probabilities(clean), probabilities(logits)
        z = logits[0, -1].double().numpy()
        apart = np.sqrt(((start[0, -1] - end[0, -1]).double().numpy() ** 2).sum())
        return {
            "logit": z[ANSWER],
            "log_prob": np.log(q[ANSWER]),
            "prob": q[ANSWER],
            "rank": (z > z[ANSWER]).sum(),
            "kl": (p * np.log(p / q)).sum(),
            "distance": np.sqrt(((z - start[0, -1].double().numpy()) ** 2).sum()) / apart,
        }[metric]

    result = patching_sweep(
        model, None, CLEAN, CORRUPTED, "resid_post", metric=metric, direction=direction,
        answer=None if metric in ("kl", "distance") else ANSWER, show_progress=False,
    )  # fmt: skip
    compare(model, result, "resid_post", base, source, by_hand)
    assert result.clean == pytest.approx(by_hand(clean), rel=1e-5, abs=1e-5)
    assert result.corrupted == pytest.approx(by_hand(corrupted), rel=1e-5, abs=1e-5)
    normalized = patching_sweep(
        model, None, CLEAN, CORRUPTED, "resid_post", metric=metric, direction=direction,
        answer=None if metric in ("kl", "distance") else ANSWER, normalize=True,
        show_progress=False,
    )  # fmt: skip
    expected = (result.values - result.corrupted) / (result.clean - result.corrupted)
    np.testing.assert_allclose(normalized.values, expected, rtol=1e-12)
    assert normalized.values[-1, -1] == (1.0 if direction == "denoising" else 0.0)
    # whatever the metric, the unpatched run is the one from which `top` counts
    start_value = result.corrupted if direction == "denoising" else result.clean
    changes = np.abs(result.values - start_value)
    assert result.top(1)["value"][0] == result.values.ravel()[changes.argmax()]
    assert normalized.top(1)[["layer", "position"]].equals(result.top(1)[["layer", "position"]])


def test_answer_and_foil_are_by_default_what_the_two_runs_say():
    model, tokenizer = families.build("gpt2"), families.tiny_tokenizer()
    other = [7, 11, 15, 6, 49, 10, 40]
    clean, corrupted = (hooked_logits(model, ids, []) for ids in (CLEAN, other))
    answer, foil = int(clean[0, -1].argmax()), int(corrupted[0, -1].argmax())
    assert answer != foil
    result = patching_sweep(model, tokenizer, CLEAN, other, show_progress=False)
    assert result.clean == pytest.approx(float(clean[0, -1, answer] - clean[0, -1, foil]), abs=1e-5)
    assert (result.answer, result.foil) == tuple(tokenizer.decode([i]) for i in (answer, foil))


# --- Prompts that correspond in part --------------------------------------------------------------


LONGER = [3, 9, *CORRUPTED]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_prompts_of_unequal_length(direction, overhead):
    """They correspond from their end, or as a mapping says, whichever of them is edited."""
    model = families.build("llama")
    base, source = (LONGER, CLEAN) if direction == "denoising" else (CLEAN, LONGER)
    shift = len(source) - len(base)
    for align, mapping in (
        ("end", {p: p + shift for p in range(len(base)) if p + shift >= 0}),
        ({-1: 0, 3: -2}, {len(base) - 1: 0, 3: len(source) - 2}),
    ):
        for site in ("resid_pre", "resid_post", "value"):
            result = patching_sweep(
                model, None, CLEAN, LONGER, site, axes=("layer", "position"), direction=direction,
                align=align, **TOKENS,
            )  # fmt: skip
            assert result.labels[1] == tuple(sorted(mapping))
            assert len(result.tokens) == len(base)
            assert len(result.source_tokens) == len(source)
            for cell, value in cells_of(result)[::2]:
                where = Site(site, cell["layer"])
                there = recorded(model, source, where)[0][mapping[cell["position"]]]
                change = put(there, cell["position"])
                expected = difference(hooked_logits(model, base, [(where, change)]))
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_prompts_of_unequal_length_are_refused_with_both_token_lists():
    model, tokenizer = families.build("gpt2"), families.tiny_tokenizer()
    message = re.escape(
        "the prompts have 6 and 4 tokens, so their positions do not correspond: "
        "['t', 'he', ' m', 'at', ' sat', ' on'] and ['t', 'he', ' cat', ' sat']. "
        "Write them with as many tokens each, or pass align='end'"
    )
    with pytest.raises(InputError, match=message):
        patching_sweep(model, tokenizer, "the cat sat", "the mat sat on", show_progress=False)


def test_a_metric_that_writes_into_its_logits_changes_no_run():
    """What lies before the first edit is taken from the base run's logits."""
    model = families.build("gpt2")

    def tidy(logits):
        return logits[0, 0, 7] - logits[0, -1, 9]

    def untidy(logits):
        value = tidy(logits).clone()
        logits.fill_(100.0)
        return value

    def all_rows(logits):
        return torch.stack([untidy(run[None]) for run in logits])

    plain, written, made = (
        patching_sweep(model, None, CLEAN, CORRUPTED, metric=metric, show_progress=False)
        for metric in (tidy, untidy, Metric("untidy", "", all_rows, None))
    )
    for each in (written, made):
        np.testing.assert_array_equal(each.values, plain.values)
        assert (each.clean, each.corrupted) == (plain.clean, plain.corrupted)


# --- Several pairs --------------------------------------------------------------------------------


def many(count, seed=0):
    clean = families.token_ids(count, 6, seed=seed)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 7) % 90 + 4
    return clean.tolist(), corrupted.tolist()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mixtral", "mamba"])
def test_several_pairs_are_the_mean_of_their_own_sweeps(name, normalize, overhead):
    model = families.build(name)
    clean, corrupted = many(3)
    answers, foils = [40, 41, 42], [10, 11, 12]
    options = {"show_progress": False, "layers": [0, -1]}
    result = patching_sweep(
        model, None, clean, corrupted, answer=answers, foil=foils, normalize=normalize, **options
    )
    singles = [
        patching_sweep(
            model, None, clean[i], corrupted[i], answer=answers[i], foil=foils[i], **options
        )
        for i in range(3)
    ]
    values = np.stack([each.values for each in singles])
    starts = np.array([each.corrupted for each in singles])
    ends = np.array([each.clean for each in singles])
    mean = values.mean(0)
    if normalize:
        mean = (mean - starts.mean()) / (ends.mean() - starts.mean())
    else:
        errors = np.sqrt(((values - mean) ** 2).sum(0) / 2 / 3)
        np.testing.assert_allclose(result.stderr, errors, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.values, mean, rtol=1e-4, atol=1e-4)
    assert result.count == 3
    assert result.tokens == ()
    assert (result.low <= result.values + 1e-9).all()
    assert (result.values <= result.high + 1e-9).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_errors_and_intervals_over_pairs(normalize):
    """Resampling written out with loops, and the delta method for a ratio of means."""
    model = families.build("gpt2")
    clean, corrupted = many(5)
    options = {"answer": ANSWER, "foil": FOIL, "show_progress": False, "layers": [1]}
    result = patching_sweep(model, None, clean, corrupted, normalize=normalize, seed=3, **options)
    singles = [
        patching_sweep(model, None, c, d, **options) for c, d in zip(clean, corrupted, strict=True)
    ]
    values = np.stack([each.values[0] for each in singles])
    starts = np.array([each.corrupted for each in singles])
    ends = np.array([each.clean for each in singles])

    def statistic(chosen):
        mean = values[chosen].mean(0)
        if not normalize:
            return mean
        low, high = starts[chosen].mean(), ends[chosen].mean()
        return (mean - low) / (high - low)

    rng = np.random.default_rng(99)
    resampled = [statistic(rng.integers(0, 5, 5)) for _ in range(4000)]
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    width = high - low
    np.testing.assert_allclose(result.low[0], low, atol=0.15 * width.max() + 1e-6)
    np.testing.assert_allclose(result.high[0], high, atol=0.15 * width.max() + 1e-6)
    # the error of a ratio of means, by moving each pair's weight a little (infinitesimal jackknife)
    whole = statistic(np.arange(5))
    influence = []
    for i in range(5):
        weights = np.full(5, 1 / 5)
        weights[i] += 1e-6
        mean = weights @ values / weights.sum()
        if normalize:
            a, b = weights @ starts / weights.sum(), weights @ ends / weights.sum()
            mean = (mean - a) / (b - a)
        influence.append((mean - whole) / 1e-6)
    errors = np.sqrt((np.array(influence) ** 2).sum(0) / 5 / 4)
    np.testing.assert_allclose(result.stderr[0], errors, rtol=1e-3, atol=1e-6)


def test_pairs_of_different_length_and_groups(monkeypatch, overhead):
    """They are run by shape; the order of the pairs does not matter."""
    model = families.build("llama")
    clean, corrupted = many(4)
    clean[1], corrupted[1] = clean[1][:4], corrupted[1][:4]
    clean[3], corrupted[3] = [9, *clean[3]], [9, *corrupted[3]]
    options = {"axes": ("layer", "head"), "site": "head_out", **TOKENS}
    whole = patching_sweep(model, None, clean, corrupted, **options)
    backwards = patching_sweep(model, None, clean[::-1], corrupted[::-1], **options)
    np.testing.assert_allclose(whole.values, backwards.values, rtol=1e-5, atol=1e-5)
    singles = [
        patching_sweep(model, None, c, d, **options).values
        for c, d in zip(clean, corrupted, strict=True)
    ]
    np.testing.assert_allclose(whole.values, np.mean(singles, 0), rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(module_under_test, "BASE_TOKENS", 7)  # one pair at a time
    again = patching_sweep(model, None, clean, corrupted, **options)
    np.testing.assert_allclose(whole.values, again.values, rtol=1e-5, atol=1e-4)
    small = patching_sweep(model, None, clean, corrupted, max_tokens=8, **options)
    np.testing.assert_allclose(whole.values, small.values, rtol=1e-5, atol=1e-4)
    assert small.passes > whole.passes


# --- Axes and labels ------------------------------------------------------------------------------


def test_chosen_layers_heads_positions_and_neurons_keep_their_order():
    model = families.build("llama")
    whole = patching_sweep(
        model, None, CLEAN, CORRUPTED, "head_out", axes=("layer", "head", "position"), **TOKENS
    )
    some = patching_sweep(
        model, None, CLEAN, CORRUPTED, "head_out", axes=("head", "position", "layer"),
        layers=["model.layers.2", 0, -1], heads=[3, -4], positions=[-1, 2], **TOKENS,
    )  # fmt: skip
    assert some.axes == ("layer", "position", "head")
    assert some.labels == ((2, 0), (6, 2), (3, 0))
    expected = whole.values[np.ix_([2, 0], [6, 2], [3, 0])]
    np.testing.assert_allclose(some.values, expected, rtol=1e-5, atol=1e-4)
    neurons = patching_sweep(
        model, None, CLEAN, CORRUPTED, "mlp_neurons", layers="1", neurons=[47, 3], **TOKENS
    )
    assert neurons.labels == ((1,), (47, 3))
    compare(model, neurons, "mlp_neurons", CORRUPTED, CLEAN)
    for heads in (1, np.int64(1), np.array([1]), torch.tensor([-1])):
        one = patching_sweep(model, None, CLEAN, CORRUPTED, "key", layers=1, heads=heads, **TOKENS)
        assert one.labels == ((1,), (1,))


def test_text_prompts_and_an_architecture_instead_of_a_model():
    model, tokenizer = families.build("gpt2"), families.tiny_tokenizer()
    texts = ("a cat sat on a cat", "a cat sat on the cat")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    by_text = patching_sweep(model, tokenizer, *texts, metric="kl", show_progress=False)
    by_ids = patching_sweep(
        Architecture(model), None, torch.tensor(ids[0]), np.array(ids[1]), metric="kl",
        show_progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(by_text.values, by_ids.values)
    assert by_text.tokens == tuple(tokenizer.decode([i]) for i in ids[1])
    assert by_ids.tokens[0] == f"<{ids[1][0]}>"


# --- Refused, and left as it was ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"site": "embed"}, SiteError, "exchanges one of resid_pre.*'embed'"),
        ({"direction": "back"}, InputError, "'denoising' or 'noising'; came 'back'"),
        ({"metric": "loss"}, InputError, "no metric 'loss'; metrics are logit_diff"),
        ({"metric": 3}, InputError, "a metric is a name"),
        ({"axes": ("position",)}, InputError, r"'layer' and any of \['neuron', 'position'\]"),
        ({"axes": ("layer", "head")}, InputError, "axes of a sweep over 'resid_pre'"),
        ({"axes": ("layer", "layer")}, InputError, "axes of a sweep"),
        ({"site": "key", "axes": ("layer", "neuron")}, InputError, r"\['head', 'position'\]"),
        ({"site": "key", "heads": [2]}, InputError, r"head 2 is out of range: valid are 0\.\.1"),
        ({"site": "key", "heads": []}, InputError, "heads is empty"),
        ({"site": "key", "heads": [True]}, InputError, r"heads are whole .* 0\.\.1.*\[True\]"),
        ({"site": "key", "heads": [1.9]}, InputError, r"heads=\[0, 1\]; came \[1\.9\]"),
        ({"site": "key", "heads": "1"}, InputError, "heads are whole numbers"),
        ({"site": "mlp_neurons", "neurons": [1.9]}, InputError, "neurons are whole numbers"),
        ({"site": "mlp_neurons", "neurons": True}, InputError, "neurons are whole.*came True"),
        (
            {"heads": [1]},
            InputError,
            r"heads=\[1\] was given, and 'resid_pre' has no heads.*head_out",
        ),
        ({"site": "key", "neurons": [1]}, InputError, "'key' has no neurons.*mlp_neurons"),
        ({"neurons": [1]}, InputError, r"\['layer', 'position'\] have no 'neuron'.*give axes="),
        (
            {"site": "key", "axes": ("layer", "position"), "heads": [1]},
            InputError,
            r"have no 'head': leave it out, or give axes=\['layer', 'position', 'head'\]",
        ),
        ({"metric": "kl", "foil": None}, InputError, "answer=.* was given, and the metric 'kl'"),
        (
            {"metric": "prob"},
            InputError,
            "foil=.* was given, and the metric 'prob' compares no two",
        ),
        (
            {"metric": Metric("m", "", lambda z: z[:, 0, 0], (9,)), "answer": None, "foil": None},
            InputError,
            "position 9 is out of range: the prompt has 7 tokens",
        ),
        (
            {"site": "mlp_neurons", "neurons": [-49]},
            InputError,
            r"neuron -49 is out of range: valid are 0\.\.47",
        ),
        ({"layers": [3]}, LayerError, "layer 3 is out of range"),
        ({"layers": []}, SiteError, "layers is empty"),
        ({"positions": 7}, InputError, "position 7 is out of range"),
        ({"answer": 99}, InputError, "token id 99 is outside"),
        ({"answer": " cat"}, InputError, "needs a tokenizer"),
        ({"answer": 12}, InputError, "answer and foil are both '<12>'"),
        ({"answer": [1, 2]}, InputError, "2 tokens for 1 pairs"),
        ({"align": "start"}, InputError, "align is None, 'end' or a mapping"),
        ({"align": {1: 2}, "positions": 3}, InputError, r"\[3\] have no counterpart"),
        ({"align": {1: 9}}, InputError, "position 9 is out of range"),
        ({"align": {3: 1}, "site": "attn_pattern"}, InputError, "patterns of other positions"),
    ],
)
def test_refused(options, error, message):
    model = families.build("llama")
    with pytest.raises(error, match=message):
        patching_sweep(model, None, CLEAN, CORRUPTED, **(TOKENS | options))


@pytest.mark.parametrize(
    ("clean", "corrupted", "options", "message"),
    [
        ([CLEAN, CLEAN], [CORRUPTED], {}, r"two lists of one length"),
        ([CLEAN], CORRUPTED, {}, "come in pairs"),
        ([CLEAN, CLEAN[:4]], [CORRUPTED, CORRUPTED[:4]], {}, "differ in length, so a position"),
        (CLEAN, [*CORRUPTED, 100], {}, "token id 100"),
        (CLEAN, [], {}, "empty list"),
        (
            CLEAN,
            CORRUPTED[1:],
            {"align": "end", "site": "attn_pattern"},
            "prompts with different",
        ),
        (CLEAN, CLEAN, {"normalize": True}, r"same metric.*nothing can be normalized"),
    ],
)
def test_prompts_that_are_refused(clean, corrupted, options, message):
    model = families.build("llama")
    with pytest.raises(InputError, match=message):
        patching_sweep(model, None, clean, corrupted, **(TOKENS | options))


def test_both_runs_saying_the_same_is_told():
    model = families.build("llama")
    with pytest.raises(InputError, match=r"both prompts predict it\. Say which tokens"):
        patching_sweep(model, None, CLEAN, CLEAN, show_progress=False)


def test_a_model_without_head_is_refused():
    with pytest.raises(ArchitectureError, match="patching needs the language-model head"):
        patching_sweep(families.build("llama").model, None, CLEAN, CORRUPTED)


def test_the_model_is_as_it_was(family):
    _, model = family
    edited_runs.abilities(Architecture(model))
    before = state_of(model)
    patching_sweep(model, None, CLEAN, CORRUPTED, **TOKENS)

    def fail(_logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patching_sweep(model, None, CLEAN, CORRUPTED, metric=fail)
    with pytest.raises(InputError, match="must return one number"):
        patching_sweep(model, None, CLEAN, CORRUPTED, metric=lambda z: z[0, -1])
    assert_untouched(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_cell_of_every_family(family, direction, overhead):
    _, model = family
    architecture = Architecture(model)
    base, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    for site in (*STREAM_SITES, *HEAD_SITES, "mlp_neurons"):
        if architecture.missing(Site(site, 1)):
            continue
        result = patching_sweep(model, None, CLEAN, CORRUPTED, site, direction=direction, **TOKENS)
        compare(model, result, site, base, source)
