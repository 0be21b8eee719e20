"""Linear probes: scikit-learn's own pipeline is the oracle, and planted answers are found."""

import functools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_predict,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import GPT2Config, GPT2LMHeadModel

import families
from activation_extraction import ActivationExtractor
from activation_rows import ActivationRows, read_rows, rows_of, varies
from forward_pass import InputError, LayerError, SiteError
from linear_probes import fit_probes, train_probes
from model_architecture import Architecture
from model_loader import load_model
from probe_plan import make_plan
from probe_result import ProbeResult
from saved_files import read_after_damage
from steering import steer


def clouds(n, width, classes=2, gap=1.0, seed=0, scales=None):
    """Normal clouds ``[n, width]``, means apart by ``gap`` per class along the first axes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    means = gap * rng.normal(size=(classes, width))
    scales = np.ones(width) if scales is None else scales
    x = (rng.normal(size=(n, width)) + means[labels]) * scales + 3 * scales
    return x.astype(np.float32), [f"c{label}" for label in labels]


def pipeline(task, penalty):
    if task == "regression":
        return make_pipeline(StandardScaler(), Ridge(alpha=penalty))
    estimator = LogisticRegression(C=1 / penalty, max_iter=10_000)
    return make_pipeline(StandardScaler(), estimator)


# --- scikit-learn is the oracle -------------------------------------------------------------------


@pytest.mark.parametrize(("width", "classes"), [(6, 2), (60, 2), (60, 3)])
def test_predictions_are_those_of_a_plain_pipeline(width, classes):
    scales = np.geomspace(0.01, 100, width)
    x, labels = clouds(42, width, classes, 0.4, scales=scales)
    x[:, 2] = 7.0  # a feature that does not vary
    x[5, 1] = 1e5  # seen by a standardisation that looks at the test fold too
    found = fit_probes(x, labels, folds=4, penalty=2.0, controls=0, seed=3)

    folds = StratifiedKFold(4, shuffle=True, random_state=3)
    wanted = cross_val_predict(pipeline("classification", 2.0), x, labels, cv=folds)
    assert [found.classes[int(i)] for i in found.predictions[0]] == wanted.tolist()
    assert found.scores[0] == pytest.approx(np.mean(wanted == np.array(labels)))
    each = [np.mean((wanted == labels)[test]) for _, test in folds.split(x, labels)]
    assert found.fold_scores[0] == pytest.approx(each)


def test_standardising_by_all_examples_would_be_seen():
    """The data of the test above tell a fold's own standardisation from one that leaks."""
    x, labels = clouds(42, 60, 2, 0.4, scales=np.geomspace(0.01, 100, 60))
    x[5, 1] = 1e5
    folds = StratifiedKFold(4, shuffle=True, random_state=3)
    leaky = StandardScaler().fit_transform(x)
    wanted, other = (
        cross_val_predict(model, data, labels, cv=folds, method="decision_function")
        for model, data in (
            (pipeline("classification", 2.0), x),
            (LogisticRegression(C=0.5, max_iter=10_000), leaky),
        )
    )
    assert np.abs(wanted - other).max() > 0.1


@pytest.mark.parametrize("width", [5, 50])
def test_ridge_is_that_of_a_plain_pipeline(width):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, width)).astype(np.float32) * np.geomspace(0.1, 10, width)
    y = x[:, 0] * 9 + x[:, 1] + rng.normal(size=40)
    found = fit_probes(x, y, folds=5, penalty=3.0, controls=0, seed=2)
    folds = KFold(5, shuffle=True, random_state=2)
    x = x.astype(np.float32).astype(float)
    wanted = cross_val_predict(pipeline("regression", 3.0), x, y, cv=folds)
    assert found.predictions[0] == pytest.approx(wanted, abs=1e-8)
    means = np.empty(40)
    for train, test in folds.split(x):
        means[test] = y[train].mean()
    assert found.scores[0] == pytest.approx(
        1 - ((wanted - y) ** 2).sum() / ((means - y) ** 2).sum()
    )
    assert found.task == "regression"
    assert found.baseline == 0
    whole = pipeline("regression", 3.0).fit(x, y)
    assert found.predict(x, 0) == pytest.approx(whole.predict(x), abs=1e-8)
    assert found.direction(0, length="score").vector.numpy() == pytest.approx(
        whole[1].coef_ / whole[0].scale_, rel=1e-5
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_groups_are_kept_whole(task):
    x, labels = clouds(40, 4, 2, 0.5)
    groups = [f"g{i // 4}" for i in range(40)]
    y = labels if task == "classification" else x[:, 0].astype(float)
    found = fit_probes(x, y, groups=groups, folds=4, controls=0, seed=5)
    maker = StratifiedGroupKFold if task == "classification" else GroupKFold
    folds = maker(4, shuffle=True, random_state=5)
    ids = [int(name[1:]) for name in groups]
    wanted = cross_val_predict(pipeline(task, 1.0), x, y, groups=ids, cv=folds)
    got = found.predictions[0]
    if task == "classification":
        assert [found.classes[int(i)] for i in got] == wanted.tolist()
    else:
        assert got == pytest.approx(wanted, abs=1e-6)
    assert found.n_groups == 10


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probe_of_all_examples_is_the_pipelines(classes):
    x, labels = clouds(60, 8, classes, 0.5, scales=np.geomspace(0.1, 10, 8))
    found = fit_probes(x, labels, controls=0)
    whole = pipeline("classification", 1.0).fit(x, labels)
    scores = x @ found.weights[0].T + found.intercepts[0]
    odds = np.exp(scores - scores.max(1, keepdims=True))
    assert odds / odds.sum(1, keepdims=True) == pytest.approx(whole.predict_proba(x), abs=2e-3)
    assert found.predict(torch.from_numpy(x), 0).tolist() == whole.predict(x).tolist()


def test_confusion_counts_held_out_predictions():
    x, labels = clouds(40, 4, 3, 0.5)
    found = fit_probes(x, labels, controls=0)
    wanted = confusion_matrix(found.labels, found.predictions[0], labels=range(3))
    table = found.confusion(0)
    assert table.to_numpy().tolist() == wanted.tolist()
    assert list(table.index) == list(table.columns) == ["c0", "c1", "c2"]


# --- Planted directions ---------------------------------------------------------------------------


def test_a_planted_direction_is_found():
    rng = np.random.default_rng(0)
    planted = rng.normal(size=24)
    planted /= np.linalg.norm(planted)
    labels = rng.integers(0, 2, 600)
    x = rng.normal(size=(600, 24)) + np.outer(2 * labels - 1, planted) * 1.5 + 40
    found = fit_probes(x, labels, controls=0, penalty=20.0).direction(0)
    assert found.vector.numpy() @ planted > 0.95
    assert found.norm == pytest.approx(1, abs=1e-6)
    assert found.label == "1"


def test_the_direction_is_in_activations_own_units():
    """With features of unequal spread the best filter is Σ⁻¹ Δμ, not the standardised weights."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(0.1, 10, 12)
    shift = rng.normal(size=12) * spread
    labels = rng.integers(0, 2, 8000)
    x = rng.normal(size=(8000, 12)) * spread + np.outer(labels - 0.5, shift)
    best = shift / spread**2
    line = fit_probes(x, labels, controls=0).direction(0).vector.numpy()
    assert line @ best / np.linalg.norm(best) > 0.98
    assert line @ (best * spread) / np.linalg.norm(best * spread) < 0.9


def test_lengths_of_a_direction():
    x, labels = clouds(90, 6, 3, 1.0)
    rare = np.flatnonzero(np.array(labels) == "c2")[10:]  # the rest is no mean of class means
    x, labels = np.delete(x, rare, 0), np.delete(labels, rare).tolist()
    found = fit_probes(x, labels, controls=0)
    own = np.array(labels) == "c1"
    unit = found.direction(0, "c1").vector.double().numpy()
    gap = found.direction(0, "c1", "gap").vector.double().numpy()
    assert gap @ unit == pytest.approx((x[own].mean(0) - x[~own].mean(0)) @ unit, rel=1e-4)
    score = found.direction(0, "c1", "score").vector.double().numpy()
    weights = found.weights[0]
    assert score == pytest.approx(weights[1] - (weights[0] + weights[2]) / 2, rel=1e-5)
    assert found.score_scale(0, "c1") == pytest.approx(np.linalg.norm(score), rel=1e-5)


def test_two_classes_have_the_second_as_direction():
    x, labels = clouds(40, 6, 2, 2.0)
    found = fit_probes(x, labels, controls=0)
    up, down = found.direction(0), found.direction(0, "c0")
    assert up.label == "c1"
    assert up.cosine(down) == pytest.approx(-1)
    heights = x @ up.vector.numpy()
    own = np.array(labels) == "c1"
    assert heights[own].mean() > heights[~own].mean()


# --- Controls -------------------------------------------------------------------------------------


def test_known_groups_are_leakage_and_the_control_sees_it():
    """Labels by group at random: only who memorizes groups can tell them."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 5)
    x = 5 * rng.normal(size=(16, 40))[groups] + rng.normal(size=(80, 40))
    labels = rng.permutation(np.arange(16) % 2)[groups]
    found = fit_probes(x, labels, groups=groups, folds=4)
    assert found.shared_scores[0] > 0.95
    assert found.scores[0] < 0.75
    assert found.control[0] > 0.95
    assert abs(found.selectivity[0]) < 0.05
    assert (found.n_groups, found.n_types) == (16, 16)


def test_what_is_no_property_of_types_is_selective():
    rng = np.random.default_rng(1)
    types = np.repeat(np.arange(12), 10)
    labels = np.tile(np.arange(10) < 4, 12)
    x = 0.2 * rng.normal(size=(12, 6))[types] + rng.normal(size=(120, 6))
    x[:, 0] += 6 * labels
    found = fit_probes(x, labels, types=types)
    assert found.scores[0] > 0.95
    assert found.selectivity[0] > 0.3
    assert found.selectivity[0] == pytest.approx(found.shared_scores[0] - found.control[0])


def plan_of(labels, **options):
    return make_plan(labels, len(labels), **options)


def test_control_labels_are_by_type_and_keep_classes():
    groups = [0, 0, 1, 1, 1, 2, 3, 3]
    plan = plan_of(["a", "a", "b", "b", "b", "b", "a", "a"], groups=groups, folds=2)
    seen = set()
    for seed in range(40):
        given = plan.control_labels(plan.types, np.random.default_rng(seed))
        by_type = {t: {int(v) for v in given[plan.types == t]} for t in range(4)}
        assert all(len(values) == 1 for values in by_type.values())
        assert sorted(min(values) for values in by_type.values()) == [0, 0, 1, 1]
        seen.add(tuple(given))
    assert len(seen) == math.comb(4, 2)


def test_types_of_mixed_labels_get_labels_of_every_class():
    """The most frequent label of each would be the same for all: a control task of one class."""
    labels = ["a", "a", "b"] * 8
    types = np.repeat(np.arange(8), 3)
    plan = plan_of(labels, types=types, folds=2)
    given = [plan.control_labels(types, np.random.default_rng(seed)) for seed in range(50)]
    assert all(set(each) == {0, 1} for each in given)
    assert np.mean(given) == pytest.approx(1 / 3, abs=0.05)


def test_the_token_read_can_be_the_type():
    model, tokenizer = families.build("gpt2"), families.tiny_tokenizer()
    texts = [f"{word} {end}" for word in "abcdefgh" for end in ("cat", "mat", "sat")]
    labels = [i % 3 == 0 for i in range(24)]
    found = train_probes(model, tokenizer, texts, labels, 1, types="token", folds=3)
    assert found.n_types == len({tokenizer(text)["input_ids"][-1] for text in texts}) == 3


# --- Permutations ---------------------------------------------------------------------------------


def test_p_values_count_the_true_labels_too():
    x = np.random.default_rng(0).normal(size=(30, 2, 4))
    labels = np.arange(30) % 2
    x[:, 1, 0] += 5 * labels
    found = fit_probes(x, labels, folds=3, controls=0, permutations=9)
    by_hand = [(1 + sum(found.null[i] >= found.scores[i])) / 10 for i in (0, 1)]
    assert found.p_values.tolist() == by_hand
    assert found.p_values[1] == 0.1
    most = found.null.max(0)
    assert found.p_values_any.tolist() == [
        (1 + sum(most >= found.scores[i] - 1e-12)) / 10 for i in (0, 1)
    ]
    assert np.isnan(fit_probes(x, labels, controls=0).p_values).all()


def test_permuted_classes_leave_the_folds_as_stratified_as_they_were():
    labels = ["a"] * 12 + ["b"] * 8
    plan = plan_of(labels, folds=4)
    found, splits = plan.permuted(np.random.default_rng(0))
    assert splits is plan.splits
    assert found.tolist() != plan.labels.tolist()
    for _, test in splits:
        assert sorted(found[test]) == sorted(plan.labels[test])


def test_groups_of_one_label_change_it_whole_and_get_new_folds():
    groups = np.repeat(np.arange(8), 3)
    plan = plan_of((groups % 2).tolist(), groups=groups, folds=4)
    for seed in range(5):
        found, splits = plan.permuted(np.random.default_rng(seed))
        assert all(np.ptp(found[groups == group]) == 0 for group in range(8))
        assert found.sum() == plan.labels.sum()
        for train, test in splits:
            assert not set(groups[train]) & set(groups[test])
            assert sorted(found[test]) == [0, 0, 0, 1, 1, 1]


def test_permuted_groups_are_tried_on_their_new_folds():
    rng = np.random.default_rng(2)
    x, groups = rng.normal(size=(48, 5)).astype(np.float32), np.repeat(np.arange(12), 4)
    labels = np.array(["a", "b"])[groups % 2].tolist()
    found = fit_probes(x, labels, groups=groups, folds=3, controls=0, permutations=6, seed=4)
    plan = make_plan(labels, 48, groups=groups, folds=3, controls=0, permutations=6, seed=4)
    generator, expected, others = np.random.default_rng(4), [], []
    for _ in range(6):
        permuted, folds = plan.permuted(generator)
        for cv, scores in ((folds, expected), (plan.splits, others)):
            said = cross_val_predict(pipeline("classification", 1.0), x, permuted, cv=cv)
            scores.append(np.mean(said == permuted))
    assert found.null[0] == pytest.approx(expected)
    assert not np.allclose(expected, others)


def test_labels_within_groups_change_places_there():
    groups = np.repeat(np.arange(5), 4)
    plan = plan_of(["a", "b", "b", "b"] * 5, groups=groups, folds=5)
    found, splits = plan.permuted(np.random.default_rng(0))
    assert splits is plan.splits
    assert [found[groups == group].sum() for group in range(5)] == [3] * 5
    assert found.tolist() != plan.labels.tolist()


def p_values_of_noise(kind, count):
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        options = {"folds": 3, "controls": 0, "permutations": 9, "seed": seed}
        x, groups = rng.normal(size=(18, 3)), np.repeat(np.arange(6), 3)
        labels = rng.normal(size=18) if kind == "numbers" else rng.permutation(np.arange(18) % 2)
        if kind == "groups":
            x, labels = x + 2 * rng.normal(size=(6, 3))[groups], rng.permutation(6)[groups] % 2
            options["groups"] = groups
        found.append(fit_probes(x, labels, **options).p_values[0])
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("numbers", 50),
        pytest.param("classes", 100, marks=pytest.mark.slow),
        pytest.param("groups", 100, marks=pytest.mark.slow),
    ],
)
def test_noise_is_significant_as_rarely_as_it_says(kind, count):
    found = p_values_of_noise(kind, count)
    for level in (0.1, 0.2, 0.5):
        room = 3 * math.sqrt(level * (1 - level) / count)
        assert (found <= level).mean() <= level + room
    assert (found <= 0.6).mean() >= 0.3


# --- Seeds and counts -----------------------------------------------------------------------------


def test_a_seed_gives_the_same_and_another_one_others():
    x, labels = clouds(30, 5, 2, 0.3)
    one, two, other = (fit_probes(x, labels, permutations=3, seed=s) for s in (1, 1, 2))
    assert one.null.tolist() == two.null.tolist()
    assert one.predictions.tolist() == two.predictions.tolist()
    assert one.control.tolist() == two.control.tolist()
    assert one.fold_scores.tolist() != other.fold_scores.tolist()


def test_unbalanced_classes_have_the_largest_as_baseline():
    rng = np.random.default_rng(0)
    labels = np.array(["rare"] * 10 + ["often"] * 40)
    found = fit_probes(rng.normal(size=(50, 3)), labels, controls=0)
    assert found.baseline == 0.8
    assert found.chance == 0.5
    assert found.scores[0] <= 0.82


# --- From a model ---------------------------------------------------------------------------------


def hidden_states(model, ids):
    """``[layer, d]`` of the last token, by plain hooks on the blocks."""
    seen = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(
                (out if torch.is_tensor(out) else out[0])[0, -1].clone()
            )
        )
        for block in Architecture(model).blocks
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).numpy()


def test_every_family_is_read_and_a_token_that_differs_is_found(family):
    _, model = family
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(5, 90, 3 + i % 3)] + [4 + i % 2] for i in range(24)]
    rows = read_rows(model, None, prompts, batch_size=5)
    for i in (0, 1, 7):
        scale = float(np.abs(rows.values[i]).max())
        assert rows.values[i] == pytest.approx(hidden_states(model, prompts[i]), abs=2e-5 * scale)
    found = train_probes(model, None, prompts, [i % 2 for i in range(24)], [0, -1], folds=4)
    assert found.layers == (0, len(Architecture(model).blocks) - 1)
    assert found.scores[0] > 0.9
    assert found.model == model.config.model_type
    direction = found.direction(0)
    assert (direction.layer, direction.site) == (0, "resid_post")


@pytest.fixture(scope="module")
def tiny():
    return families.build("llama"), families.tiny_tokenizer(bos=True)


def test_readings_are_of_the_tokens_named(tiny):
    model, tokenizer = tiny
    text = "the cat sat on the mat"
    ids = tokenizer(text)["input_ids"]
    record = ActivationExtractor(model, tokenizer).extract_activations(text)
    values = torch.cat([record.at("resid_post", i) for i in range(3)]).numpy()
    for read, wanted in (
        ("last", values[:, -1]),
        (2, values[:, 2]),
        ([1, 3], values[:, [1, 3]].mean(1)),
        ("mean", values[:, 1:].mean(1)),  # without the special token
    ):
        rows = read_rows(model, tokenizer, [text], read=read)
        assert rows.values[0] == pytest.approx(wanted, abs=1e-5)
    each = read_rows(model, tokenizer, [text, "a cat"], read="each")
    assert each.values[: len(ids)].swapaxes(0, 1) == pytest.approx(values, abs=1e-5)
    assert each.prompts.count(0) == len(ids)
    rest = read_rows(model, tokenizer, [text], read="rest")
    assert rest.values == pytest.approx(each.values[1 : len(ids)], abs=1e-5)
    at = read_rows(model, tokenizer, [text], at=["cat"])
    assert at.values[0] == pytest.approx(values[:, at_of(tokenizer, ids, "cat")], abs=1e-5)
    assert at.tokens == (" cat",)


def at_of(tokenizer, ids, word):
    return [tokenizer.decode([i]).strip() for i in ids].index(word)


@functools.cache
def rounded_rows():
    """The first token's vector, which no later token can change, of texts of 2 and of 21 tokens."""
    config = GPT2Config(vocab_size=99, n_embd=768, n_layer=2, n_head=12, n_positions=32)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    rng = np.random.default_rng(0)
    texts = [[1, *rng.integers(2, 99, size=20 if i % 2 else 1).tolist()] for i in range(24)]
    return read_rows(model, None, texts, read=0, batch_size=1)


def spoiled(x, size):
    """Rows that are one row, but for some roundings of its dtype, larger in every second one."""
    noise = np.random.default_rng(1).normal(size=x.shape) * (1 + np.arange(len(x)) % 2)[:, None]
    return (x + size * np.finfo(x.dtype).eps * noise).astype(x.dtype)


ONE = np.random.default_rng(3).normal(size=(1, 40)).astype(np.float32).repeat(24, 0)


def test_what_differs_by_rounding_does_not_vary():
    rows = rounded_rows()
    for place in range(len(rows.layers)):
        assert not varies(rows.values[:, place])
    for x in (ONE, ONE.astype(np.float64), np.zeros((5, 3)), np.full((5, 3), 0.1)):
        assert not varies(x)
    assert not varies(spoiled(ONE, 10))
    assert not varies(spoiled(ONE.astype(np.float64), 10))
    assert varies(spoiled(ONE, 1000).astype(np.float64))  # beyond what float64 rounds
    assert varies(spoiled(ONE, 1000))
    one_feature = ONE.copy()
    one_feature[::2, 7] += 0.01
    assert varies(one_feature)
    huge = np.random.default_rng(4).normal(size=(24, 40)).astype(np.float32)
    huge[:, 0] = 1e9  # a constant feature hides none of the others
    assert varies(huge)


def test_rounding_says_nothing_of_labels():
    """Without the threshold the order of sums tells long texts from short ones: 1.0, not 0.5."""
    for rows in (rounded_rows(), spoiled(ONE, 10)[:, None]):
        found = fit_probes(rows, [0, 1] * 12, folds=4, permutations=9, controls=0)
        assert found.scores == pytest.approx(0.5)
        assert found.p_values == pytest.approx(1)
        assert not found.weights.any()


def test_heads_are_parts_of_one_vector(tiny):
    model, _ = tiny
    prompts = [[5, 9, 12], [7, 5, 30]]
    whole = read_rows(model, None, prompts, 1, site="head_out")
    one = read_rows(model, None, prompts, 1, site="head_out", head=2)
    size = one.values.shape[2]
    assert whole.values[:, :, 2 * size : 3 * size] == pytest.approx(one.values)


def test_rows_records_and_arrays_give_the_same(tiny):
    model, tokenizer = tiny
    texts = [f"{a} {b}" for a in ("the cat", "a mat") for b in "abcdef"]
    labels = [i >= 6 for i in range(12)]
    records = ActivationExtractor(model, tokenizer).extract_batch_activations(
        texts, show_progress=False
    )
    rows = read_rows(model, tokenizer, texts)
    one = fit_probes(rows, labels, folds=3)
    two = fit_probes(records, labels, folds=3)
    three = fit_probes(torch.from_numpy(rows.values), labels, folds=3)
    assert one.weights == pytest.approx(two.weights, abs=1e-4)
    assert one.weights == pytest.approx(three.weights)
    some = fit_probes(rows, labels, [2], folds=3)
    assert some.layers == (2,)
    assert some.weights[0] == pytest.approx(one.weights[2])
    assert fit_probes(records, labels, 1, folds=3).layers == (1,)


def test_steering_along_the_probe_changes_the_answer():
    model, tokenizer = load_model(device="cpu")
    places = {"Paris": ("The Louvre", "The Eiffel Tower", "The Arc de Triomphe")}
    places["Rome"] = ("The Colosseum", "The Trevi Fountain", "The Pantheon")
    endings = ("is in", "is located in", "can be seen in", "stands in the city of")
    examples = [(f"{p} {end}", c) for c, each in places.items() for p in each for end in endings]
    texts, labels = zip(*examples, strict=True)
    groups = [place for each in places.values() for place in each for _ in endings]
    found = train_probes(model, tokenizer, texts, labels, 6, groups=groups, folds=3, controls=0)
    assert found.scores[0] > 0.8
    rome, paris = (tokenizer(f" {city}")["input_ids"][0] for city in ("Rome", "Paris"))
    ids = tokenizer("The Louvre is in", return_tensors="pt")
    with torch.no_grad():
        plain = model(**ids).logits[0, -1]
        with steer(model, found.direction(6, "Rome", "gap"), coefficient=2.0):
            steered = model(**ids).logits[0, -1]
    assert plain.argmax() == paris
    assert steered.argmax() == rome


# --- What is refused ------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(12, 4))
Y = ["a", "b"] * 6

REFUSED = [
    ({"labels": Y[:5]}, "labels has 5 entries for 12"),
    ({"labels": "ab"}, "one entry per example"),
    ({"labels": ["a"] * 12}, "all labels are 'a'"),
    ({"labels": list(range(12))}, "12 different labels"),
    ({"labels": ["a"] * 10 + ["b"] * 2}, "class 'b' has 2 examples"),
    ({"labels": [1.0] * 12}, "not all the same"),
    ({"labels": [float("inf")] + [1.0] * 11}, "finite"),
    ({"labels": [float("nan")] + [1.0] * 11}, r"labels\[0\] is missing \(nan\)"),
    ({"labels": ["a", *[float("nan")] * 11]}, r"labels\[1\] is missing \(nan\)"),
    ({"labels": ["a", None] * 6}, r"labels\[1\] is missing \(None\)"),
    ({"labels": Y, "groups": [*range(11), None]}, r"groups\[11\] is missing"),
    ({"labels": np.eye(2)[[0, 1] * 6]}, r"labels\[0\] must be one value, not several"),
    ({"labels": np.array([[0], [1]] * 6)}, r"labels\[0\] must be one value, not several"),
    ({"labels": [torch.zeros(2)] * 12}, r"labels\[0\] must be one value, not several"),
    ({"labels": dict.fromkeys(range(12), "a")}, "one entry per example"),
    ({"labels": Y, "groups": set(range(12))}, "one entry per example"),
    ({"labels": Y, "task": "regression"}, "numbers"),
    ({"labels": Y, "task": "ranking"}, "task is"),
    ({"labels": Y, "groups": Y}, "2 groups cannot be split into 5"),
    ({"labels": Y, "groups": Y, "folds": 2}, "class 'a' has 6 examples in 1 groups"),
    ({"labels": Y, "groups": [1, 2]}, "groups has 2"),
    ({"labels": Y, "types": ["x"] * 12}, "one type"),
    ({"labels": Y, "types": "word"}, "types is a list"),
    ({"labels": Y, "folds": 1}, "folds must be an integer, at least 2"),
    ({"labels": Y, "folds": 7}, "class 'a' has 6 examples"),
    ({"labels": Y, "penalty": 0}, "penalty"),
    ({"labels": Y, "penalty": "1"}, "penalty"),
    ({"labels": Y, "penalty": True}, "penalty"),
    ({"labels": Y, "penalty": float("inf")}, "penalty"),
    ({"labels": Y, "seed": -1}, "seed must be an integer, at least 0; came -1"),
    ({"labels": Y, "seed": "a"}, "seed"),
    ({"labels": Y, "controls": -1}, "controls"),
    ({"labels": Y, "permutations": 2.0}, "permutations"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_study_that_cannot_be_measured_is_refused_before_it_runs(options, message):
    with pytest.raises(InputError, match=message):
        fit_probes(X, **options)
    with pytest.raises(InputError, match=message):
        train_probes(None, None, [[5]] * 12, **options)  # no model is asked


def test_folds_that_leave_a_class_unknown_are_refused_before_anything_runs():
    groups = [2, 0, 2, 1, 0, 2, 0, 3, 2, 1, 2, 1]
    labels = [1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1]
    with pytest.raises(InputError, match="without training examples"):
        train_probes(None, None, [[5]] * 12, labels, groups=groups, folds=2)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("a text", {}, InputError, "list of prompts"),
        ([], {}, InputError, "empty"),
        ([[5, 6]] * 12, {"read": "each"}, InputError, "several examples"),
        ([[5, 6]] * 12, {"layers": 9}, LayerError, "9"),
        ([[5, 6]] * 12, {"site": "attn_pattern"}, SiteError, "as many entries"),
        ([[5, 6]] * 12, {"site": "head_out", "head": 9}, SiteError, "heads 0..3"),
        ([[5, 6]] * 12, {"head": 0}, SiteError, "no head axis"),
        ([[5, 6]] * 11 + [[]], {}, InputError, r"texts\[11\]"),
        ([[5, 6]] * 12, {"types": "token"}, InputError, "one type"),
        ([[5, 6]] * 12, {"at": [0]}, InputError, "at holds one"),
        ([[5, 6]] * 12, {"batch_size": 0}, InputError, "batch_size"),
        ([[5, 6]] * 12, {"batch_size": "8"}, InputError, "batch_size"),
        ([[5, 6]] * 12, {"site": "head_out", "head": True}, SiteError, "heads 0..3; came True"),
    ],
)
def test_bad_texts_are_refused_and_leave_no_hook(tiny, texts, options, error, message):
    model, tokenizer = tiny
    with pytest.raises(error, match=message):
        train_probes(model, tokenizer, texts, Y, folds=2, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_arrays_of_other_shapes_and_nan_are_refused():
    with pytest.raises(InputError, match="an array is"):
        rows_of(np.zeros(3))
    with pytest.raises(InputError, match="not empty"):
        rows_of(np.zeros((0, 2, 3)))
    with pytest.raises(InputError, match="NaN"):
        rows_of(np.full((2, 3), np.nan))
    with pytest.raises(InputError, match="2 layers for a layer axis of 3"):
        rows_of(np.zeros((4, 3, 2)), [0, 1])
    for nothing in (None, [["a"]], [[1, 2], [3]]):
        with pytest.raises(InputError, match="records, or an array of numbers"):
            rows_of(nothing)
    for layers in (["h.1", "h.2"], [True, 2], [1, 1], [-1, 0], [0.5, 1], 1.0):
        with pytest.raises(InputError, match="layers of an array are the numbers of its blocks"):
            rows_of(np.zeros((4, 2, 3)), layers)
    assert rows_of(np.zeros((4, 2, 3)), ["4", np.int64(2)]).layers == (4, 2)
    rows = ActivationRows(np.zeros((4, 2, 3), np.float32), (3, 5))
    assert rows_of(rows, [5]).layers == (5,)
    for layers in (True, [True]):
        with pytest.raises(LayerError, match="no rows of layer True"):
            ActivationRows(np.zeros((4, 2, 3), np.float32), (0, 1)).at_layers(layers)
    with pytest.raises(LayerError, match="no rows of layer 4"):
        rows_of(rows, [4])


def test_questions_that_a_result_cannot_answer():
    found = fit_probes(X, Y, controls=0)
    with pytest.raises(LayerError, match="was not probed"):
        found.direction(3)
    with pytest.raises(InputError, match="which class"):
        found.direction(0, "z")
    with pytest.raises(InputError, match="length is"):
        found.direction(0, "a", "long")
    with pytest.raises(InputError, match=r"activations are \[…, 4\]"):
        found.predict(np.zeros(3), 0)
    with pytest.raises(InputError, match="NaN or infinity"):
        found.predict(np.full(4, np.nan), 0)
    with pytest.raises(LayerError, match="layer False was not probed"):
        found.score(False)
    numbers = fit_probes(X, X[:, 0], controls=0)
    with pytest.raises(InputError, match="no classes"):
        numbers.confusion(0)
    with pytest.raises(InputError, match="one direction"):
        numbers.direction(0, "a")
    with pytest.raises(InputError, match="length is"):
        numbers.direction(0, length="gap")
    heads = fit_probes(X, Y, controls=0, site="head_out")
    with pytest.raises(InputError, match="head axis"):
        heads.direction(0)


# --- The result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    x = np.random.default_rng(0).normal(size=(24, 3, 5))
    labels = ["yes", "no"] * 12
    x[:, 2, 0] += 4 * np.array([label == "yes" for label in labels])
    return fit_probes(x, labels, groups=np.arange(24) // 2, folds=3, permutations=4)


def test_a_result_survives_its_file(result, tmp_path):
    for found in (result, fit_probes(X, X[:, 0], controls=0)):
        found.save(tmp_path / "probes")
        again = ProbeResult.load(tmp_path / "probes")
        for name in ("scores", "null", "weights", "predictions", "means", "control"):
            assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=True)
        assert (again.classes, again.layers, again.task) == (
            found.classes,
            found.layers,
            found.task,
        )
        assert repr(again) == repr(found)


def test_a_damaged_file_is_refused(result, tmp_path):
    assert read_after_damage(result, tmp_path / "probes") > 20


def test_labels_keep_their_types_in_a_file(tmp_path):
    for labels in ([True, False] * 6, [3, 5] * 6, ["a\u2028", "b"] * 6):
        found = fit_probes(X, labels, folds=2, controls=0)
        found.save(tmp_path / "probes")
        again = ProbeResult.load(tmp_path / "probes").classes
        assert again == tuple(sorted(set(labels)))
        assert [type(each) for each in again] == [type(labels[0])] * 2


def test_the_frame_has_a_row_per_layer(result):
    frame = result.to_frame()
    assert frame["score"].tolist() == result.scores.tolist()
    assert frame["selectivity"].tolist() == result.selectivity.tolist()
    assert frame["p"].tolist() == result.p_values.tolist()
    assert len(frame) == 3
    assert "best" not in repr(result)
    assert "\n" not in repr(result)
    assert result.best_layer == 2
    assert result.stderr == pytest.approx(result.fold_scores.std(1, ddof=1) / math.sqrt(3))


def test_the_picture_shows_what_it_must_be_compared_with(result, tmp_path):
    figure = result.plot(against={"patching": {0: 0.1, 2: 0.9}}, save_path=tmp_path / "x.png")
    main, other = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in (*main.lines, *other.lines)}
    assert list(drawn["control task"]) == result.control.tolist()
    assert list(drawn["new examples of known groups"]) == result.shared_scores.tolist()
    assert list(drawn["patching"]) == [0.1, 0.9]
    assert {"chance"} <= drawn.keys()
    assert (tmp_path / "x.png").stat().st_size > 0
