"""Layer attribution against captum, autograd by hand, and what units must add up to."""

import copy
import dataclasses
import warnings

import captum.attr
import numpy as np
import pytest
import torch

import families
from forward_pass import ArchitectureError, InputError, RecordFileError, Site, SiteError
from gradient_attribution import CompletenessWarning
from layer_attribution import layer_attribution
from layer_attribution_result import METHODS, LayerAttribution
from logit_metrics import Metric
from model_architecture import Architecture
from patch_oracle import assert_untouched, hooked_logits, recorded, state_of
from patching_sweep import patching_sweep
from saved_files import read_after_damage

PROMPT = [7, 11, 15, 6, 49, 10, 13]
OTHER = [7, 11, 30, 6, 49, 21, 13]
ANSWER = 40
CHOSEN = {"answer": ANSWER, "show_progress": False}

warnings.filterwarnings("ignore", message="(?s).*Setting (forward|backward|full)")


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


# --- captum ---------------------------------------------------------------------------------------

LAYERS = {
    "gpt2": ("transformer.h.1", "transformer.h.1.mlp"),
    "llama": ("model.layers.1", "model.layers.1.mlp"),
    "gemma2": ("model.layers.1", "model.layers.1.post_feedforward_layernorm"),
    "gpt_neox": ("gpt_neox.layers.1", "gpt_neox.layers.1.mlp"),
    "olmo2": ("model.layers.1", "model.layers.1.post_feedforward_layernorm"),
    "cohere": ("model.layers.1", "model.layers.1.mlp"),
}
"""The modules whose outputs are ``resid_post`` and ``mlp_out`` of block 1."""


@pytest.fixture(scope="module", params=LAYERS)
def beside_captum(request):
    """Name, model, embeddings of prompt and baseline, and what captum calls."""
    model = families.build(request.param)
    lookup = model.get_input_embeddings()
    with torch.no_grad():
        ends = [lookup(torch.tensor([ids])).clone() for ids in (PROMPT, OTHER)]

    def forward(embeddings):
        return model(inputs_embeds=embeddings, use_cache=False).logits[:, -1, ANSWER]

    return request.param, model, *ends, forward


@pytest.mark.parametrize(("site", "which"), [("resid_post", 0), ("mlp_out", 1)])
@pytest.mark.parametrize("method", METHODS)
def test_captum_finds_the_same(beside_captum, site, which, method):
    name, model, end, start, forward = beside_captum
    layer = model.get_submodule(LAYERS[name][which])
    steps = 12
    options = {"n_steps": steps, "baseline_prompt": OTHER, "layers": [1], **CHOSEN}
    if method == "conductance":
        shares = [i / steps for i in range(steps + 1)]
        theirs = captum.attr.LayerConductance(forward, layer)._attribute(
            (end,), (start,), n_steps=steps, step_sizes_and_alphas=([1 / steps] * steps, shares)
        )
        options["rule"] = "left"
    elif method == "internal_influence":
        theirs = captum.attr.InternalInfluence(forward, layer).attribute(end, start, n_steps=steps)
    else:
        theirs = captum.attr.LayerIntegratedGradients(forward, layer).attribute(
            end, start, n_steps=steps
        )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)
        ours = layer_attribution(model, None, PROMPT, site, method, **options).values[0]
    theirs = theirs.detach().reshape(ours.shape).numpy()
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


# --- By hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trapezoid", "left"])
def test_conductance_of_neurons_by_hand(gpt2, rule):
    """Every point in a pass of its own, with plain hooks on the MLP's last projection."""
    lookup, steps = gpt2.get_input_embeddings(), 5
    with torch.no_grad():
        end, start = (lookup(torch.tensor([ids])) for ids in (PROMPT, OTHER))
    values, slopes = [], []
    for step in range(steps + 1):
        kept = []

        def hook(_module, args, kept=kept):
            args[0].retain_grad()
            kept.append(args[0])

        handle = gpt2.transformer.h[2].mlp.c_proj.register_forward_pre_hook(hook)
        logits = gpt2(inputs_embeds=start + step / steps * (end - start)).logits
        handle.remove()
        (slope,) = torch.autograd.grad(logits[0, -1, ANSWER], kept[0])
        values.append(kept[0].detach()[0])
        slopes.append(slope[0])
    expected = torch.zeros_like(values[0])
    for k in range(steps):
        at = slopes[k] if rule == "left" else (slopes[k] + slopes[k + 1]) / 2
        expected += at * (values[k + 1] - values[k])
    for batch_size in (1, 2, 6):
        found = layer_attribution(
            gpt2, None, PROMPT, "mlp_neurons", layers=[2], n_steps=steps, rule=rule,
            baseline_prompt=OTHER, batch_size=batch_size, **CHOSEN,
        )  # fmt: skip
        np.testing.assert_allclose(found.values[0], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.expected).all()


def test_the_mean_gradient_is_the_gradient_where_all_is_linear(gpt2):
    """Behind the last norm a logit is linear in nothing else; frozen it is W_U."""
    found = layer_attribution(
        gpt2, None, PROMPT, "resid_post", "internal_influence", layers=[-1], n_steps=1,
        baseline_prompt=PROMPT, **CHOSEN,
    )  # fmt: skip
    stream = recorded(gpt2, PROMPT, Site("resid_post", 2)).requires_grad_()
    logits = gpt2.lm_head(gpt2.transformer.ln_f(stream))
    (slope,) = torch.autograd.grad(logits[0, -1, ANSWER], stream)
    np.testing.assert_allclose(found.values[0], slope[0], rtol=1e-4, atol=1e-6)


# --- What units add up to -------------------------------------------------------------------------

JUMPS = {"mixtral", "qwen2_moe", "gpt_oss"}
"""Families that choose experts: their output jumps on the way."""


@pytest.mark.filterwarnings("ignore::gradient_attribution.CompletenessWarning")
def test_conductance_of_every_block_adds_up_to_the_change(family):
    name, model = family
    found = [
        layer_attribution(
            model,
            None,
            PROMPT,
            n_steps=steps,
            baseline_prompt=OTHER,
            **CHOSEN,
            check_gradients=False,
        )
        for steps in ((8,) if name in JUMPS else (40, 160))
    ]
    change = hooked_logits(model, PROMPT, [])[0, -1, ANSWER]
    change = float(change - hooked_logits(model, OTHER, [])[0, -1, ANSWER])
    for each in found:
        np.testing.assert_allclose(each.expected, change, atol=1e-4)
        assert each.value - each.baseline_value == pytest.approx(change, abs=1e-4)
    assert len(found[0].layers) == Architecture(model).n_layers
    if name in JUMPS:
        return
    scale = max(abs(change), np.abs(found[0].by_position()).max())
    coarse, fine = (np.abs(each.completeness_error).max() / scale for each in found)
    assert fine < 0.02
    assert fine < 0.25 * coarse + 2e-4  # of second order: 16 times for 4 times the steps


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "cohere", "granite", "bloom", "mamba"])
def test_integrated_gradients_add_up_to_an_exact_patch(name):
    """Of a whole site: the metric with the site as it is, less with it as in the baseline."""
    model = families.build(name)
    names = ("resid_pre", "attn_out") if name == "mamba" else ("mlp_out", "value", "attn_pattern")
    for site in names:
        found = layer_attribution(
            model, None, PROMPT, site, "integrated_gradients", baseline_prompt=OTHER, n_steps=60,
            check_gradients=False, **CHOSEN,
        )  # fmt: skip
        sweep = patching_sweep(
            model, None, PROMPT, OTHER, site, axes=("layer",), direction="noising", metric="logit",
            **CHOSEN,
        )  # fmt: skip
        np.testing.assert_allclose(found.expected, sweep.clean - sweep.values, atol=2e-4)
        scale = max(1.0, np.abs(found.by_position()).max())
        assert np.abs(found.completeness_error).max() < 0.02 * scale


def test_too_few_steps_are_told(gpt2):
    with pytest.warns(CompletenessWarning, match="n_steps=2"):
        layer_attribution(gpt2, None, PROMPT, baseline="zero", n_steps=2, **CHOSEN)


# --- Requests -------------------------------------------------------------------------------------


def test_metrics_and_tokens(gpt2):
    logits = hooked_logits(gpt2, PROMPT, [])[0, -1]
    best, second = logits.topk(2).indices.tolist()
    plain = layer_attribution(gpt2, None, PROMPT, layers=[0], baseline_prompt=OTHER, n_steps=8,
                              show_progress=False)  # fmt: skip
    assert (plain.answer, plain.metric, plain.unit) == (f"<{best}>", "logit", "logits")
    assert plain.value == pytest.approx(float(logits[best]), abs=1e-4)

    def function(run):
        return run[0, -1, best] - run[0, -1, second]

    both = [
        layer_attribution(gpt2, None, PROMPT, layers=[0], baseline_prompt=OTHER, n_steps=8,
                          show_progress=False, **chosen)
        for chosen in ({"metric": "logit_diff", "answer": best, "foil": second},
                       {"metric": function})
    ]  # fmt: skip
    np.testing.assert_allclose(both[0].values, both[1].values, atol=1e-5)
    assert both[0].foil == f"<{second}>"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "saliency"}, InputError, "methods are conductance"),
        ({"site": "embed"}, SiteError, "sites are resid_pre"),
        ({"site": "resid_mid", "family": "gpt_neox"}, SiteError, "parallel"),
        ({"site": "head_out", "family": "mamba"}, SiteError, "attention"),
        ({"layers": [9]}, ValueError, "out of range"),
        ({"layers": []}, SiteError, "layers is empty"),
        ({"n_steps": 0}, InputError, "n_steps must be a whole number"),
        ({"batch_size": 1.5}, InputError, "batch_size must be"),
        ({"rule": "simpson"}, InputError, "'trapezoid' or 'left'"),
        ({"metric": "rank"}, InputError, "no gradient everywhere"),
        ({"baseline_prompt": [1, 2]}, InputError, "7 and 2 tokens.*as many tokens"),
        ({"baseline": "pad"}, InputError, "no pad token"),
        ({"baseline": 5, "baseline_prompt": OTHER}, InputError, "give one"),
        ({"baseline": torch.zeros(32), "baseline_prompt": OTHER}, InputError, "give one"),
        ({"method": "internal_influence", "rule": "left"}, InputError, "belongs to conductance"),
        ({"metric": Metric("far", "", lambda z: z[:, 0, 1], read=(-8,))}, InputError, "-8 is out"),
        ({"baseline": torch.zeros(5)}, InputError, r"\[32\] or \[7, 32\]"),
    ],
)
def test_requests_that_are_refused(options, error, words, gpt2):
    options = dict(options)
    family = options.pop("family", None)
    model = families.build(family) if family else gpt2
    before = state_of(model)
    with pytest.raises(error, match=words):
        layer_attribution(model, None, PROMPT, **(CHOSEN | options))
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["conductance", "internal_influence", "integrated_gradients"])
def test_unlikely_tokens_in_float16(gpt2, method):
    """Their probability's gradient is below what float16 holds."""
    half = copy.deepcopy(gpt2).half()
    exact = copy.deepcopy(half).float()
    order = hooked_logits(exact, PROMPT, [])[0, -1].argsort(descending=True)
    asked = {"metric": "prob", "answer": int(order[60]), "n_steps": 6, "show_progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)
        found, wanted = (
            layer_attribution(each, None, PROMPT, "mlp_neurons", method, layers=[2],
                              baseline_prompt=OTHER, **asked)
            for each in (half, exact)
        )  # fmt: skip
    scale = np.abs(wanted.values).max()
    assert 0 < scale < 1e-9
    np.testing.assert_allclose(found.values / scale, wanted.values / scale, atol=0.1)


def test_numbers_that_are_none_are_told(gpt2):
    with pytest.warns(UserWarning, match="no finite numbers"):
        layer_attribution(gpt2, None, PROMPT, layers=[0], metric=lambda z: z[0, -1, 1] * torch.nan,
                          show_progress=False)  # fmt: skip


def test_a_model_without_head(gpt2):
    with pytest.raises(ArchitectureError, match="head"):
        layer_attribution(gpt2.transformer, None, PROMPT, **CHOSEN)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_untouched_and_may_be_training_or_frozen(method):
    model = families.build("llama")
    options = {"baseline_prompt": OTHER, "n_steps": 6, "layers": [1], **CHOSEN}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletenessWarning)
        plain = layer_attribution(model, None, PROMPT, "attn_pattern", method, **options)
        model.train()
        model.model.layers[0].requires_grad_(False)
        before = state_of(model)
        with torch.inference_mode():
            other = layer_attribution(model, None, PROMPT, "attn_pattern", method, **options)
    assert_untouched(model, before)
    np.testing.assert_allclose(plain.values, other.values, atol=1e-5)

    def broken(logits):
        if logits.requires_grad:
            raise KeyError("on purpose")
        return logits[0, -1, 0]

    metric = Metric("broken", "", lambda logits: torch.stack([broken(row[None]) for row in logits]))
    with pytest.raises(KeyError, match="on purpose"):
        own = {key: value for key, value in options.items() if key not in ("answer", "foil")}
        layer_attribution(model, None, PROMPT, method=method, metric=metric, **own)
    assert_untouched(model, before)


# --- The result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(gpt2):
    return layer_attribution(gpt2, None, PROMPT, "head_out", baseline_prompt=OTHER, n_steps=8,
                             **CHOSEN)  # fmt: skip


def test_sums_and_top(heads, gpt2):
    wide = heads.values.astype(np.float64)
    assert heads.values.shape == (3, 7, 4, 8)
    np.testing.assert_allclose(heads.by_head(), wide.sum((1, 3)))
    np.testing.assert_allclose(heads.by_position(), wide.sum((2, 3)))
    np.testing.assert_allclose(heads.by_layer(), wide.sum((1, 2, 3)))
    unit = np.unravel_index(np.abs(wide.sum(1)).argmax(), (3, 4, 8))
    best = heads.top(3)
    assert list(best) == ["layer", "head", "unit", "value"]
    assert best.iloc[0].tolist() == [*unit, wide.sum(1)[unit]]
    place = np.unravel_index(np.abs(wide).argmax(), wide.shape)
    one = heads.top(1, each_token=True)
    assert list(one) == ["layer", "position", "token", "head", "unit", "value"]
    assert one[["layer", "position", "head", "unit"]].to_numpy().tolist() == [list(place)]
    frame = heads.to_frame()
    assert list(frame) == ["layer", "position", "token", "value"]
    np.testing.assert_allclose(frame["value"], heads.by_position().ravel())
    with pytest.raises(InputError, match="at least 1"):
        heads.top(0)
    stream = layer_attribution(gpt2, None, PROMPT, method="internal_influence", n_steps=2,
                               layers=[1], **CHOSEN)  # fmt: skip
    np.testing.assert_allclose(
        stream.by_layer(), np.linalg.norm(stream.values.reshape(1, -1), axis=1), rtol=1e-5
    )
    assert list(stream.top(1)) == ["layer", "unit", "value"]
    with pytest.raises(InputError, match="no heads"):
        stream.by_head()


def test_damaged_files_are_refused(heads, tmp_path):
    assert read_after_damage(heads, tmp_path / "file") > 20


def test_round_trip(heads, tmp_path):
    heads.save(tmp_path / "kept.safetensors")
    again = LayerAttribution.load(tmp_path / "kept.safetensors")
    for name in [field.name for field in dataclasses.fields(heads)]:
        mine, theirs = getattr(heads, name), getattr(again, name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs, name
    shape = "3 layer × 7 position × 4 × 8"
    assert repr(again) == f"LayerAttribution(conductance of head_out, {shape}, logit)"
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(RecordFileError):
        LayerAttribution.load(tmp_path / "broken.safetensors")


def test_picture(heads):
    figure = heads.plot()
    ax = figure.axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), heads.by_position())
    assert ax.get_title() == "conductance of head_out, against another prompt"
    assert heads.plot(interactive=True).data
