"""The calls that lead to interventions, against hooks and formulas written by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

import families
import intervention
from activation_extraction import ActivationExtractor
from forward_pass import ArchitectureError, InputError, LayerError, Site, SiteError
from intervention import (
    ActivationPatch,
    SteeringVector,
    activation_of,
    activation_patch_experiment,
    generate_with_patching,
    mean_activation,
    noise,
    patch_and_run,
    path_patching,
    zero,
)
from intervention_handler import InterventionHandler
from model_architecture import Architecture
from patch_oracle import assert_untouched, hooked_logits, put, recorded, sites_of, state_of

CLEAN = [7, 11, 15, 6, 49, 10, 13]
CORRUPTED = [7, 11, 30, 6, 49, 21, 40]
D = families.HIDDEN


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


@pytest.fixture(scope="module")
def llama():
    return families.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


def draw(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(clean, corrupted, patched):
    """‖clean − patched‖ / ‖clean − corrupted‖, last position, in double."""
    a, b, c = (z[0, -1].double().numpy() for z in (clean, corrupted, patched))
    return np.sqrt(((a - c) ** 2).sum()) / np.sqrt(((a - b) ** 2).sum())


# --- Two prompts ----------------------------------------------------------------------------------


def test_path_patching_of_every_family(family):
    _, model = family
    found = path_patching(model, None, CLEAN, CORRUPTED)
    n = Architecture(model).n_layers
    clean, corrupted = (hooked_logits(model, ids, []) for ids in (CLEAN, CORRUPTED))
    assert list(found) == list(range(n))
    assert found[n - 1] == 1.0
    for layer in range(n - 1):
        site = Site("resid_post", layer)
        change = put(recorded(model, CORRUPTED, site)[0, -1], len(CLEAN) - 1)
        patched = hooked_logits(model, CLEAN, [(site, change)])
        assert found[layer] == pytest.approx(distance(clean, corrupted, patched), abs=1e-5)


def test_path_patching_of_unequal_prompts_and_other_metrics(llama):
    """The last position of the one is the last position of the other."""
    longer = [3, 9, *CORRUPTED]
    clean, corrupted = (hooked_logits(llama, ids, []) for ids in (CLEAN, longer))
    site = Site("resid_post", 0)
    change = put(recorded(llama, longer, site)[0, -1], len(CLEAN) - 1)
    patched = hooked_logits(llama, CLEAN, [(site, change)])
    found = path_patching(llama, None, CLEAN, longer, layers_to_test=["model.layers.2", 0])
    assert list(found) == [0, 2]
    assert found[0] == pytest.approx(distance(clean, corrupted, patched), abs=1e-5)
    assert found[2] == 1.0
    by_logit = path_patching(llama, None, CLEAN, longer, metric="logit", answer=40)
    assert by_logit[0] == pytest.approx(float(patched[0, -1, 40]), abs=1e-4)
    mine = path_patching(llama, None, CLEAN, longer, metric=lambda z: z[0, 0, 3])
    assert mine[0] == pytest.approx(float(patched[0, 0, 3]), abs=1e-4)
    normalized = path_patching(
        llama, None, CLEAN, longer, metric="logit", answer=40, normalize=True
    )
    ends = float(clean[0, -1, 40]), float(corrupted[0, -1, 40])
    share = (float(patched[0, -1, 40]) - ends[1]) / (ends[0] - ends[1])
    assert normalized[0] == pytest.approx(share, abs=1e-4)
    both = path_patching(llama, None, [CLEAN, CLEAN], [longer, CORRUPTED])
    alone = path_patching(llama, None, CLEAN, CORRUPTED)
    assert both[0] == pytest.approx((found[0] + alone[0]) / 2, abs=1e-5)


def test_path_patching_between_equal_prompts_has_no_effect(gpt2):
    assert path_patching(gpt2, None, CLEAN, CLEAN) == {0: 0.0, 1: 0.0, 2: 0.0}


@pytest.mark.parametrize("position", [-1, 4, 2])
@pytest.mark.parametrize("site", ["resid_post", "attn_out", "value", "attn_pattern"])
def test_activation_patch_experiment(llama, position, site):
    found = activation_patch_experiment(llama, None, CLEAN, CORRUPTED, "layers.1", position, site)
    place = position % len(CLEAN)
    where = Site(site, 1)
    change = put(recorded(llama, CORRUPTED, where)[0, place], place)
    expected = [
        hooked_logits(llama, CLEAN, []),
        hooked_logits(llama, CORRUPTED, []),
        hooked_logits(llama, CLEAN, [(where, change)]),
    ]
    for name, logits in zip(("clean", "corrupted", "patched"), expected, strict=True):
        torch.testing.assert_close(found[f"{name}_logits"], logits, rtol=0, atol=2e-5)
    assert found["effect"] == pytest.approx(distance(*expected), abs=1e-5)
    wanted = {"layer": 1, "layer_name": "model.layers.1", "position": place, "site": site}
    wanted |= {"clean_prompt": CLEAN, "corrupted_prompt": CORRUPTED, "metric": "distance"}
    assert {name: found[name] for name in wanted} == wanted


def test_activation_patch_experiment_on_unequal_prompts(llama, tokenizer):
    longer = [3, 9, *CORRUPTED]
    for clean, corrupted in ((CLEAN, longer), (longer, CLEAN)):
        found = activation_patch_experiment(llama, None, clean, corrupted, 1, -2, metric="kl")
        site = Site("resid_post", 1)
        change = put(recorded(llama, corrupted, site)[0, -2], len(clean) - 2)
        patched = hooked_logits(llama, clean, [(site, change)])
        torch.testing.assert_close(found["patched_logits"], patched, rtol=0, atol=2e-5)
        p, q = (
            found[name][0, -1].double().log_softmax(-1)
            for name in ("clean_logits", "patched_logits")
        )
        assert found["effect"] == pytest.approx(
            float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-6
        )
        assert found["position"] == len(clean) - 2
    with pytest.raises(
        InputError, match=r"\['a', ' cat'\] and \['a', ' cat', ' sat'\].*align='end'|2 and 3 tokens"
    ):
        activation_patch_experiment(llama, tokenizer, "a cat", "a cat sat", 1, 0)
    with pytest.raises(InputError, match="no counterpart among 2 tokens"):
        activation_patch_experiment(llama, None, CLEAN, CLEAN[:2], 1, -3)
    with pytest.raises(InputError, match="position 7 is out of range"):
        activation_patch_experiment(llama, None, CLEAN, CORRUPTED, 1, 7)


# --- patch_and_run --------------------------------------------------------------------------------


def test_patch_and_run(gpt2, tokenizer):
    ids = tokenizer("a cat sat on a cat")["input_ids"]
    value = draw(D)
    patch = ActivationPatch("h.1", [2, -1], value, "add", "mlp_out")

    def change(shown):
        new = shown.clone()
        new[0, [2, -1]] += value
        return new

    expected = hooked_logits(gpt2, ids, [(Site("mlp_out", 1), change)])
    for prompt in ("a cat sat on a cat", ids, torch.tensor(ids)):
        found = patch_and_run(gpt2, tokenizer, prompt, patch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not found.requires_grad
    steer = SteeringVector(value, 0, 2.0)
    both = patch_and_run(gpt2, None, ids, [patch, steer])
    changes = [(Site("mlp_out", 1), change), (Site("resid_post", 0), lambda h: h + 2 * value)]
    torch.testing.assert_close(both, hooked_logits(gpt2, ids, changes), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("patches", "error", "message"),
    [
        ([], InputError, "patches is empty"),
        (ActivationPatch(1, 7, 0.0), InputError, "position 7 is out of range.*7 tokens"),
        (ActivationPatch(1, [0, -8], 0.0), InputError, "position -8 is out of range"),
        (SteeringVector(draw(D), 1, positions=[9]), InputError, "position 9 is out of range"),
        (ActivationPatch(1, "generated", 0.0), InputError, "nothing is generated here"),
        (ActivationPatch(1, slice(5, 5), 0.0), InputError, "never took effect"),
        (ActivationPatch(5, 0, 0.0), LayerError, "layer 5 is out of range"),
        ([ActivationPatch(1, 0, 0.0, head=0)], SiteError, "no head axis"),
        ("steer", InputError, "not str"),
    ],
)
def test_patch_and_run_refuses(gpt2, patches, error, message):
    with pytest.raises(error, match=message):
        patch_and_run(gpt2, None, CLEAN, patches)


def test_a_model_without_head_is_refused(gpt2):
    with pytest.raises(ArchitectureError, match="patching needs the language-model head"):
        patch_and_run(gpt2.transformer, None, CLEAN, ActivationPatch(1, 0, 0.0))


def test_nothing_is_left_behind(gpt2, tokenizer):
    Architecture(gpt2).structure  # noqa: B018 - what it leaves is another test's
    before = state_of(gpt2)
    patch = ActivationPatch(1, None, 0.5, "scale")
    patch_and_run(gpt2, tokenizer, CLEAN, patch)
    generate_with_patching(gpt2, tokenizer, CLEAN, patch, 3)
    activation_patch_experiment(gpt2, None, CLEAN, CORRUPTED, 1)
    path_patching(gpt2, None, CLEAN, CORRUPTED)
    with pytest.raises(ZeroDivisionError):
        patch_and_run(gpt2, None, CLEAN, ActivationPatch(1, 0, lambda _h: 1 / 0))
    with pytest.raises(InputError):
        generate_with_patching(gpt2, tokenizer, CLEAN, ActivationPatch(1, 60, 0.0), 3)
    assert_untouched(gpt2, before)


def test_dropout_is_off_and_back_on():
    model = families.build("gpt2", resid_pdrop=0.5)
    patch = ActivationPatch(1, 2, 0.0)
    expected = patch_and_run(model, None, CLEAN, patch)
    model.train()
    assert torch.equal(patch_and_run(model, None, CLEAN, patch), expected)
    assert all(module.training for module in model.modules())


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, "prompt", "generated", -1, [1, 9]])
def test_generate_with_patching_by_a_loop(gpt2, tokenizer, where):
    """Token by token, each from one hooked pass over the whole text."""
    push = 12 * draw(D, seed=8)
    prompt = CLEAN
    ids = list(prompt)
    for _ in range(6):

        def change(shown):
            places = {
                None: range(shown.shape[1]),
                "prompt": range(len(prompt)),
                "generated": range(len(prompt), shown.shape[1]),
                -1: [len(prompt) - 1],
            }.get(where if not isinstance(where, list) else 0, [1, 9])
            new = shown.clone()
            for place in places:
                if place < shown.shape[1]:
                    new[0, place] += push
            return new

        logits = hooked_logits(gpt2, ids, [(Site("resid_post", 1), change)])
        ids.append(int(logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    for cached in (True, False):
        patch = ActivationPatch(1, where, push, "add")
        text = generate_with_patching(gpt2, tokenizer, prompt, patch, 6, use_cache=cached)
        assert text == expected
    assert text != generate_with_patching(
        gpt2, tokenizer, prompt, ActivationPatch(1, None, 1.0, "scale"), 6
    )


def test_a_position_that_is_never_generated(gpt2, tokenizer):
    with pytest.raises(InputError, match=r"position 30.*never took effect"):
        generate_with_patching(gpt2, tokenizer, CLEAN, ActivationPatch(1, 30, 0.0), 4)


# --- Values ---------------------------------------------------------------------------------------


def test_zero_ablates(llama):
    for site in sites_of(llama):
        expected = hooked_logits(llama, CLEAN, [(site, torch.zeros_like)])
        found = patch_and_run(llama, None, CLEAN, ActivationPatch(1, None, zero, site=site.name))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_resampling(llama):
    for site in sites_of(llama, ("mlp_out", "key", "head_out")):
        record = activation_of(llama, None, CORRUPTED, "1", site.name)
        there = recorded(llama, CORRUPTED, site)[0]
        expected = hooked_logits(llama, CLEAN, [(site, put(there[2], 2))])
        found = patch_and_run(llama, None, CLEAN, ActivationPatch(1, 2, record, site=site.name))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_mean_over_prompts(family):
    """Over all tokens of prompts of any length, or over one token of each."""
    _, model = family
    prompts = [CLEAN, CORRUPTED[:4], [9, 12]]
    for site in sites_of(model, ("resid_post", "value", "mlp_neurons")):
        rows = [recorded(model, ids, site)[0] for ids in prompts]
        everything = sum(row.sum(0) for row in rows) / 13
        found = mean_activation(model, None, prompts, site.layer, site.name)
        torch.testing.assert_close(found, everything, rtol=0, atol=1e-5)
        last = sum(row[-1] for row in rows) / 3
        found = mean_activation(model, None, prompts, site.layer, site.name, position=-1)
        torch.testing.assert_close(found, last, rtol=0, atol=1e-5)


def test_mean_refuses(llama):
    with pytest.raises(InputError, match="prompts is empty"):
        mean_activation(llama, None, [], 1)
    with pytest.raises(InputError, match="have no mean"):
        mean_activation(llama, None, [CLEAN], 1, "attn_pattern")


def test_mean_is_float32_at_least():
    model = families.build("llama").bfloat16()
    assert mean_activation(model, None, [CLEAN], 1).dtype == torch.float32


def test_noise_is_gaussian_and_a_tokens_own():
    base = torch.zeros(40, 50, 30)
    drawn = noise(2.0, seed=1)(base)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(2.0, abs=0.03)
    flat = drawn.view(-1, 30)
    correlations = np.corrcoef(flat[:300].numpy()) - np.eye(300)
    assert np.abs(correlations).max() < 0.95  # no two tokens share theirs
    assert torch.equal(noise(2.0, seed=1)(base), drawn)
    assert not torch.equal(noise(2.0, seed=2)(base), drawn)
    assert torch.equal(noise(0.0)(base + 1), base + 1)
    state = torch.random.get_rng_state()
    noise(1.0)(base)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("where", [None, "prompt", "generated", [8, 2]])
def test_noise_is_the_same_with_and_without_a_cache(name, where):
    model = families.build(name)
    mask = torch.tensor([[0, 0, *[1] * 5], [1] * 7])
    ids = torch.tensor([[0, 0, *CLEAN[:5]], CORRUPTED])
    found = []
    for cached in (True, False):
        handler = InterventionHandler(model)
        handler.register_activation_patch(ActivationPatch(1, where, noise(3.0)))
        with handler, torch.no_grad():
            output = model.generate(
                ids, attention_mask=mask, use_cache=cached, do_sample=False, max_new_tokens=6,
                pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        found.append(torch.stack(output.logits))
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


def test_a_record_of_shapes_alone(llama, tmp_path):
    extractor = ActivationExtractor(llama, None)
    record = extractor.extract_activations(CLEAN, layer_indices=[1])
    path = Path(tmp_path) / "record.json"
    extractor.save_activations(record, path, format="json")
    shapes = extractor.load_activations(path)
    with pytest.raises(InputError, match="shapes only"):
        patch_and_run(llama, None, CLEAN, ActivationPatch(1, 0, shapes))


def test_everything_that_is_promised_is_there():
    assert not [name for name in intervention.__all__ if not hasattr(intervention, name)]
    assert intervention.__all__ == sorted(intervention.__all__, key=lambda n: (n[0].islower(), n))
