"""Ablating features one by one, against hooked passes, finite differences and autograd."""

import copy
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import families
from activation_extraction import ActivationExtractor
from feature_attribution import (
    FeatureAttribution,
    attribute_features,
    compute_feature_attribution,
)
from forward_pass import ArchitectureError, InputError, LayerError, Site, SiteError, edit
from logit_metrics import Metric
from model_architecture import Architecture
from patch_oracle import assert_untouched, hooked_logits, recorded, sites_of, state_of

PROMPT = [7, 11, 15, 6, 49, 10, 13]
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_neurons")


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


def logit_of_best(logits, best):
    return float(logits[0, -1, best])


def with_feature(model, site, place, feature, value):
    def change(shown):
        new = shown.clone()
        new[0, place, feature] = value
        return new

    return hooked_logits(model, PROMPT, [(site, change)])


def test_exact_importance_is_what_a_hooked_pass_loses(family):
    name, model = family
    place = 6 if list(families.FAMILIES).index(name) % 2 else 3
    plain = hooked_logits(model, PROMPT, [])
    best = int(plain[0, -1].argmax())
    for number, site in enumerate(sites_of(model, SITES)):
        position = place - len(PROMPT) if number % 2 else place
        found = attribute_features(model, None, PROMPT, str(site.layer), position, site=site.name)
        activation = recorded(model, PROMPT, site)[0, place]
        assert found.features == tuple(range(len(activation)))
        np.testing.assert_allclose(found.activation, activation, atol=1e-5)
        assert found.position == place
        for feature in (number, len(activation) - 1 - number):
            without = with_feature(model, site, place, feature, 0.0)
            lost = logit_of_best(plain, best) - logit_of_best(without, best)
            assert found.importance[feature] == pytest.approx(lost, abs=1e-4)


def test_gradients_of_every_family(family):
    """By autograd through an edit of one's own, whatever the model adds in place."""
    _, model = family
    best = int(hooked_logits(model, PROMPT, [])[0, -1].argmax())
    for site in sites_of(model, SITES):
        found = attribute_features(model, None, PROMPT, site.layer, 4, site=site.name)
        leaf = []

        def watch(value, leaf=leaf):
            leaf[:] = [value.detach().requires_grad_()]
            return leaf[0] * 1.0

        with edit(Architecture(model), [(site, watch)]):
            logits = model(torch.tensor([PROMPT]), use_cache=False).logits
            (slope,) = torch.autograd.grad(logits[0, -1, best], leaf[0])
        expected = (leaf[0].detach() * slope)[0, 4]
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found.gradient, expected, rtol=0, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "falcon"])
def test_gradients_are_slopes(name):
    """Against finite differences, on models that compute all in double."""
    model = families.build(name).double()
    plain = hooked_logits(model, PROMPT, [])
    best = int(plain[0, -1].argmax())
    target = 0.25
    for site in sites_of(model, SITES):
        found = attribute_features(
            model, None, PROMPT, site.layer, 4, site=site.name, ablate_to=target, features=[0, 5, 9]
        )
        activation = recorded(model, PROMPT, site)[0, 4]
        for i, feature in enumerate((0, 5, 9)):
            here, step = float(activation[feature]), 1e-3
            up, down = (
                logit_of_best(with_feature(model, site, 4, feature, here + s), best)
                for s in (step, -step)
            )
            expected = (here - target) * (up - down) / (2 * step)
            assert found.gradient[i] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_where_the_metric_is_linear_both_answers_agree(gpt2):
    """The stream after the last block, with the norm taken out, meets a matrix and nothing else."""
    model = families.build("gpt2")
    model.transformer.ln_f = torch.nn.Identity()
    found = attribute_features(model, None, PROMPT, -1)
    row = model.lm_head.weight[int(hooked_logits(model, PROMPT, [])[0, -1].argmax())]
    stream = recorded(model, PROMPT, Site("resid_post", 2))[0, -1]
    expected = (stream * row).detach().numpy()
    np.testing.assert_allclose(found.importance, expected, atol=2e-4)
    np.testing.assert_allclose(found.gradient, expected, atol=1e-4)
    assert found.correlation == pytest.approx(1.0)
    assert found.correlation == pytest.approx(np.corrcoef(found.importance, found.gradient)[0, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["resid_post", "mlp_neurons"])
def test_an_unlikely_token_in_float16(name, site):
    """The gradient at the logits is far below what float16 holds; the same weights in float32."""
    half = families.build(name).half()
    exact = copy.deepcopy(half).float()
    chances = exact(torch.tensor([PROMPT])).logits[0, -1].detach().double().softmax(-1)
    answer = int((chances / 1e-12).log().abs().argmin())
    assert float(chances[answer]) < 1e-9
    found, wanted = (
        attribute_features(each, None, PROMPT, 1, site=site, metric="prob", answer=answer)
        for each in (half, exact)
    )
    size = np.abs(wanted.gradient).max()
    assert size > 0
    np.testing.assert_allclose(found.gradient, wanted.gradient, rtol=0, atol=0.05 * size)


def test_a_chosen_few_keep_their_names(gpt2, tmp_path):
    """Feature 17 is feature 17, also where only three were asked for."""
    whole = attribute_features(gpt2, None, PROMPT, 1)
    features = [17, 3, 30]
    some = attribute_features(gpt2, None, PROMPT, 1, features=features)
    np.testing.assert_allclose(some.importance, whole.importance[features], atol=1e-4)
    np.testing.assert_allclose(some.gradient, whole.gradient[features], atol=1e-4)
    strongest = max(features, key=lambda feature: abs(whole.importance[feature]))
    assert some.top(1)[0][0] == strongest
    assert list(some.to_frame()["feature"]) == features
    pairs = compute_feature_attribution(gpt2, None, PROMPT, 1, features=features)
    assert {feature for feature, _ in pairs} == set(features)
    assert pairs == some.top(10)
    labels = [t.get_text() for t in some.plot().axes[0].get_yticklabels()]
    assert labels[0] == str(strongest)
    some.save(tmp_path / "few.safetensors")
    assert FeatureAttribution.load(tmp_path / "few.safetensors").features == (17, 3, 30)


def test_values_to_ablate_to(gpt2):
    mean = torch.linspace(-1, 1, families.HIDDEN)
    found = attribute_features(gpt2, None, PROMPT, 1, 2, ablate_to=mean)
    plain = hooked_logits(gpt2, PROMPT, [])
    best = int(plain[0, -1].argmax())
    for feature in (0, 20):
        without = with_feature(gpt2, Site("resid_post", 1), 2, feature, float(mean[feature]))
        lost = logit_of_best(plain, best) - logit_of_best(without, best)
        assert found.importance[feature] == pytest.approx(lost, abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "by_hand"),
    [
        ("log_prob", lambda z: z[0, -1].log_softmax(-1)[40]),
        ("prob", lambda z: z[0, -1].softmax(-1)[40]),
        ("logit_diff", lambda z: z[0, -1, 40] - z[0, -1, 12]),
        (lambda z: z[0, 2, 5] * z[0, -1, 3], lambda z: z[0, 2, 5] * z[0, -1, 3]),
        (
            Metric("two", "", lambda z: z[:, 0, 5] + z[:, 1, 6], read=(1, -1)),
            lambda z: z[0, 1, 5] + z[0, -1, 6],
        ),
    ],
    ids=["log_prob", "prob", "logit_diff", "function", "Metric"],
)
def test_metrics(gpt2, metric, by_hand):
    options = {"answer": 40} if isinstance(metric, str) else {}
    options |= {"foil": 12} if metric == "logit_diff" else {}
    found = attribute_features(gpt2, None, PROMPT, 1, 1, metric=metric, **options)
    site = Site("resid_post", 1)
    plain = float(by_hand(hooked_logits(gpt2, PROMPT, [])))
    leaf = []

    def watch(value):
        leaf[:] = [value.detach().requires_grad_()]
        return leaf[0].clone()

    with edit(Architecture(gpt2), [(site, watch)]):
        (slope,) = torch.autograd.grad(by_hand(gpt2(torch.tensor([PROMPT])).logits), leaf[0])
    expected = (leaf[0].detach() * slope)[0, 1]
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-3, atol=1e-5)
    for feature in (4, 21):
        without = float(by_hand(with_feature(gpt2, site, 1, feature, 0.0)))
        assert found.importance[feature] == pytest.approx(plain - without, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "metric",
    ["rank", lambda z: float(z[0, -1, 3]), lambda z: z[0, -1].numpy().max(), lambda _z: 1],
    ids=["rank", "float", "numpy", "constant"],
)
def test_metrics_without_gradient_say_so(gpt2, metric):
    found = attribute_features(gpt2, None, PROMPT, 1, metric=metric)
    assert np.isnan(found.gradient).all()
    assert np.isfinite(found.importance).all()
    assert np.isnan(found.correlation)
    found.plot()


def test_the_call_that_users_write(gpt2):
    tokenizer = families.tiny_tokenizer()
    text = "a cat sat on a cat"
    found = compute_feature_attribution(gpt2, tokenizer, text, "transformer.h.1", n_features=5)
    whole = attribute_features(gpt2, tokenizer, text, 1)
    assert len(found) == 5
    sizes = [abs(value) for _, value in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == np.abs(whole.importance).max()
    assert all(whole.importance[feature] == value for feature, value in found)
    assert whole.tokens[whole.position] == " cat"
    assert repr(whole).startswith("FeatureAttribution(resid_post of layer 1 at ' cat', logit ")
    neurons = compute_feature_attribution(
        gpt2, tokenizer, text, 1, site="mlp_neurons", n_features=99
    )
    assert len(neurons) == families.INTERMEDIATE


def test_save_load_and_frame(gpt2, tmp_path):
    found = attribute_features(gpt2, None, PROMPT, 1, 3)
    found.save(tmp_path / "features.safetensors")
    loaded = FeatureAttribution.load(tmp_path / "features.safetensors")
    for field in dataclasses.fields(FeatureAttribution):
        ours, theirs = getattr(found, field.name), getattr(loaded, field.name)
        assert np.array_equal(ours, theirs)
        assert type(ours) is type(theirs)
    frame = found.to_frame()
    assert list(frame.columns) == ["feature", "activation", "importance", "gradient"]
    assert list(frame["importance"]) == found.importance.tolist()
    with pytest.raises(InputError, match="one entry per feature"):
        dataclasses.replace(found, features=(1, 2))
    with pytest.raises(InputError, match="at least 1; came 0"):
        found.top(0)


def test_the_picture(gpt2, tmp_path):
    found = attribute_features(gpt2, None, PROMPT, 1, 3)
    figure = found.plot(n_features=4, save_path=tmp_path / "features.png")
    bars, points = figure.axes
    assert [bar.get_width() for bar in bars.patches] == [value for _, value in found.top(4)]
    np.testing.assert_allclose(
        points.collections[0].get_offsets(), np.stack([found.gradient, found.importance], 1)
    )
    assert points.get_title() == f"correlation {found.correlation:.3f}"
    assert (tmp_path / "features.png").stat().st_size > 1000
    assert plt.get_fignums() == []


def test_the_model_is_as_it_was(family):
    _, model = family
    attribute_features(model, None, PROMPT, 1, features=[0])
    before = state_of(model)
    attribute_features(model, None, PROMPT, 1, features=[0, 1])
    with pytest.raises(ZeroDivisionError):
        attribute_features(model, None, PROMPT, 1, metric=lambda _z: 1 / 0)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_name": 3}, LayerError, "layer 3 is out of range"),
        ({"site": "head_out"}, SiteError, r"head_out holds \(4, 8\) per token.*patching_sweep"),
        ({"site": "nowhere"}, SiteError, "no site 'nowhere'"),
        ({"metric": "kl"}, InputError, "metric 'kl' compares two prompts"),
        ({"metric": "loss"}, InputError, "no metric 'loss'"),
        ({"metric": "logit_diff"}, InputError, "answer and foil are both"),
        ({"position": 7}, InputError, "position 7 is out of range"),
        ({"position": [1, 2]}, InputError, r"one token.*\[1, 2\]"),
        ({"features": [32]}, InputError, r"whole numbers 0\.\.31, at least one; came \[32\]"),
        ({"features": [-1]}, InputError, r"whole numbers 0\.\.31"),
        ({"features": [1.9]}, InputError, r"whole numbers 0\.\.31.*came \[1\.9\]"),
        ({"features": [True]}, InputError, r"whole numbers .*came \[True\]"),
        ({"features": 3}, InputError, "at least one; came 3"),
        ({"foil": 3}, InputError, "foil=3 was given, and the metric 'logit' compares no two"),
        ({"metric": lambda z: z[0, -1, 3], "answer": 3}, InputError, "answer=3 was given, and"),
        ({"metric": Metric("m", "", lambda z: z[:, 0, 0], (7,))}, InputError, "position 7 is out"),
        ({"features": []}, InputError, "at least one"),
        ({"ablate_to": torch.zeros(3)}, InputError, r"a number, or one for each .*\[32\].*\[3\]"),
        ({"answer": 99}, InputError, "token id 99"),
    ],
)
def test_refused(gpt2, options, error, message):
    arguments = {"layer_name": 1} | options
    with pytest.raises(error, match=message):
        attribute_features(gpt2, None, PROMPT, **arguments)


def test_refused_by_the_short_call(gpt2):
    with pytest.raises(InputError, match="n_features must be at least 1; came 0"):
        compute_feature_attribution(gpt2, None, PROMPT, 1, n_features=0)
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        compute_feature_attribution(gpt2.transformer, None, PROMPT, 1)


def test_a_record_gives_the_same_activation(gpt2):
    record = ActivationExtractor(gpt2, None).extract_activations(PROMPT, layer_indices=[1])
    found = attribute_features(gpt2, None, PROMPT, 1, 2)
    np.testing.assert_allclose(found.activation, record.layer_activations[1][0, 2], atol=1e-5)
