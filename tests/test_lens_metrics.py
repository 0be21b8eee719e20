"""Every metric against its formula, written again in float64 with numpy and scipy."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import distance

import lens_metrics
from forward_pass import InputError
from lens_metrics import (
    DEFAULT_METRICS,
    METRICS,
    RowMeter,
    best_tokens,
    check_metrics,
    js_divergence,
    rank_of,
    total_variation,
)

VOCAB = 700
COUNT = 7
FOLLOWING = [3, 600, -1, 0, 699, 5, -1]


def random_logits(seed, count=COUNT, vocab=VOCAB, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, vocab, generator=generator) + offset


def softmax(logits):
    return scipy.special.softmax(logits.double().numpy(), axis=1)


def by_hand(reference, logits, following=FOLLOWING):
    """Every metric of one row, ``[position]`` each."""
    p, q, z = softmax(reference), softmax(logits), logits.double().numpy()
    best = p.argmax(1)
    rows = np.arange(len(p))
    order = (-z).argsort(1).argsort(1)
    known = np.array(following) >= 0
    share = np.where(known, q[rows, following], np.nan)
    return {
        "kl_divergence": scipy.stats.entropy(p, q, axis=1),
        "top1_match": best == q.argmax(1),
        "top1_rank": order[rows, best],
        "top1_logit": z.max(1),
        "entropy": scipy.stats.entropy(q, axis=1),
        "cross_entropy": -np.log(share),
        "next_token_prob": share,
        "next_token_rank": np.where(known, order[rows, following], np.nan),
        "js_divergence": distance.jensenshannon(p, q, axis=1) ** 2,
        "total_variation": [0.5 * np.abs(a - b).sum() for a, b in zip(p, q, strict=True)],
    }


def measure(reference, rows, names=METRICS, top_k=4, target=None, size=COUNT, following=FOLLOWING):
    """A meter that has seen the rows, in chunks of ``size`` positions."""
    count = len(reference)
    meter = RowMeter(len(rows), count, top_k, names, target)
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        meter.start_chunk(chunk, reference[chunk], torch.tensor(following[chunk]))
        for index, logits in enumerate(rows):
            meter.add(index, logits[chunk], is_reference=logits is reference)
    return meter


# --- Formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_is_its_formula(name):
    reference, near, far = (
        random_logits(0),
        random_logits(0) + 0.1 * random_logits(1),
        random_logits(2),
    )
    found = measure(reference, [near, far]).metrics[name]
    assert found.dtype == np.float32
    for row, logits in zip(found, [near, far], strict=True):
        np.testing.assert_allclose(row, by_hand(reference, logits)[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["kl_divergence", "entropy", "cross_entropy", "js_divergence"])
def test_logits_far_from_zero_cost_no_precision(name):
    """GPT-2's logits lie around −100; a small KL must not drown in their rounding."""
    reference = random_logits(0, offset=-128.0)
    near = reference + 0.0625 * torch.round(random_logits(1))
    found = measure(reference, [near]).metrics[name][0]
    np.testing.assert_allclose(found, by_hand(reference, near)[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
def test_large_logits_neither_overflow_nor_vanish(offset):
    logits = random_logits(3, offset=offset)
    meter = measure(random_logits(4), [logits])
    assert all(np.isfinite(table[:, [0, 1, 3]]).all() for table in meter.metrics.values())
    np.testing.assert_allclose(
        meter.metrics["entropy"][0], by_hand(logits, logits)["entropy"], 1e-4
    )


def test_the_reference_has_no_distance_to_itself():
    reference = random_logits(5)
    metrics = measure(reference, [random_logits(6), reference]).metrics
    for name in ("kl_divergence", "js_divergence", "total_variation"):
        assert (metrics[name][1] == 0).all()
        assert (metrics[name][0] > 0.01).all()
    assert (metrics["top1_match"][1] == 1).all()
    assert (metrics["top1_rank"][1] == 0).all()


def test_kl_is_not_symmetric_and_has_the_final_distribution_first():
    p, q = random_logits(0), random_logits(1)
    forth, back = measure(p, [q]).metrics["kl_divergence"], measure(q, [p]).metrics["kl_divergence"]
    assert (abs(forth - back) > 1e-2).all()
    np.testing.assert_allclose(back[0], by_hand(q, p)["kl_divergence"], rtol=2e-5)


def test_divergences_of_disjoint_distributions_are_their_maxima():
    p, q = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.25, 0.75]])
    assert float(js_divergence(p, q)) == pytest.approx(np.log(2), abs=1e-7)
    assert float(total_variation(p, q)) == 1.0


@pytest.mark.parametrize("formula", [js_divergence, total_variation])
def test_symmetric_distances_are_symmetric_and_vanish_only_at_equality(formula):
    p, q = (torch.from_numpy(softmax(random_logits(seed))) for seed in (0, 1))
    torch.testing.assert_close(formula(p, q), formula(q, p))
    assert (formula(p, p) == 0).all()
    assert (formula(p, q) > 0).all()


# --- Ranks and best tokens ------------------------------------------------------------------------


def test_rank_counts_strictly_larger_logits():
    logits = torch.tensor([[2.0, 5.0, 2.0, 1.0, 5.0]] * 5)
    assert rank_of(logits, torch.arange(5)).tolist() == [2, 0, 2, 4, 0]


def test_logits_that_differ_in_the_last_bit_have_different_ranks():
    """Taking the largest logit away first would round them together."""
    low = torch.tensor(0.1)
    high = torch.nextafter(low, torch.tensor(1.0))
    logits = torch.stack([torch.tensor(100.0), high, low])[None]
    meter = measure(logits, [logits], ("next_token_rank",), 1, target=2, following=[2])
    assert meter.metrics["next_token_rank"] == 2
    assert meter.metrics["target_rank"] == 2


def test_a_tie_for_the_best_token_is_a_match():
    reference = torch.tensor([[0.0, 3.0, 1.0]])
    tied = torch.tensor([[2.0, 2.0, 1.0]])
    metrics = measure(reference, [tied], following=[-1], top_k=1).metrics
    assert metrics["top1_match"] == 1
    assert metrics["top1_rank"] == 0


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 3000),
    st.integers(0, 10**6),
    st.sampled_from([2, 10**6]),
)
def test_best_tokens_are_those_of_a_sort(k, rows, vocab, seed, values):
    """Also where the row is folded, with many ties (two values) or none."""
    k = min(k, vocab)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (rows, vocab), generator=generator).float()
    found, ids = best_tokens(logits, k)
    assert torch.equal(found, logits.sort(descending=True).values[:, :k])
    assert torch.equal(logits.gather(1, ids), found)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("place", [0, 63, 64, 1280, 1299, 1300])
def test_a_folded_row_is_searched_to_its_ends(place):
    logits = torch.zeros(2, 20 * lens_metrics.FOLD + 21)
    logits[1, place] = 1.0
    assert best_tokens(logits, 1)[1][1] == place


@pytest.mark.parametrize("vocab", [99, 2000])
def test_top_tokens_are_those_of_softmax(vocab):
    logits = random_logits(7, vocab=vocab)
    meter = measure(logits, [logits], (), following=[-1] * COUNT)
    shares, ids = torch.from_numpy(softmax(logits)).topk(4)
    assert (meter.top_ids[0] == ids.numpy()).all()
    np.testing.assert_allclose(meter.top_probs[0], shares, rtol=1e-5)
    assert (meter.top_logits[0] == logits.topk(4).values.numpy()).all()
    assert meter.metrics == {}


# --- Targets, chunks, names -----------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 250, VOCAB - 1])
def test_a_target_has_its_probability_and_rank_everywhere(target):
    logits = random_logits(8)
    metrics = measure(random_logits(9), [logits], (), target=target).metrics
    q = softmax(logits)
    np.testing.assert_allclose(metrics["target_prob"][0], q[:, target], rtol=1e-5)
    assert metrics["target_rank"][0].tolist() == (q > q[:, [target]]).sum(1).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, COUNT])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_chunks_of_any_size_give_the_same_numbers(size, at_once, monkeypatch):
    reference, logits = random_logits(10), random_logits(11)
    whole = measure(reference, [logits, reference], target=9)
    monkeypatch.setattr(lens_metrics, "ROWS_AT_ONCE", at_once)
    parts = measure(reference, [logits, reference], target=9, size=size)
    assert whole.metrics.keys() == parts.metrics.keys() == {*METRICS, "target_prob", "target_rank"}
    for name, table in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name], table, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (parts.top_ids == whole.top_ids).all()


def test_logits_are_left_as_they_were():
    reference, logits = random_logits(12), random_logits(13)
    before = reference.clone(), logits.clone()
    measure(reference, [logits, reference])
    assert torch.equal(reference, before[0])
    assert torch.equal(logits, before[1])


def test_only_what_is_asked_for_is_measured():
    metrics = measure(random_logits(0), [random_logits(1)], ("entropy",)).metrics
    assert list(metrics) == ["entropy"]


def test_names_are_checked():
    assert check_metrics("entropy") == ("entropy",)
    assert check_metrics(["entropy", "entropy"]) == ("entropy",)
    assert check_metrics(DEFAULT_METRICS) == DEFAULT_METRICS
    with pytest.raises(InputError, match="no metric 'perplexity'; metrics are kl_divergence"):
        RowMeter(1, 1, 1, ["entropy", "perplexity"])
