"""Concept erasure: after it a probe falls to chance, the rest stays, and the formula is LEACE's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import families
from activation_extraction import ActivationExtractor
from activation_rows import read_rows
from concept_eraser import (
    ConceptEraser,
    ErasureResult,
    check_erasure,
    erase_concept,
    erasing_projection,
    fit_eraser,
)
from forward_pass import InputError, LayerError, Site, edit
from intervention_handler import InterventionHandler
from linear_probes import fit_probes
from logit_lens import LogitLens
from model_architecture import Architecture
from probe_plan import make_plan
from saved_files import read_after_damage


def clouds(n=200, width=10, classes=2, seed=0):
    """Correlated clouds of unequal spread, classes apart: ``[n, width]``, and labels ``[n]``."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    mixing = rng.normal(size=(width, width)) * np.geomspace(0.2, 5, width)
    x = rng.normal(size=(n, width)) @ mixing + 2 * rng.normal(size=(classes, width))[labels] + 3
    return x, labels


def erased_by(x, labels, **options):
    return fit_eraser(x, labels, 0, **options)(torch.from_numpy(x)).numpy()


def root(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def leace_by_the_paper(x, z):
    """X − W⁺ P W (x − μ), W = Σ^(−½), P onto the columns of W Σ_xz (Belrose et al. 2023, 4.3)."""
    mean = x.mean(0)
    sigma = (x - mean).T @ (x - mean) / len(x)
    cross = (x - mean).T @ (z - z.mean(0)) / len(x)
    whitened = root(sigma, -0.5) @ cross
    projector = whitened @ np.linalg.pinv(whitened, 1e-8)
    return x - (x - mean) @ (root(sigma, 0.5) @ projector @ root(sigma, -0.5)).T


# --- The formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_leace_is_the_formula_of_the_paper(classes):
    x, labels = clouds(classes=classes)
    wanted = leace_by_the_paper(x, np.eye(classes)[labels])
    left, right, mean = (
        part.numpy()
        for part in erasing_projection(
            torch.from_numpy(x), torch.from_numpy(np.eye(classes)[labels]), 0.0
        )
    )
    assert left.shape == (10, classes - 1)
    assert x - (x - mean) @ right.T @ left.T == pytest.approx(wanted, abs=1e-9)


def test_numbers_are_erased_by_the_same_formula():
    x, _ = clouds()
    y = x[:, 0] + np.random.default_rng(3).normal(size=200)
    assert erased_by(x, y) == pytest.approx(leace_by_the_paper(x, y[:, None]), abs=1e-4)


def test_the_authors_library_gives_the_same():
    concept_erasure = pytest.importorskip("concept_erasure")
    x, labels = clouds(600)
    whole = torch.from_numpy(x)
    theirs = concept_erasure.LeaceFitter.fit(whole, torch.from_numpy(labels), shrinkage=False)
    wanted = theirs.eraser(whole).numpy()
    assert fit_eraser(x, labels, 0)(whole).numpy() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("method", ["leace", "mean"])
@pytest.mark.parametrize("classes", [2, 4])
def test_class_means_coincide_afterwards_and_projecting_twice_changes_nothing(method, classes):
    x, labels = clouds(classes=classes)
    eraser = fit_eraser(x, labels, 0, method=method)
    once = eraser(torch.from_numpy(x))
    means = np.stack([once.numpy()[labels == c].mean(0) for c in range(classes)])
    assert np.abs(means - means[0]).max() < 1e-4
    assert eraser.rank == classes - 1
    assert eraser(once).numpy() == pytest.approx(once.numpy(), abs=1e-6)


def test_mean_projection_takes_the_difference_of_means_out_orthogonally():
    x, labels = clouds()
    gap = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    unit = gap / np.linalg.norm(gap)
    wanted = x - np.outer((x - x.mean(0)) @ unit, unit)
    assert erased_by(x, labels, method="mean") == pytest.approx(wanted, abs=1e-4)


def test_leace_changes_least_of_all_that_erase():
    x, labels = clouds()
    moved = {
        method: np.mean((erased_by(x, labels, method=method) - x) ** 2)
        for method in ("leace", "mean")
    }
    assert moved["leace"] < 0.9 * moved["mean"]


def test_shrinkage_leads_from_leace_to_the_mean_projection():
    x, labels = clouds()
    ends = [erased_by(x, labels, method=method) for method in ("leace", "mean")]
    assert erased_by(x, labels, shrinkage=1.0) == pytest.approx(ends[1], abs=1e-9)
    assert np.abs(erased_by(x, labels, shrinkage=0.5) - ends[0]).max() > 0.01
    for shrinkage in (0.0, 0.3, 1.0):
        found = erased_by(x, labels, shrinkage=shrinkage)
        assert found[labels == 0].mean(0) == pytest.approx(found[labels == 1].mean(0), abs=1e-4)


def test_with_fewer_examples_than_features_own_labels_are_erased_too():
    x, labels = clouds(20, 60)
    found = erased_by(x, labels)
    assert found[labels == 0].mean(0) == pytest.approx(found[labels == 1].mean(0), abs=1e-3)


def test_a_huge_feature_does_not_hide_the_concept():
    """Activations have features thousands of times larger than others."""
    x, labels = clouds()
    x[:, 3] *= 1e4
    found = erased_by(x, labels)
    gap = np.abs(found[labels == 0].mean(0) - found[labels == 1].mean(0))
    assert (gap / x.std(0)).max() < 1e-4


# --- What a probe finds afterwards ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["leace", "mean"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_falls_to_the_largest_class(method, classes):
    x, labels = clouds(300, classes=classes)
    labels[:30] = 0
    x, labels = x[np.argsort(labels, kind="stable")], np.sort(labels)
    before = LogisticRegression(max_iter=5000).fit(x, labels).score(x, labels)
    found = erased_by(x, labels, method=method)
    probe = LogisticRegression(max_iter=5000, C=100).fit(found, labels)
    baseline = np.bincount(labels).max() / len(labels)
    assert before > baseline + 0.2
    assert probe.score(found, labels) == pytest.approx(baseline, abs=0.005)


def test_only_the_concept_goes():
    """A second label that is independent of the first is read as before."""
    rng = np.random.default_rng(0)
    one, two = np.tile([0, 0, 1, 1], 100), np.tile([0, 1, 0, 1], 100)
    x = rng.normal(size=(400, 12))
    x[:, 0] += 3 * one
    x[:, 1] += 3 * two + one
    found = erased_by(x, one)
    assert fit_probes(x, one, controls=0).scores[0] > 0.9
    assert fit_probes(found, one, controls=0).scores[0] < 0.6
    kept = fit_probes(found, two, controls=0).scores[0]
    assert kept == pytest.approx(fit_probes(x, two, controls=0).scores[0], abs=0.06)
    assert kept > 0.85


# --- In a model -----------------------------------------------------------------------------------


def planted_prompts(count=32):
    """Prompts whose last token is one of two; the label."""
    rng = np.random.default_rng(0)
    prompts = [[*map(int, rng.integers(6, 90, 3)), 4 + i % 2] for i in range(count)]
    return prompts, [i % 2 for i in range(count)]


def test_every_family_forgets_at_the_layer_of_the_erasure(family):
    name, model = family
    prompts, labels = planted_prompts()
    found = check_erasure(model, None, prompts, labels, 1, folds=4)
    assert found.layers == tuple(range(1, len(Architecture(model).blocks)))
    assert found.before[0] > 0.8, name
    assert found.after[0] <= 0.65, name
    assert found.kl > 0
    assert 0 <= found.agreement <= 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def tiny():
    return families.build("llama")


def test_the_check_is_what_its_parts_do_by_hand(tiny):
    """Eraser and probe of a fold know the training examples alone."""
    prompts, labels = planted_prompts()
    found = check_erasure(tiny, None, prompts, labels, 0, folds=3, seed=4, penalty=0.5)
    plan = make_plan(labels, 32, folds=3, seed=4)
    arch = Architecture(tiny)
    rows = read_rows(arch, None, prompts)
    right = np.zeros(3)
    for train, test in plan.splits:
        eraser = fit_eraser(rows.values[train, 0], [labels[i] for i in train], 0)
        with edit(arch, {Site("resid_post", 0): eraser}):
            erased = read_rows(arch, None, prompts).values
        for layer in range(3):
            x = erased[:, layer].astype(float)
            mean, scale = x[train].mean(0), x[train].std(0)
            probe = LogisticRegression(C=2.0, max_iter=10_000)
            probe.fit((x[train] - mean) / scale, np.array(labels)[train])
            right[layer] += (
                probe.predict((x[test] - mean) / scale) == np.array(labels)[test]
            ).sum()
    assert found.after == pytest.approx(right / 32, abs=1.5 / 32)


def test_with_groups_what_remains_is_the_most_frequent_class_of_the_training_examples(tiny):
    prompts, _ = planted_prompts(36)
    groups = [i // 4 for i in range(36)]
    labels = [int(group < 3) for group in groups]
    prompts = [[*prompt[:-1], 4 + label] for prompt, label in zip(prompts, labels, strict=True)]
    found = check_erasure(tiny, None, prompts, labels, 1, folds=3, groups=groups)
    plan = make_plan(labels, 36, folds=3, groups=groups)
    constant = np.zeros(36)
    for train, test in plan.splits:
        counts = np.bincount(plan.labels[train])
        assert counts[0] != counts[1]
        constant[test] = plan.labels[test] == counts.argmax()
    assert found.before[0] > 0.9
    assert found.after[0] == pytest.approx(constant.mean())


def test_the_effect_is_that_of_the_models_own_logits(tiny):
    prompts, labels = planted_prompts()
    found = check_erasure(tiny, None, prompts, labels, 1, folds=2)
    eraser = erase_concept(tiny, None, prompts, labels, 1)
    kls, same = [], []
    for prompt in prompts:
        with torch.no_grad():
            plain = tiny(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
            with edit(Architecture(tiny), {Site("resid_post", 1): eraser}):
                other = tiny(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        kls.append(float((plain.exp() * (plain - other)).sum()))
        same.append(bool(plain.argmax() == other.argmax()))
    assert found.kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.agreement == np.mean(same)


def test_logits_are_kept_where_nothing_is_erased(tiny):
    """What an eraser moves is the concept's part alone: a stream at the mean stays as it is."""
    prompts, labels = planted_prompts()
    eraser = erase_concept(tiny, None, prompts, labels, 2)
    lens = LogitLens(tiny)
    at_mean = eraser.mean.float()
    wanted = lens.apply_lens_to_hidden_state(at_mean)
    assert lens.apply_lens_to_hidden_state(eraser(at_mean)) == pytest.approx(wanted, abs=1e-5)
    across = torch.randn(len(eraser.mean), dtype=torch.float64)
    across -= eraser.left @ (eraser.right @ across)
    assert eraser(eraser.mean + across) == pytest.approx(eraser.mean + across, abs=1e-9)


def test_as_a_patch_it_acts_at_the_positions_named(tiny):
    prompts, labels = planted_prompts()
    eraser = erase_concept(tiny, None, prompts, labels, 1)
    record = ActivationExtractor(tiny, None).extract_activations(prompts[0])
    plain = record.at("resid_post", 1)[0]
    handler = InterventionHandler(tiny)
    handler.register_activation_patch(eraser.patch(positions=[1]))
    seen = []
    handle = (
        Architecture(tiny)
        .blocks[2]
        .register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0][0]),
            with_kwargs=True,
        )
    )
    with torch.no_grad(), handler:
        tiny(torch.tensor([prompts[0]]))
    handle.remove()
    assert seen[0][[0, 2, 3]] == pytest.approx(plain[[0, 2, 3]], abs=1e-5)
    assert seen[0][1] == pytest.approx(eraser(plain[1]), abs=1e-5)


def test_heads_are_erased_as_one_vector(tiny):
    prompts, labels = planted_prompts()
    eraser = erase_concept(tiny, None, prompts, labels, 1, site="head_out")
    rows = read_rows(tiny, None, prompts, 1, site="head_out").values[:, 0]
    heads = torch.from_numpy(rows).unflatten(-1, (families.HEADS, -1))
    assert eraser(heads).flatten(-2) == pytest.approx(eraser(torch.from_numpy(rows)), abs=1e-6)
    found = check_erasure(tiny, None, prompts, labels, 1, folds=2, site="head_out")
    assert found.after[0] <= found.before[0]


def test_dtype_is_kept():
    x, labels = clouds()
    eraser = fit_eraser(x, labels, 0)
    half = torch.from_numpy(x).bfloat16()
    assert eraser(half).dtype == torch.bfloat16
    before = half.clone()
    eraser(half)
    assert torch.equal(half, before)


# --- What is refused ------------------------------------------------------------------------------

X, LABELS = clouds(24, 4)


def test_impossible_fits_are_refused():
    for arguments, options, message in (
        ((X, LABELS), {}, "which block"),
        ((X[:, None].repeat(2, 1), LABELS), {}, "one layer"),
        ((X, LABELS, 0), {"method": "inlp"}, "leace, mean"),
        ((X, LABELS, 0), {"shrinkage": 1.5}, r"0\.\.1"),
        ((X, [1] * 24, 0), {}, "all labels"),
        ((X, LABELS[:5], 0), {}, "5 entries"),
        ((X, LABELS, 0), {"shrinkage": "0"}, r"0\.\.1"),
        ((X, LABELS, "h.3"), {}, "numbers of its blocks"),
        ((X, LABELS, True), {}, "numbers of its blocks"),
        ((X, LABELS, -1), {}, "numbers of its blocks"),
        ((np.ones((24, 4)), LABELS, 0), {}, "nothing to erase"),
        ((X[:1] * (1 + 1e-7 * X), LABELS, 0), {}, "differ by rounding alone"),
    ):
        with pytest.raises(InputError, match=message):
            fit_eraser(*arguments, **options)


@pytest.mark.parametrize("call", [erase_concept, check_erasure])
@pytest.mark.parametrize(
    ("texts", "labels", "options", "error", "message"),
    [
        ("a text", [1], {}, InputError, "list of prompts"),
        ([[5, 6]] * 12, [0, 1] * 5, {}, InputError, "10 entries for 12"),
        ([[5, 6]] * 12, [0, 1] * 6, {"method": "none"}, InputError, "leace, mean"),
        ([[5, 6]] * 12, [0, 1] * 6, {"shrinkage": -1}, InputError, r"0\.\.1"),
        ([[5, 6]] * 12, [0, 1] * 6, {"head": 1, "site": "head_out"}, InputError, "all heads"),
        ([[5, 6]] * 12, [0, 1] * 6, {"layer": 7}, LayerError, "7"),
        ([[5, 6]] * 12, [0, 1] * 6, {"read": "each"}, InputError, "several examples"),
    ],
)
def test_bad_requests_leave_no_hook(tiny, call, texts, labels, options, error, message):
    with pytest.raises(error, match=message):
        call(tiny, None, texts, labels, **{"layer": 1, **options})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_another_width_is_refused():
    with pytest.raises(InputError, match=r"takes \[…, 4\]"):
        fit_eraser(X, LABELS, 0)(torch.zeros(3, 5))
    with pytest.raises(InputError, match="an eraser is left"):
        ConceptEraser(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4), 0)


# --- Files and pictures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tiny):
    return check_erasure(tiny, None, *planted_prompts(), 1, folds=2)


def test_an_eraser_survives_its_file(tmp_path):
    eraser = fit_eraser(X, LABELS, 3, method="mean")
    eraser.save(tmp_path / "eraser")
    again = ConceptEraser.load(tmp_path / "eraser")
    assert torch.equal(again(torch.from_numpy(X)), eraser(torch.from_numpy(X)))
    assert repr(again) == repr(eraser)
    assert "\n" not in repr(eraser)


def test_a_check_survives_its_file(result, tmp_path):
    result.save(tmp_path / "check")
    again = ErasureResult.load(tmp_path / "check")
    assert again.before.tolist() == result.before.tolist()
    assert again.after.tolist() == result.after.tolist()
    assert (again.kl, again.agreement, again.layers) == (result.kl, result.agreement, result.layers)
    assert repr(again) == repr(result)


def test_damaged_files_are_refused(result, tmp_path):
    for found in (result, fit_eraser(X, LABELS, 3)):
        assert read_after_damage(found, tmp_path / "file") > 20


def test_the_picture_and_frame_show_both_scores(result, tmp_path):
    figure = result.plot(save_path=tmp_path / "erasure.png")
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(drawn["as it is"]) == result.before.tolist()
    assert list(drawn["erased, probe refitted"]) == result.after.tolist()
    frame = result.to_frame()
    assert frame["after"].tolist() == result.after.tolist()
    assert frame["layer"].tolist() == list(result.layers)
