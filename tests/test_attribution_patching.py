"""Attribution patching against autograd by hand, small steps of hooked runs, exact patching."""

import copy
import dataclasses
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import attribution_patching as module_under_test
import families
from attention_correction import Attention, ScoreRule, fit_scores, key_effects, query_effects
from attribution_patching import attribution_patching, attribution_sweeps
from attribution_sweep import AttributionSweep
from forward_pass import (
    ArchitectureError,
    InputError,
    RecordFileError,
    Site,
    SiteError,
    edit,
    record,
    recording,
)
from gradient_record import run_plain, run_with_graph
from logit_metrics import Metric
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from patch_oracle import assert_untouched, by_token, hooked_logits, recorded, state_of
from patching_sweep import patching_sweep
from saved_files import read_after_damage
from sweep_cells import DEFAULT_AXES, HEAD_SITES
from sweep_result import SweepResult

CLEAN = [7, 11, 15, 6, 49, 10, 13]
CORRUPTED = [7, 11, 30, 6, 49, 21, 13]
ANSWER, FOIL = 40, 12
TOKENS = {"answer": ANSWER, "foil": FOIL, "show_progress": False}


def difference(logits):
    return float(logits[0, -1, ANSWER].double() - logits[0, -1, FOIL].double())


def sites_with(model):
    arch = Architecture(model)
    return [
        name
        for name in DEFAULT_AXES
        if any(not arch.missing(Site(name, i)) for i in range(arch.n_layers))
    ]


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


# --- By hand, with PyTorch's own hooks ------------------------------------------------------------

BY_HAND = {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp", "mlp.c_proj", "attn.c_proj"),
    "llama": ("model.layers", "self_attn.o_proj", "mlp", "mlp.down_proj", "self_attn.o_proj"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm",
               "mlp.down_proj", "self_attn.o_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp", "mlp.dense_4h_to_h",
                 "attention.dense"),
}  # fmt: skip
"""Blocks; the modules whose outputs attention and MLP add; those whose inputs neurons and z are."""


def tensors_by_hand(model, name, ids):
    """Run a model with plain hooks; ``{(site, layer): tensor in the graph}`` and the logits."""
    path, attn, mlp, down, out_proj = BY_HAND[name]
    blocks, kept, handles = model.get_submodule(path), {}, []

    def after(key):
        def hook(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.retain_grad()
            kept[key] = hidden

        return hook

    def before(key):
        def hook(_module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden.retain_grad()
            kept[key] = hidden

        return hook

    for layer, block in enumerate(blocks):
        handles += [
            block.register_forward_pre_hook(before(("resid_pre", layer)), with_kwargs=True),
            block.register_forward_hook(after(("resid_post", layer))),
        ]
        for part, site in ((attn, "attn_out"), (mlp, "mlp_out")):
            hook = after((site, layer))
            handles.append(block.get_submodule(part).register_forward_hook(hook))
        for part, site in ((down, "mlp_neurons"), (out_proj, "head_out")):
            hook = before((site, layer))
            handles.append(
                block.get_submodule(part).register_forward_pre_hook(hook, with_kwargs=True)
            )
    logits = model(torch.tensor([ids]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return kept, logits


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", BY_HAND)
def test_autograd_by_hand_with_plain_hooks(name, direction):
    model = families.build(name)
    names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neurons")
    axes = {site: ("layer", "position") for site in names}
    axes |= {"head_out": ("layer", "position", "head"), "mlp_neurons": ("layer", "neuron")}
    found = attribution_sweeps(
        model, None, CLEAN, CORRUPTED, names, axes=axes, direction=direction, **TOKENS
    )
    own = copy.deepcopy(model)
    base, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    there, _ = tensors_by_hand(own, name, source)
    here, logits = tensors_by_hand(own, name, base)
    (logits[0, -1, ANSWER] - logits[0, -1, FOIL]).backward()
    heads = model.config.num_attention_heads
    with torch.no_grad():
        for site in names:
            for layer in range(len(found[site].labels[0])):
                mine, other = here[site, layer], there[site, layer]
                product = ((other - mine) * mine.grad)[0].double()
                if site == "head_out":
                    product = product.unflatten(-1, (heads, -1)).sum(-1)
                elif site == "mlp_neurons":
                    product = product.sum(0)
                else:
                    product = product.sum(-1)
                np.testing.assert_allclose(
                    found[site].effects[layer], product.numpy(), rtol=1e-4, atol=2e-5
                )
    largest = max(np.abs(found[site].effects).max() for site in names)
    assert largest > 0.1


# --- To first order ------------------------------------------------------------------------------


def everywhere(model, ids, sites):
    """Return what stands at each site, ``[1, position, …]``."""
    run = record(Architecture(model), {"input_ids": torch.tensor([ids])}, sites)
    return {site: by_token(run[site], site) for site in sites}


def test_small_steps_go_the_way_of_the_estimate(family):
    """A hooked pass that goes ε of the way moves the metric by ε times the estimate, up to ε²."""
    name, model = family
    if name not in ("mixtral", "qwen2_moe", "gpt_oss"):  # whose kernels know no float64
        model = families.build(name).double()
    names = sites_with(model)
    direction = ("denoising", "noising")[list(families.FAMILIES).index(name) % 2]
    base, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    found = attribution_sweeps(
        model, None, CLEAN, CORRUPTED, names, axes=("layer",), direction=direction, **TOKENS
    )
    start = difference(hooked_logits(model, base, []))
    rows = {site: len(found[site].labels[0]) // 2 for site in names}
    sites = [Site(site, found[site].labels[0][rows[site]]) for site in names]
    here, there = (everywhere(model, ids, sites) for ids in (base, source))
    errors = {}
    for size in (0.02, 0.01):
        errors[size] = []
        for site in sites:
            result = found[site.name]
            target = here[site] + size * (there[site] - here[site])
            moved = difference(hooked_logits(model, base, [(site, lambda _, t=target: t)])) - start
            errors[size].append(moved / size - result.effects[rows[site.name]])
            assert result.start == pytest.approx(start, abs=1e-4)
    effects = np.concatenate([found[site].effects for site in names])
    scale = np.abs(effects).max()
    noise = 2e-5 * (1 + abs(start)) / 0.01
    assert scale > 0.1
    coarse, fine = (np.linalg.norm(errors[size]) for size in (0.02, 0.01))
    assert fine < 0.05 * scale + noise
    assert fine < 0.6 * coarse + noise  # it halves: what is left is the second order


def test_cells_are_parts_of_what_is_exchanged_at_once(family):
    """The estimate is linear: positions, heads and neurons of a layer sum to the layer's."""
    _, model = family
    names = sites_with(model)
    kinds = {site: "head" if site in HEAD_SITES else "neuron" for site in names}
    whole_of, parts_of = (
        attribution_sweeps(model, None, CLEAN, CORRUPTED, names, axes=axes, **TOKENS)
        for axes in (("layer",), {site: ("layer", "position", kinds[site]) for site in names})
    )
    for site in names:
        whole, parts = whole_of[site], parts_of[site]
        np.testing.assert_allclose(parts.effects.sum((1, 2)), whole.effects, rtol=1e-4, atol=1e-4)


def test_what_is_behind_everything_nonlinear_is_exact(gpt2):
    """With the final norm out of the way the last MLP's output goes linearly into the logits."""
    model = copy.deepcopy(gpt2)
    model.transformer.ln_f = nn.Identity()
    found = attribution_patching(
        model, None, CLEAN, CORRUPTED, "mlp_out", layers=[-1], exact=True, **TOKENS
    )
    np.testing.assert_allclose(found.values, found.exact, atol=1e-4)
    assert np.abs(found.effects).max() > 0.1


def test_unequal_prompts_are_aligned_from_the_end(gpt2):
    longer = [5, *CLEAN]
    found = attribution_patching(
        gpt2, None, longer, CORRUPTED, "resid_post", align="end", axes=("layer", "position"),
        **TOKENS,
    )  # fmt: skip
    for layer in range(3):
        site = Site("resid_post", layer)
        tape = run_with_graph(Architecture(gpt2), torch.tensor([CORRUPTED]), [site], [6])
        total = tape.logits[0, -1, ANSWER] - tape.logits[0, -1, FOIL]
        slope = tape.gradients(total)[site][0]
        change = recorded(gpt2, longer, site)[0, 1:] - recorded(gpt2, CORRUPTED, site)[0]
        expected = (change * slope).sum(-1)
        np.testing.assert_allclose(found.effects[layer], expected, atol=1e-4)


# --- The attention correction ---------------------------------------------------------------------


def attention_of(run, layer, row):
    return Attention(
        *(run[Site(name, layer)][row : row + 1] for name in ("query", "key", "attn_pattern"))
    )


def pattern_with(architecture, layer, site, value, position, head):
    """Return the pattern of the model's own code with one query or key exchanged."""

    def put(shown):
        new = shown.clone()
        chosen = slice(None) if position is None else position
        new[:, chosen, head] = value[:, chosen, head]
        return new

    where = Site("attn_pattern", layer)
    with torch.no_grad(), edit(architecture, [(Site(site, layer), put)]):
        with recording(architecture, [where]) as kept:
            architecture.model(torch.tensor([CORRUPTED]), use_cache=False)
    return kept[where].double()


def test_corrected_patterns_are_those_of_the_model_itself(family):
    name, model = family
    arch = Architecture(model)
    if name == "mamba":
        pytest.skip("it does not attend")
    layer = arch.n_layers - 1
    sites = [Site(part, layer) for part in ("query", "key", "attn_pattern")]
    run = run_plain(arch, torch.tensor([CORRUPTED, CLEAN]), sites, [6])
    base, other = attention_of(run, layer, 0), attention_of(run, layer, 1)
    cap = getattr(arch.config, "attn_logit_softcapping", None)
    rule = fit_scores((base, other), cap, "the block")
    assert rule.cap == (1.5 if name == "gemma2" else None)
    slope = torch.randn(base.pattern.shape, generator=torch.Generator().manual_seed(1))
    places = torch.arange(7)
    queries = query_effects(rule, base, slope, other.query, places)
    keys = key_effects(rule, base, slope, other.key, places, False)
    all_keys = key_effects(rule, base, slope, other.key, places, True)
    before = base.pattern.double()

    def effect(site, position, head):
        value = getattr(other, site)
        after = pattern_with(arch, layer, site, value, position, head)
        return float(((after - before) * slope.double()).sum())

    for head, position in ((0, 2), (1, 5), (queries.shape[-1] - 1, 6)):
        expected = effect("query", position, head)
        assert float(queries[0, position, head]) == pytest.approx(expected, abs=5e-6)
    for head, position in ((0, 2), (keys.shape[-1] - 1, 5)):
        expected = effect("key", position, head)
        assert float(keys[0, position, head]) == pytest.approx(expected, abs=5e-6)
    head = keys.shape[-1] - 1
    assert float(all_keys[0, 0, head]) == pytest.approx(effect("key", None, head), abs=5e-6)
    assert max(float(queries.abs().max()), float(keys.abs().max())) > 0.01


@pytest.mark.parametrize("site", ["query", "key"])
@pytest.mark.parametrize("axes", [("layer", "head"), ("layer", "head", "position")])
def test_the_correction_is_exact_where_all_behind_the_pattern_is_linear(gpt2, site, axes):
    model = copy.deepcopy(gpt2)
    model.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.weight.zero_()
    chosen = {"axes": axes, "layers": [-1], "exact": True, **TOKENS}
    plain = attribution_patching(model, None, CLEAN, CORRUPTED, site, **chosen)
    better = attribution_patching(
        model, None, CLEAN, CORRUPTED, site, attention_correction=True, **chosen
    )
    np.testing.assert_allclose(better.values, better.exact, atol=1e-4)
    assert np.abs(plain.values - plain.exact).max() > 0.01
    assert (better.attention_correction, plain.attention_correction) == (True, False)


def test_a_saturated_softmax_is_seen():
    """One key has all the attention up to 1e-13, and loses it: plain gradients see nothing."""
    scores = torch.tensor([0.0, 30.0])
    pattern = scores.softmax(-1).expand(1, 1, 2, 2).tril().clone()
    pattern[0, 0, 0, 0] = 1
    run = Attention(torch.ones(1, 2, 1, 1), torch.tensor([[[[0.0]], [[30.0]]]]), pattern)
    slope = torch.tensor([[[[0.0, 0.0], [5.0, 1.0]]]])
    new = torch.tensor([[[[-30.0]]]])
    found = key_effects(ScoreRule(1.0), run, slope, new, torch.tensor([1]), False)
    after = torch.tensor([0.0, -30.0], dtype=torch.float64).softmax(-1)
    expected = float((after * slope[0, 0, 1].double()).sum()) - 1
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(4.0, abs=1e-6)
    together = key_effects(ScoreRule(1.0), run, slope, new, torch.tensor([1]), True)
    assert float(together) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [-100.0, 100.0])
def test_scores_that_move_far_beside_a_sink(factor):
    """One key, one sink whose score stays: all goes to the key, or nothing; no number overflows."""
    ones = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    pattern = torch.tensor([[[[0.25]]]], dtype=torch.float64)
    run, slope = Attention(ones, ones, pattern), torch.full_like(pattern, 3.0)
    rule, places = ScoreRule(10.0), torch.tensor([0])
    expected = 3.0 * ((1.0 if factor > 0 else 0.0) - 0.25)
    found = (
        query_effects(rule, run, slope, factor * ones, places),
        key_effects(rule, run, slope, factor * ones, places, together=True),
        key_effects(rule, run, slope, factor * ones, places, together=False),
    )
    for each in found:
        assert float(each) == pytest.approx(expected, abs=1e-9)


def test_scores_that_are_no_function_of_the_product_are_refused():
    generator = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(2):
        query, key = (torch.randn(1, 5, 2, 8, generator=generator) for _ in range(2))
        products = torch.einsum("rqhd,rkhd->rhqk", query, key)
        scores = torch.where(torch.ones(5, 5).tril() > 0, products**2, -torch.inf)
        runs.append(Attention(query, key, scores.softmax(-1)))
    with pytest.raises(ArchitectureError, match="block 3 are no known function"):
        fit_scores((runs[0], runs[1]), None, "block 3")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_low_precision_stays_near_float32(name):
    wide = families.build(name)
    narrow = families.build(name).bfloat16()
    chosen = {"sites": ("query", "key", "head_out"), "attention_correction": True, **TOKENS}
    found, low = (attribution_sweeps(m, None, CLEAN, CORRUPTED, **chosen) for m in (wide, narrow))
    for site, result in found.items():
        assert np.isfinite(low[site].values).all()
        scale = np.abs(result.effects).max()
        np.testing.assert_allclose(low[site].effects, result.effects, atol=0.15 * scale)


@pytest.mark.parametrize(
    ("name", "site"), [("gpt2", "resid_pre"), ("gpt2", "query"), ("mamba", "resid_pre")]
)
def test_unlikely_tokens_in_float16(name, site):
    """Their probability's gradient is below what float16 holds."""
    half = families.build(name).half()
    exact = copy.deepcopy(half).float()
    order = hooked_logits(exact, CORRUPTED, [])[0, -1].argsort(descending=True)
    asked = {"metric": "prob", "answer": int(order[40]), "show_progress": False}
    asked |= {"attention_correction": site == "query", "grad_drop": True}
    found, wanted = (
        attribution_patching(each, None, CLEAN, CORRUPTED, site, **asked) for each in (half, exact)
    )
    scale = np.abs(wanted.effects).max()
    assert 0 < scale < 1e-9
    np.testing.assert_allclose(found.effects / scale, wanted.effects / scale, atol=0.06)
    np.testing.assert_allclose(found.dropped / scale, wanted.dropped / scale, atol=0.06)


# --- GradDrop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_dropped_gradients_by_hand(name):
    """A block's Jacobian is the identity where its output is its input plus a constant."""
    model = families.build(name)
    names = ("resid_pre", "resid_post", "head_out", "mlp_out")
    found = attribution_sweeps(
        model, None, CLEAN, CORRUPTED, names, axes=("layer", "position"), grad_drop=True, **TOKENS
    )
    own = copy.deepcopy(model)
    there, _ = tensors_by_hand(own, name, CLEAN)
    blocks = own.get_submodule(BY_HAND[name][0])
    sizes = {site: np.zeros_like(found[site].values) for site in names}
    for dropped in range(len(blocks)):

        def straight(_module, args, kwargs, output):
            entered = args[0] if args else kwargs["hidden_states"]
            hidden = output[0] if isinstance(output, tuple) else output
            new = entered + (hidden - entered).detach()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = blocks[dropped].register_forward_hook(straight, with_kwargs=True)
        here, logits = tensors_by_hand(own, name, CORRUPTED)
        handle.remove()
        (logits[0, -1, ANSWER] - logits[0, -1, FOIL]).backward()
        with torch.no_grad():
            for site, layer in itertools.product(names, range(len(blocks))):
                mine, other = here[site, layer], there[site, layer]
                slope = torch.zeros_like(mine) if mine.grad is None else mine.grad
                sizes[site][layer] += ((other - mine) * slope)[0].double().sum(-1).abs().numpy()
    for site in names:
        among = len(blocks) - (site not in ("resid_pre", "resid_post"))
        np.testing.assert_allclose(found[site].dropped, sizes[site] / among, rtol=1e-3, atol=1e-4)
        assert found[site].backward_passes == 1 + len(blocks)
        assert found[site].passes == 2


def test_dropped_sizes_are_normalized_and_lead_the_order(gpt2):
    asked = {"grad_drop": True, "exact": True, **TOKENS}
    plain = attribution_patching(gpt2, None, CLEAN, CORRUPTED, "head_out", **asked)
    scaled = attribution_patching(gpt2, None, CLEAN, CORRUPTED, "head_out", normalize=True, **asked)
    apart = abs(plain.clean - plain.corrupted)
    assert abs(apart - 1) > 0.1
    np.testing.assert_allclose(scaled.dropped, plain.dropped / apart, rtol=1e-6)
    led = plain.top(plain.dropped.size, by="dropped")["dropped"].to_numpy()
    assert list(led) == sorted(plain.dropped.ravel(), reverse=True)
    by_exact = np.argsort(-np.abs(plain.exact_effects).ravel())
    assert list(by_exact) != list(np.argsort(-plain.dropped.ravel())), "else it shows nothing"


def test_every_family_can_drop_its_blocks(family):
    _, model = family
    result = attribution_patching(model, None, CLEAN, CORRUPTED, grad_drop=True, **TOKENS)
    plain = attribution_patching(model, None, CLEAN, CORRUPTED, **TOKENS)
    np.testing.assert_allclose(result.values, plain.values, rtol=1e-4, atol=1e-4)
    assert result.dropped is not None
    assert result.dropped.min() >= 0 < result.dropped.max()


# --- Pairs, normalization, exact numbers ----------------------------------------------------------


def test_several_pairs_are_the_mean_of_each(gpt2):
    clean = [CLEAN, [*CLEAN, 20], [9, *CLEAN[1:]]]
    corrupted = [CORRUPTED, [*CORRUPTED, 20], [9, *CORRUPTED[1:]]]
    chosen = {"grad_drop": True, **TOKENS}
    found = attribution_patching(gpt2, None, clean, corrupted, "head_out", **chosen)
    single = [
        attribution_patching(gpt2, None, a, b, "head_out", **chosen)
        for a, b in zip(clean, corrupted, strict=True)
    ]
    np.testing.assert_allclose(found.values, np.mean([s.values for s in single], 0), atol=1e-4)
    np.testing.assert_allclose(found.dropped, np.mean([s.dropped for s in single], 0), atol=1e-4)
    spread = np.std([s.values for s in single], 0, ddof=1) / 3**0.5
    np.testing.assert_allclose(found.stderr, spread, atol=1e-4)
    assert (found.count, found.passes, found.tokens) == (3, 4, ())


def test_exact_numbers_are_those_of_the_sweep(family):
    name, model = family
    site = sites_with(model)[list(families.FAMILIES).index(name) % len(sites_with(model))]
    found = attribution_patching(
        model, None, CLEAN, CORRUPTED, site, exact=True, normalize=True, **TOKENS
    )
    sweep = patching_sweep(model, None, CLEAN, CORRUPTED, site, normalize=True, **TOKENS)
    np.testing.assert_array_equal(found.exact, sweep.values)
    for field in ("axes", "labels", "tokens", "source_tokens", "site", "metric", "unit", "answer"):
        assert getattr(found, field) == getattr(sweep, field), field
    assert found.clean == pytest.approx(sweep.clean, abs=1e-4)
    assert found.start == sweep.start == 0
    raw = attribution_patching(model, None, CLEAN, CORRUPTED, site, **TOKENS)
    apart = raw.clean - raw.corrupted
    np.testing.assert_allclose(found.effects, raw.effects / apart, rtol=1e-5, atol=1e-9)


def test_correlations_are_scipys(gpt2):
    found = attribution_patching(
        gpt2, None, CLEAN, CORRUPTED, "resid_pre", exact=True, grad_drop=True, **TOKENS
    )
    estimate, exact = found.effects.ravel(), found.exact_effects.ravel()
    assert (estimate == 0).sum() > 2  # ties
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(estimate, exact)[0])
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(estimate, exact)[0])
    both = found.correlations()
    sizes = scipy.stats.spearmanr(np.abs(estimate), np.abs(exact))[0]
    assert both["size_spearman"] == pytest.approx(sizes)
    dropped = scipy.stats.spearmanr(found.dropped.ravel(), np.abs(exact))[0]
    assert both["dropped_spearman"] == pytest.approx(dropped)


def test_correlations_with_a_constant_or_nan_are_none(full):
    """Their mean is off by rounding, and NaN has no rank."""
    for constant in (np.full(full.values.shape, 0.1), np.full(full.values.shape, 1e-3)):
        still = dataclasses.replace(full, exact=full.start + constant)
        assert np.isnan(still.pearson) and np.isnan(still.spearman)
    values = full.exact.copy()
    values.flat[1] = np.nan
    holed = dataclasses.replace(full, exact=values)
    assert np.isnan(holed.pearson) and np.isnan(holed.spearman)
    assert np.isnan(holed.correlations()["size_spearman"])


def test_the_bundled_model_agrees_with_exact_patching():
    analyzer = ModelAnalyzer(device="cpu")
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupted = "When Mary and John went to the store, Mary gave a drink to"
    found = analyzer.attribution_patching(
        clean, corrupted, "head_out", exact=True, show_progress=False
    )
    assert found.pearson > 0.98
    assert found.spearman > 0.98
    assert set(found.top(4)["layer"]) == set(found.top(4, by="exact")["layer"])
    both = analyzer.attribution_sweeps(clean, corrupted, ("mlp_out", "head_out"))
    assert list(both) == ["mlp_out", "head_out"]
    np.testing.assert_allclose(both["head_out"].values, found.values, atol=1e-4)


# --- The model is left as it was ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom", "mamba"])
def test_the_model_is_untouched_and_may_be_training_or_frozen(name):
    model = families.build(name)
    site = "attn_out" if name == "mamba" else "attn_pattern"
    plain = attribution_patching(model, None, CLEAN, CORRUPTED, site, **TOKENS)
    model.train()
    for parameter in itertools.islice(model.parameters(), 2, None):
        parameter.requires_grad_(False)
    before = state_of(model)
    with torch.inference_mode():
        other = attribution_patching(model, None, CLEAN, CORRUPTED, site, grad_drop=True, **TOKENS)
    assert_untouched(model, before)
    np.testing.assert_allclose(plain.values, other.values, atol=1e-4)


def test_nothing_is_left_after_an_error(gpt2):
    def broken(logits):
        if logits.requires_grad:
            raise KeyError("on purpose")
        return logits[0, -1, 0]

    before = state_of(gpt2)
    with pytest.raises(KeyError, match="on purpose"):
        attribution_patching(gpt2, None, CLEAN, CORRUPTED, metric=broken, show_progress=False)
    assert_untouched(gpt2, before)


# --- What cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"site": "embed"}, SiteError, "a sweep exchanges one of"),
        ({"site": "resid_mid", "family": "gpt_neox"}, SiteError, "parallel"),
        ({"site": "head_out", "family": "mamba"}, SiteError, "attention"),
        ({"metric": "rank"}, InputError, "no gradient.*patching_sweep"),
        ({"metric": "distance"}, InputError, "no gradient"),
        ({"metric": "kl", "direction": "noising"}, InputError, "first order is 0.*denoising"),
        ({"metric": "nonsense"}, InputError, "no metric"),
        ({"direction": "up"}, InputError, "denoising"),
        ({"axes": ("layer", "head")}, InputError, "axes of a sweep"),
        ({"axes": {"mlp_outt": ("layer",)}}, InputError, "axes names 'mlp_outt'.*resid_pre"),
        ({"attention_correction": True}, InputError, "'query' and 'key'.*leave it out"),
        ({"corrupted_prompt": [*CORRUPTED, 5]}, InputError, "do not correspond"),
        ({"site": "attn_pattern", "corrupted_prompt": [*CORRUPTED, 5], "align": "end"},
         InputError, "position by position"),
        ({"positions": [9]}, InputError, "9"),
        ({"layers": [8]}, ValueError, "out of range"),
    ],
)  # fmt: skip
def test_requests_that_are_refused_before_any_pass(options, error, words, monkeypatch, gpt2):
    def ran(*_args, **_options):
        raise AssertionError("the model was run")

    monkeypatch.setattr(module_under_test, "run_plain", ran)
    options = dict(options)
    family = options.pop("family", None)
    model = families.build(family) if family else gpt2
    prompts = (CLEAN, options.pop("corrupted_prompt", CORRUPTED))
    with pytest.raises(error, match=words):
        attribution_patching(model, None, *prompts, **(TOKENS | options))


def test_no_site_and_one_block(gpt2):
    with pytest.raises(InputError, match="sites is empty"):
        attribution_sweeps(gpt2, None, CLEAN, CORRUPTED, (), **TOKENS)
    single = families.build("gpt2", n_layer=1)
    with pytest.raises(InputError, match="drops one block of several"):
        attribution_patching(single, None, CLEAN, CORRUPTED, grad_drop=True, **TOKENS)


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: float(logits[0, -1, 0].detach()),
        lambda logits: logits[0, -1].argmax(),
        lambda logits: logits[0, -1, 0].detach().numpy(),
    ],
)
def test_a_metric_without_gradient_is_refused(gpt2, metric):
    with pytest.raises(InputError, match="has no gradient"):
        attribution_patching(gpt2, None, CLEAN, CORRUPTED, metric=metric, show_progress=False)


def test_a_metric_that_does_not_move_is_refused_or_told(gpt2):
    def saturated(logits):
        return (logits[:, -1, 0] - logits[:, -1, 0].detach()).clamp(max=-1.0)

    with pytest.raises(InputError, match="gradient of exactly 0"):
        attribution_patching(
            gpt2, None, CLEAN, CORRUPTED, metric=Metric("flat", "", saturated), show_progress=False
        )

    def saturated_for_some(logits):
        chosen = logits[:, -1, ANSWER]
        return torch.where(chosen > threshold, chosen, chosen.detach())

    pairs = [CLEAN, [*CLEAN[:6], 20]], [CORRUPTED, [*CORRUPTED[:6], 20]]
    ends = [float(hooked_logits(gpt2, ids, [])[0, -1, ANSWER]) for ids in pairs[1]]
    threshold = sum(ends) / 2
    with pytest.warns(UserWarning, match="in 1 of 2 pairs of prompts"):
        attribution_patching(
            gpt2, None, *pairs, metric=Metric("half", "", saturated_for_some), show_progress=False
        )


# --- The result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(gpt2):
    return attribution_patching(
        gpt2, None, CLEAN, CORRUPTED, "key", exact=True, grad_drop=True,
        attention_correction=True, **TOKENS,
    )  # fmt: skip


def test_damaged_files_are_refused(full, tmp_path):
    assert read_after_damage(full, tmp_path / "file") > 20


def test_round_trip(full, tmp_path, gpt2):
    full.save(tmp_path / "kept.safetensors")
    again = AttributionSweep.load(tmp_path / "kept.safetensors")
    for name in [field.name for field in dataclasses.fields(full)]:
        mine, theirs = getattr(full, name), getattr(again, name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs, name
    assert repr(again) == repr(full)
    assert repr(full) == "AttributionSweep(key, 3 layer × 4 head, logit_diff, denoising)"
    with pytest.raises(RecordFileError, match="attribution patching"):
        SweepResult.load(tmp_path / "kept.safetensors")
    plain = attribution_patching(gpt2, None, CLEAN, CORRUPTED, **TOKENS)
    plain.save(tmp_path / "plain.safetensors")
    assert AttributionSweep.load(tmp_path / "plain.safetensors").exact is None


def test_frame_and_top(full, gpt2):
    frame = full.to_frame()
    assert list(frame) == ["layer", "head", "value", "effect", "exact", "dropped"]
    np.testing.assert_array_equal(frame["effect"], full.effects.ravel())
    for by, table in (
        ("value", np.abs(full.effects)),
        ("exact", np.abs(full.exact_effects)),
        ("dropped", full.dropped),
    ):
        best = np.unravel_index(table.argmax(), table.shape)
        assert full.top(1, by=by)[["layer", "head"]].to_numpy().tolist() == [list(best)]
    plain = attribution_patching(gpt2, None, CLEAN, CORRUPTED, **TOKENS)
    with pytest.raises(InputError, match=r"ordered by \['value'\]; came 'dropped'"):
        plain.top(3, by="dropped")
    with pytest.raises(InputError, match="at least 1"):
        full.top(0, by="exact")
    with pytest.raises(InputError, match=r"no exact numbers.*compare\(patching_sweep"):
        plain.spearman  # noqa: B018


def test_numbers_that_are_none_are_told_and_do_not_compare(gpt2, full):
    with pytest.warns(UserWarning, match="no finite numbers"):
        attribution_patching(
            gpt2, None, CLEAN, CORRUPTED, metric=lambda z: z[0, -1, 1] * torch.nan,
            show_progress=False,
        )  # fmt: skip
    none = dataclasses.replace(full, clean=float("nan"))
    with pytest.raises(InputError, match="the metric of the clean run is nan here"):
        none.compare(full)


def test_only_sweeps_of_the_same_cells_compare(gpt2):
    found = attribution_patching(gpt2, None, CLEAN, CORRUPTED, "head_out", **TOKENS)
    same = patching_sweep(gpt2, None, CLEAN, CORRUPTED, "head_out", **TOKENS)
    np.testing.assert_array_equal(found.compare(same).exact, same.values)
    for options in ({"layers": [1]}, {"direction": "noising"}, {"normalize": True}):
        other = patching_sweep(gpt2, None, CLEAN, CORRUPTED, "head_out", **options, **TOKENS)
        with pytest.raises(InputError, match="the two sweeps differ in"):
            found.compare(other)
    pairs = [[CLEAN, CLEAN], [CORRUPTED, CORRUPTED]]
    other_pairs = [[CORRUPTED, CORRUPTED], [CLEAN, CLEAN]]
    many = attribution_patching(gpt2, None, *pairs, "head_out", **TOKENS)
    with pytest.raises(InputError, match="of other runs"):
        many.compare(patching_sweep(gpt2, None, *other_pairs, "head_out", **TOKENS))


def test_pictures(full, gpt2, tmp_path):
    figure = full.plot(save_path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    maps = [ax for ax in figure.axes if ax.images and ax.get_xlabel() == "head"]
    assert [ax.get_title().partition(":")[0] for ax in maps] == ["estimate", "exact", "GradDrop"]
    for ax, numbers in zip(maps, (full.effects, full.exact_effects, full.dropped), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), numbers)
    limits = [ax.images[0].get_clim() for ax in maps[:2]]
    assert limits[0] == limits[1] == (-limits[0][1], limits[0][1])
    (scatter,) = [ax for ax in figure.axes if ax.get_title().startswith("Pearson")]
    assert f"Spearman {full.spearman:.3f}" in scatter.get_title()
    points = scatter.collections[0].get_offsets()
    np.testing.assert_array_equal(points[:, 1], full.exact_effects.ravel())

    layers = attribution_patching(
        gpt2, None, CLEAN, CORRUPTED, axes=("layer",), exact=True, grad_drop=True, **TOKENS
    )
    bars = layers.plot().axes[0]
    heights = [bar.get_height() for bar in bars.containers[1]]
    np.testing.assert_allclose(heights, layers.exact_effects)
    plain = attribution_patching(gpt2, None, CLEAN, CORRUPTED, **TOKENS)
    assert len([ax for ax in plain.plot().axes if ax.images and ax.get_xlabel()]) == 1
    given = plt.figure().subplots(1, 3)
    kept = attribution_patching(gpt2, None, CLEAN, CORRUPTED, exact=True, **TOKENS)
    assert kept.plot(axes=given) is given[0].get_figure()
    plt.close("all")
    with pytest.raises(ValueError, match="must hold 3 axes"):
        kept.plot(axes=plt.Figure().subplots(1, 2))
    assert plain.plot(interactive=True).data


def test_the_rows_of_many_heads_are_the_same_in_both_maps(gpt2):
    found = attribution_patching(
        gpt2, None, CLEAN, CORRUPTED, "attn_pattern", axes=("layer", "head", "position"),
        exact=True, **TOKENS,
    )  # fmt: skip
    table = np.zeros((20, 7, 4))
    table[3, 2, 1], table[7, 5, 0] = 2.0, -3.0
    names = [field.name for field in dataclasses.fields(found)]
    values = {"values": table, "exact": table[::-1].copy(), "labels": (tuple(range(20)),
              found.labels[1], found.labels[2])}  # fmt: skip
    wide = AttributionSweep(**({f: getattr(found, f) for f in names} | values))
    maps = [ax for ax in wide.plot().axes if ax.images and ax.get_xlabel() == "position"]
    labels = [[text.get_text() for text in ax.get_yticklabels()] for ax in maps]
    assert labels[0] == labels[1]
    assert maps[0].images[0].get_array().shape == (32, 7)


def test_heads_of_some_sites_and_not_of_others(gpt2):
    """Heads are those of the sites that have them; where none has, they are refused."""
    found = attribution_sweeps(gpt2, None, CLEAN, CORRUPTED, heads=[2], exact=True, **TOKENS)
    assert found["head_out"].labels[1] == (2,)
    whole = attribution_sweeps(gpt2, None, CLEAN, CORRUPTED, **TOKENS)
    np.testing.assert_array_equal(found["mlp_out"].values, whole["mlp_out"].values)
    for sites, options in ((["mlp_out"], {"heads": [2]}), (["key"], {"neurons": [2]})):
        with pytest.raises(InputError, match="was given, and"):
            attribution_sweeps(gpt2, None, CLEAN, CORRUPTED, sites, **options, **TOKENS)
