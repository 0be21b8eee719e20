"""Attribution to tokens against captum, autograd by hand, planted answers and Hugging Face."""

import contextlib
import copy
import functools
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import nn

import families
import model_zoo
import weighted_gradients as engine
from array_files import RecordFileError
from attention_attribution import attention_rollout
from embedding_pass import EmbeddingPass, mean_embedding, token_embeddings
from families import token_ids
from forward_pass import ArchitectureError, InputError, SiteError
from gradient_attribution import METHODS, CompletenessWarning, attribute_tokens
from gradient_check import check_gradient
from gradient_scale import is_narrow
from logit_metrics import Metric
from memory_limits import NotEnoughMemoryError, SmallerBatchWarning
from model_architecture import Architecture
from token_attribution import TokenAttribution

LENGTH = 8
IDS = token_ids(1, LENGTH)[0].tolist()
GRADIENTS = ("saliency", "gradient_x_input", "integrated_gradients", "smoothgrad")
quiet = pytest.mark.filterwarnings("ignore::gradient_attribution.CompletenessWarning")

PER_LAYER = ("gemma3n_text", "gemma4_text")
"""They embed tokens a second time, for each layer."""


@functools.cache
def built(name):
    return model_zoo.build(name) if name in PER_LAYER else families.build(name)


@pytest.fixture
def gpt2():
    return built("gpt2")


def embedded(model, ids=IDS):
    return token_embeddings(Architecture(model), ids)


@contextlib.contextmanager
def exchanged(model, values):
    """Let the embedding give something else, by a plain hook."""
    module = model.get_input_embeddings()
    handle = module.register_forward_hook(lambda *_: values)
    try:
        yield
    finally:
        handle.remove()


def logits_with(model, values, ids=IDS):
    """Logits of a prompt whose embeddings are ``values [row, position, d]``, by a plain hook."""
    with exchanged(model, values):
        rows = torch.tensor([ids]).expand(len(values), -1)
        return model(rows, use_cache=False).logits


def slope(model, values, of, ids=IDS):
    """Gradient of a function of logits at embeddings ``[position, d]``, by autograd alone."""
    leaf = values.detach().clone()[None].requires_grad_()
    return torch.autograd.grad(of(logits_with(model, leaf * 1.0, ids)), leaf)[0][0]


def close(ours, theirs, within=1e-5):
    theirs = np.asarray(theirs)
    scale = max(float(np.abs(theirs).max()), 1e-9)
    assert float(np.abs(np.asarray(ours) - theirs).max()) <= within * scale


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*families.FAMILIES, *PER_LAYER])
def test_gradients_of_every_target_are_autograds(name):
    """Of every position from one pass, in two stages; autograd takes a pass for each target."""
    model = built(name)
    places = (2, LENGTH - 1)
    asked = {"targets": [7, 9], "target_positions": list(places), "per_dimension": True}
    size = attribute_tokens(model, None, IDS, "saliency", **asked)
    times = attribute_tokens(model, None, IDS, "gradient_x_input", **asked)
    start = embedded(model)
    for row, (place, token) in enumerate(zip(places, (7, 9), strict=True)):
        gradient = slope(model, start, lambda z, p=place, t=token: z[0, p, t])
        close(size.per_dimension[row], gradient)
        close(size.scores[row], gradient.norm(dim=-1))
        size_of_terms = float((gradient * start).abs().sum(-1).max())
        gap = torch.from_numpy(times.scores[row]) - (gradient * start).sum(-1)
        assert float(gap.abs().max()) <= 1e-5 * size_of_terms
        assert not size.scores[row, place + 1 :].any(), "exactly 0 after the target"
        assert size.scores[row, : place + 1].all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "granite", "cohere", "mamba"])
@quiet
def test_integrated_gradients_are_captums(name):
    model = built(name)
    module = model.get_input_embeddings()
    ids, places = torch.tensor([IDS]), (4, LENGTH - 1)
    ours = attribute_tokens(
        model, None, IDS, targets=[7, 9], target_positions=places, baseline=5, n_steps=24,
        per_dimension=True,
    )  # fmt: skip
    for row, (place, token) in enumerate(zip(places, (7, 9), strict=True)):
        peer = LayerIntegratedGradients(lambda z, p=place: model(z, use_cache=False).logits[:, p],
                                        module)  # fmt: skip
        theirs, missed = peer.attribute(
            ids, torch.full_like(ids, 5), target=token, n_steps=24, method="gausslegendre",
            return_convergence_delta=True,
        )  # fmt: skip
        close(ours.per_dimension[row], theirs[0].detach())
        close(ours.scores[row], theirs[0].sum(-1).detach())
        size = np.abs(ours.scores[row]).sum()
        assert abs(ours.completeness_error[row] - float(missed)) <= 1e-5 * size


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_gradient_x_input_is_captums(name):
    model = built(name)
    ours = attribute_tokens(model, None, IDS, "gradient_x_input", targets=7)
    peer = LayerGradientXActivation(
        lambda z: model(z, use_cache=False).logits[:, -1], model.get_input_embeddings()
    )
    theirs = peer.attribute(torch.tensor([IDS]), target=7)
    close(ours.scores[0], theirs[0].sum(-1).detach())


SMOOTH = [name for name in families.FAMILIES
          if name not in ("opt", "mixtral", "qwen2_moe", "gpt_oss", "mamba")]  # fmt: skip
"""ReLU bends, and a choice of experts jumps: 50 nodes do not integrate those."""


@pytest.mark.parametrize("name", SMOOTH)
def test_integrated_gradients_add_up(name):
    found = attribute_tokens(built(name), None, IDS, baseline=5, n_steps=50, targets=[7, 8, 9])
    gap = found.value - found.baseline_value
    assert (found.relative_error <= 1e-3).all()
    own = built(name)(torch.tensor([IDS])).logits[0, -1, 7]
    other = built(name)(torch.tensor([[5] * LENGTH])).logits[0, -1, 7]
    close(gap[0], (own - other).detach(), 1e-4)


@quiet
def test_more_nodes_miss_by_less():
    model = built("falcon")
    missed = [
        attribute_tokens(model, None, IDS, baseline="zero", n_steps=n).relative_error[0]
        for n in (30, 100, 300)
    ]
    assert missed[0] > 10 * missed[2] and missed[1] > missed[2]


def test_a_norm_hides_an_embeddings_length_which_is_warned_of():
    """All change lies beside zero; 50 nodes never see it."""
    model = built("qwen2")
    with pytest.warns(CompletenessWarning, match="another baseline than 'zero'"):
        found = attribute_tokens(model, None, IDS, baseline="zero")
    assert found.relative_error[0] > 0.05
    assert attribute_tokens(model, None, IDS).baseline == "mean"


def linear_model():
    """GPT-2 made affine in its embeddings: no norms, even attention, MLPs without activation."""
    model = families.build("gpt2", activation_function="linear")
    model.transformer.ln_f = nn.Identity()
    for block in model.transformer.h:
        block.ln_1 = block.ln_2 = nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, : 2 * families.HIDDEN] = 0
            block.attn.c_attn.bias[: 2 * families.HIDDEN] = 0
            for projection in (block.attn.c_proj, block.mlp.c_proj, block.mlp.c_fc):
                projection.weight *= 0.4
    return model


@pytest.mark.parametrize("baseline", ["zero", "mean", 11])
def test_on_a_linear_model_all_signed_methods_agree(baseline):
    model = linear_model()
    asked = {"targets": 7, "target_positions": "all", "baseline": baseline}
    tables = {
        method: attribute_tokens(model, None, IDS, method, **asked, **extra).scores
        for method, extra in {
            "gradient_x_input": {},
            "integrated_gradients": {"n_steps": 1},
            "smoothgrad": {"n_steps": 3, "noise": 0.5},
            "occlusion": {},
        }.items()
    }
    for table in tables.values():
        close(table, tables["gradient_x_input"], 2e-5)
    assert np.abs(tables["occlusion"][np.tril_indices(LENGTH)]).min() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3n_text"])
def test_both_ways_through_the_head_agree(name, monkeypatch):
    """Once for all targets, or from each target through the head."""
    model = built(name)
    asked = {"target_positions": [1, 5, 5, 7], "targets": [7, 8, 9, 7], "metric": "log_prob"}
    asked["target_positions"] = [1, 5, 6, 7]
    one = attribute_tokens(model, None, IDS, "gradient_x_input", **asked).scores
    monkeypatch.setattr(EmbeddingPass, "_before_head", lambda self: None)
    close(attribute_tokens(model, None, IDS, "gradient_x_input", **asked).scores, one, 1e-5)


def test_several_targets_at_one_position(gpt2):
    found = attribute_tokens(gpt2, None, IDS, "gradient_x_input", targets=[7, 9, 11])
    assert found.target_positions == (LENGTH - 1,) * 3 and found.target_ids == (7, 9, 11)
    for row, token in enumerate((7, 9, 11)):
        alone = attribute_tokens(gpt2, None, IDS, "gradient_x_input", targets=token)
        close(found.scores[row], alone.scores[0])


METRIC_FUNCTIONS = {
    "logit": lambda z: z[0, -1, 7],
    "log_prob": lambda z: z[0, -1].log_softmax(-1)[7],
    "logprob": lambda z: z[0, -1].log_softmax(-1)[7],
    "prob": lambda z: z[0, -1].softmax(-1)[7],
    "logit_diff": lambda z: z[0, -1, 7] - z[0, -1, 9],
}


@pytest.mark.parametrize("metric", METRIC_FUNCTIONS)
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_metrics(name, metric):
    model, of = built(name), METRIC_FUNCTIONS[metric]
    against = 9 if metric == "logit_diff" else None
    found = attribute_tokens(
        model, None, IDS, "saliency", targets=7, metric=metric, against=against, per_dimension=True
    )
    close(found.per_dimension[0], slope(model, embedded(model), of), 2e-5)
    own = attribute_tokens(model, None, IDS, "saliency", metric=of)
    close(own.scores, found.scores, 2e-5)
    close(found.value, [float(of(model(torch.tensor([IDS])).logits.detach()))], 1e-5)
    assert own.targets == ("<lambda>",) and own.target_ids == (-1,)


def test_a_metric_reads_its_own_positions(gpt2):
    """Of a `Metric` the logits at the positions that it names, in ascending order."""
    apart = Metric("apart", "logits", lambda z: z[:, 0, 7] - z[:, 1, 7], read=(-1, -3))
    found = attribute_tokens(gpt2, None, IDS, "saliency", metric=apart, per_dimension=True)

    def of(z):
        return z[0, -3, 7] - z[0, -1, 7]

    close(found.per_dimension[0], slope(gpt2, embedded(gpt2), of))
    close(found.value, [float(of(gpt2(torch.tensor([IDS])).logits.detach()))])
    assert found.target_positions == (LENGTH - 1,) and found.unit == "logits"
    early = Metric("early", "logits", lambda z: z[:, 0, 7], read=(2,))
    found = attribute_tokens(gpt2, None, IDS, "occlusion", metric=early)
    close(found.scores, attribute_tokens(gpt2, None, IDS, "occlusion", 7, 2).scores)
    assert found.target_positions == (2,)
    with pytest.raises(InputError, match="position -9 is out of range"):
        far = Metric("far", "logits", lambda z: z[:, 0, 7], read=(-9,))
        attribute_tokens(gpt2, None, IDS, metric=far)


@pytest.mark.parametrize("method", ["gradient_attention", "saliency", "integrated_gradients"])
@quiet
def test_a_function_of_an_earlier_position_is_followed_from_there(gpt2, method):
    found = attribute_tokens(gpt2, None, IDS, method, metric=lambda z: z[0, 2, 7])
    named = attribute_tokens(gpt2, None, IDS, method, 7, target_positions=2)
    close(found.scores, named.scores)
    assert found.target_positions == (2,) and found.scores[0, :3].all()


def test_attention_is_followed_from_one_position(gpt2):
    def two(z):
        return z[0, 2, 7] + z[0, 5, 7]

    with pytest.raises(InputError, match=r"followed back from one position.*the logits of 2"):
        attribute_tokens(gpt2, None, IDS, "gradient_attention", metric=two)
    assert attribute_tokens(gpt2, None, IDS, "saliency", metric=two).scores.any()


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "gradient_attention"])
@pytest.mark.parametrize(
    "metric", [lambda z: float(z[0, -1, 7]), lambda z: z[0, -1, 7].detach().numpy()]
)
def test_a_metric_that_leaves_the_graph_is_no_fault_of_the_model(gpt2, method, metric):
    with pytest.raises(InputError, match="the metric '<lambda>' has no gradient"):
        attribute_tokens(gpt2, None, IDS, method, metric=metric)
    plain = attribute_tokens(gpt2, None, IDS, "occlusion", 7).scores
    close(attribute_tokens(gpt2, None, IDS, "occlusion", metric=metric).scores, plain)


def test_numbers_that_are_none_are_told(gpt2):
    with pytest.warns(UserWarning, match="no finite numbers.*bfloat16 or float32"):
        attribute_tokens(gpt2, None, IDS, metric=lambda z: z[0, -1, 7] * torch.nan)


def test_a_function_of_every_position(gpt2):
    def spread(logits):
        return logits[0].std()

    found = attribute_tokens(gpt2, None, IDS, "saliency", metric=spread, per_dimension=True)
    close(found.per_dimension[0], slope(gpt2, embedded(gpt2), lambda z: z[0].std()), 2e-5)
    assert found.metric == "spread"


# --- Noise, occlusion, attention ------------------------------------------------------------------


def test_smoothgrad_averages_noisy_gradients(gpt2):
    same = {"targets": 7, "n_steps": 6, "noise": 0.2}
    found = attribute_tokens(gpt2, None, IDS, "smoothgrad", **same, seed=3)
    for size in (1, 4):
        again = attribute_tokens(gpt2, None, IDS, "smoothgrad", **same, seed=3, batch_size=size)
        close(again.scores, found.scores)
    other = attribute_tokens(gpt2, None, IDS, "smoothgrad", **same, seed=4)
    assert np.abs(other.scores - found.scores).max() > 1e-2 * np.abs(found.scores).max()
    start = embedded(gpt2)
    seen = []
    plan = engine.around_input(_stub(start), torch.zeros_like(start), 400, 0.2, 0)
    seen = plan.points(range(400)) - start
    sigma = 0.2 * float(start.max() - start.min())
    assert abs(float(seen.std()) / sigma - 1) < 0.01 and abs(float(seen.mean())) < 0.02 * sigma
    gradients = [slope(gpt2, start + noise, lambda z: z[0, -1, 7]) for noise in seen[:6]]
    ours = attribute_tokens(gpt2, None, IDS, "smoothgrad", **same)
    close(ours.scores[0], (torch.stack(gradients).mean(0) * start).sum(-1))


def _stub(embedding):
    found = EmbeddingPass.__new__(EmbeddingPass)
    found.embedding = embedding
    return found


def test_hardly_any_noise_is_gradient_x_input(gpt2):
    plain = attribute_tokens(gpt2, None, IDS, "gradient_x_input", targets=7)
    noisy = attribute_tokens(gpt2, None, IDS, "smoothgrad", targets=7, noise=1e-7, n_steps=3)
    close(noisy.scores, plain.scores, 1e-4)


def test_occlusion_is_what_a_hooked_pass_loses(family):
    name, model = family
    places, tokens = [3, LENGTH - 1], [7, 9]
    found = attribute_tokens(
        model, None, IDS, "occlusion", tokens, places, baseline="mean", batch_size=3
    )
    start = embedded(model)
    mean = token_embeddings(Architecture(model), range(families.VOCAB)).mean(0)
    rows = start.repeat(LENGTH, 1, 1)
    rows[range(LENGTH), range(LENGTH)] = mean
    with torch.no_grad():
        whole, without = logits_with(model, start[None]), logits_with(model, rows)
    for row, (place, token) in enumerate(zip(places, tokens, strict=True)):
        close(found.scores[row], whole[0, place, token] - without[:, place, token], 2e-4)
        assert not found.scores[row, place + 1 :].any(), name


ATTENDING = ["gpt2", "llama", "gemma2", "mixtral", "granite", "cohere", "gpt_oss"]


def eager(name):
    model = copy.deepcopy(built(name))
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_rollout(name):
    out = eager(name)(torch.tensor([IDS]), output_attentions=True)
    rolled = np.eye(LENGTH)
    for attention in out.attentions:
        step = attention[0, :, :, :LENGTH].detach().double().mean(0).numpy() + np.eye(LENGTH)
        rolled = (step / step.sum(-1, keepdims=True)) @ rolled
    found = attribute_tokens(built(name), None, IDS, "rollout", target_positions="all")
    close(found.scores, rolled)
    np.testing.assert_allclose(found.scores.sum(-1), 1)
    assert found.metric == "attention" and np.isnan(found.value).all() and not found.signed


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_gradient_attention(name):
    model = eager(name)
    out = model(torch.tensor([IDS]), output_attentions=True)
    for place, token in ((3, 7), (LENGTH - 1, 9)):
        slopes = torch.autograd.grad(out.logits[0, place, token], out.attentions, retain_graph=True)
        found = np.eye(LENGTH)
        for attention, by in zip(out.attentions, slopes, strict=True):
            step = np.clip((attention * by)[0].detach().double().numpy(), 0, None).mean(0)
            found = found + step @ found
        ours = attribute_tokens(
            built(name), None, IDS, "gradient_attention", token, target_positions=place
        )
        close(ours.scores[0], (found - np.eye(LENGTH))[place], 1e-4)
        assert not ours.scores[0, place + 1 :].any()


@pytest.mark.parametrize("method", ["attention_rollout", "gradient_attention"])
def test_a_state_space_has_no_attention_to_follow(method):
    with pytest.raises(SiteError, match=r"follows attention through every block.*no attention"):
        attribute_tokens(built("mamba"), None, IDS, method)


def test_rollout_needs_no_head():
    model = built("gpt2")
    own = attention_rollout(Architecture(model.transformer), IDS, [LENGTH - 1])
    close(own, attention_rollout(Architecture(model), IDS, [LENGTH - 1]))
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        attribute_tokens(model.transformer, None, IDS)


# --- Targets, positions, baselines ----------------------------------------------------------------


def test_targets_by_default_are_the_models_own(gpt2):
    found = attribute_tokens(gpt2, None, IDS, "saliency", target_positions="all")
    best = gpt2(torch.tensor([IDS])).logits[0].argmax(-1).tolist()
    assert list(found.target_ids) == best and found.target_positions == tuple(range(LENGTH))


def test_targets_may_be_the_text_itself(gpt2):
    found = attribute_tokens(gpt2, None, IDS, "saliency", target_positions="all", follow_text=True)
    assert list(found.target_ids) == IDS[1:] and len(found.scores) == LENGTH - 1
    one = attribute_tokens(gpt2, None, IDS, "saliency", target_positions=3, follow_text=True)
    close(one.scores[0], found.scores[3])


def test_tokens_by_text():
    tokenizer = families.tiny_tokenizer(pad=True)
    found = attribute_tokens(
        built("gpt2"), tokenizer, "the cat sat on", "saliency", " the", metric="logit_diff",
        against=[" a", " cat"],
    )  # fmt: skip
    assert found.targets == (" the −  a", " the −  cat") and " cat" in found.tokens
    pad = attribute_tokens(built("gpt2"), tokenizer, "the cat", baseline="pad")
    assert pad.baseline == "token '<pad>'"


def test_baselines(gpt2):
    arch = Architecture(gpt2)
    width = families.HIDDEN
    rows = {
        "zero": torch.zeros(width),
        "mean": token_embeddings(arch, range(families.VOCAB)).mean(0),
        6: token_embeddings(arch, [6])[0],
    }
    for name, row in rows.items():
        named = attribute_tokens(gpt2, None, IDS, baseline=name, n_steps=8)
        for given in (row, row.expand(LENGTH, -1), row.numpy()):
            again = attribute_tokens(gpt2, None, IDS, baseline=given, n_steps=8)
            close(again.scores, named.scores, 2e-5)
        with torch.no_grad():
            bottom = logits_with(gpt2, row.expand(1, LENGTH, -1))[0, -1, named.target_ids[0]]
        close(named.baseline_value, [float(bottom)])


@pytest.mark.parametrize("rows", [1, 10, families.VOCAB, 4096])
def test_the_mean_is_over_the_whole_vocabulary(gpt2, rows, monkeypatch):
    """Also where it is looked up in several parts."""
    monkeypatch.setattr("embedding_pass.TABLE_ROWS", rows)
    close(mean_embedding(Architecture(gpt2)), gpt2.transformer.wte.weight.detach().mean(0))


def test_scores_by_dimension_add_up(gpt2):
    for method in ("gradient_x_input", "integrated_gradients", "smoothgrad"):
        asked = {"target_positions": [3, 7], "baseline": "mean"}
        whole = attribute_tokens(gpt2, None, IDS, method, **asked, per_dimension=True)
        close(whole.per_dimension.sum(-1), whole.scores)
        close(attribute_tokens(gpt2, None, IDS, method, **asked).scores, whole.scores)
        assert whole.per_dimension.shape == (2, LENGTH, families.HIDDEN)


REFUSED = [
    ({"method": "magic"}, "no method 'magic'; methods are saliency"),
    ({"method": "saliency", "baseline": "zero"}, "saliency takes no baseline"),
    ({"method": "occlusion", "n_steps": 3}, "occlusion takes no n_steps"),
    ({"method": "occlusion", "per_dimension": True}, "takes no per_dimension"),
    ({"method": "ig", "seed": 1}, "integrated_gradients takes no seed; it belongs to smoothgrad"),
    ({"method": "rollout", "targets": 7}, "knows positions, no target tokens"),
    ({"n_steps": 0}, "n_steps must be a whole number of at least 1"),
    ({"n_steps": 2.5}, "n_steps must be a whole number"),
    ({"n_steps": True}, "n_steps must be a whole number"),
    ({"batch_size": 0}, "batch_size must be a whole number"),
    ({"n_steps": False}, "n_steps must be a whole number"),
    ({"batch_size": False}, "batch_size must be a whole number"),
    ({"baseline": False}, "token ids must be integers"),
    ({"method": "smoothgrad", "noise": 0.0}, "noise must be above 0"),
    ({"method": "smoothgrad", "noise": float("inf")}, "noise must be above 0, and finite"),
    ({"method": "smoothgrad", "noise": True}, "noise must be above 0"),
    ({"method": "smoothgrad", "noise": "much"}, "noise must be above 0"),
    ({"method": "smoothgrad", "seed": -1}, "seed must be a whole number of at least 0"),
    ({"method": "smoothgrad", "seed": 1.5}, "seed must be a whole number"),
    ({"metric": "kl"}, "a metric is one of logit, log_prob"),
    ({"metric": "logit_diff"}, "needs the other token"),
    ({"metric": "logit_diff", "against": 7, "targets": 7}, "compared with itself"),
    ({"metric": "logit_diff", "against": [7, 8], "target_positions": [1, 2, 3]}, "each of the 3"),
    ({"against": 7}, "belongs to metric='logit_diff'"),
    ({"targets": [7, 8], "target_positions": [1, 2, 3]}, "2 targets do not pair with 3"),
    ({"targets": []}, "a list of at least one"),
    ({"targets": 4.5}, "a list of at least one"),
    ({"targets": 99}, "outside the model's vocabulary"),
    ({"targets": " the"}, "needs a tokenizer"),
    ({"target_positions": 8}, "out of range"),
    ({"target_positions": "first"}, "'last', 'all', an index"),
    ({"follow_text": True}, "no token follows the last position"),
    ({"follow_text": True, "targets": 7, "target_positions": 1}, "leave out targets"),
    ({"metric": lambda z: z.sum(), "targets": 7}, "one target by itself"),
    ({"metric": lambda z: z.sum(), "target_positions": 3}, "one target by itself"),
    ({"metric": lambda z: z[0]}, "must return one number"),
    ({"baseline": "pad"}, "no pad token"),
    ({"baseline": 2.5}, "a baseline is 'zero'"),
    ({"baseline": torch.zeros(31)}, r"\[32\] or \[8, 32\]; came \[31\]"),
    ({"baseline": torch.full((32,), float("nan"))}, "finite"),
    ({"baseline": torch.zeros(32, dtype=torch.long)}, "floating-point"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(gpt2, options, message):
    with pytest.raises(InputError, match=message):
        attribute_tokens(gpt2, None, IDS, **options)
    assert not any(module._forward_hooks for module in gpt2.modules())


def test_prompts_are_refused_before_any_pass(gpt2):
    for prompt, message in (([], "empty"), ([99], "vocabulary"), ([5] * 500, "context holds")):
        with pytest.raises(InputError, match=message):
            attribute_tokens(gpt2, None, prompt)


# --- What it costs, what it leaves behind ---------------------------------------------------------


def test_all_targets_share_one_pass_per_step(gpt2):
    rows = []
    handle = gpt2.register_forward_pre_hook(
        lambda _m, _a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = {"target_positions": "all", "n_steps": 10, "check_gradients": False}
    with handle:
        attribute_tokens(gpt2, None, IDS, **asked, batch_size=4)
    assert rows == [1, 4, 4, 2, 1], "the prompt, ten steps, the baseline"


def fingerprint(model):
    return (
        [(module._forward_hooks.copy(), module._forward_pre_hooks.copy(), module.training)
         for module in model.modules()],
        [(name, each.requires_grad, each.grad, each._version)
         for name, each in model.named_parameters()],
        dict(model.__dict__),
        model.config.to_dict(),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@quiet
def test_the_model_is_as_it_was(method):
    model = families.build("gpt2").train()
    model.transformer.h[1].eval()
    model.activation_checkpointing_enable()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    check_gradient(Architecture(model))
    before = fingerprint(model)
    trained = attribute_tokens(model, None, IDS, method)
    assert fingerprint(model) == before
    close(trained.scores, attribute_tokens(built("gpt2"), None, IDS, method).scores)

    def broken(*_):
        raise RuntimeError("planted")

    handle = model.transformer.h[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="planted"):
        attribute_tokens(model, None, IDS, method)
    handle.remove()
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_inside_contexts_without_gradient(gpt2, method):
    found = attribute_tokens(gpt2, None, IDS, method)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(attribute_tokens(gpt2, None, IDS, method).scores, found.scores)
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = copy.deepcopy(built("gpt2")).to(dtype)
    asked = {"targets": 7, "baseline": "mean"}
    for method in ("gradient_x_input", "integrated_gradients", "occlusion"):
        found = attribute_tokens(model, None, IDS, method, **asked)
        exact = attribute_tokens(built("gpt2"), None, IDS, method, **asked)
        assert found.scores.dtype == np.float64
        close(found.scores, exact.scores, 0.1 if dtype == torch.bfloat16 else 0.02)


NARROWLY = [*itertools.product(("gpt2", "llama"), (*GRADIENTS, "gradient_attention")),
            ("mamba", "saliency")]  # fmt: skip
"""Mamba's logits are float32 whatever it computes in."""


@pytest.mark.parametrize("two_stages", [True, False])
@pytest.mark.parametrize(("name", "method"), NARROWLY)
@quiet
def test_unlikely_tokens_in_float16(name, method, two_stages, monkeypatch):
    """A probability of 1e-13 has gradients that float16 cannot hold; beside a likely token's."""
    half = copy.deepcopy(built(name)).half()
    exact = copy.deepcopy(half).float()
    if not two_stages:
        monkeypatch.setattr(EmbeddingPass, "_before_head", lambda self: None)
    chances = exact(torch.tensor([IDS])).logits[0].detach().softmax(-1)
    tokens = [int(chances[3].argmax()), int((chances[-1] / 1e-13).log().abs().argmin())]
    assert float(chances[-1, tokens[1]]) < 1e-9
    asked = {"targets": tokens, "target_positions": [3, LENGTH - 1], "metric": "prob"}
    asked |= {"n_steps": 4} if method in ("integrated_gradients", "smoothgrad") else {}
    found, wanted = (attribute_tokens(each, None, IDS, method, **asked) for each in (half, exact))
    for row in range(2):
        assert found.scores[row].any()
        close(found.scores[row], wanted.scores[row], 0.2 if "grad" in method[1:] else 0.06)


def test_what_computes_narrowly(gpt2):
    assert not is_narrow(gpt2) and not is_narrow(copy.deepcopy(gpt2).bfloat16())
    assert is_narrow(copy.deepcopy(gpt2).half())
    mixed = copy.deepcopy(gpt2)
    mixed.transformer.h[1].half()
    assert is_narrow(mixed)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert is_narrow(gpt2) == (dtype == torch.float16)


def test_large_gradients_in_float16():
    half = copy.deepcopy(built("gpt2")).half()
    plain, large = (
        attribute_tokens(half, None, IDS, "saliency", metric=lambda z, by=by: by * z[0, -1, 7])
        for by in (1.0, 1e6)
    )
    close(large.scores / 1e6, plain.scores, 1e-2)


def test_double_precision_stays(gpt2):
    model = copy.deepcopy(gpt2).double()
    found = attribute_tokens(model, None, IDS, baseline=5, n_steps=200, targets=7)
    assert abs(found.completeness_error[0]) < 1e-9


@quiet
def test_a_batch_that_does_not_fit_is_halved(gpt2, monkeypatch):
    monkeypatch.setattr("memory_limits.gc.collect", lambda: 0)  # it takes its time
    whole = attribute_tokens(gpt2, None, IDS, target_positions="all", n_steps=12)
    real = EmbeddingPass.logits

    def small(self, embeddings):
        if embeddings is not None and len(embeddings) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, embeddings)

    monkeypatch.setattr(EmbeddingPass, "logits", small)
    with pytest.warns(SmallerBatchWarning, match="steps at a time do not fit"):
        again = attribute_tokens(gpt2, None, IDS, target_positions="all", n_steps=12)
    close(again.scores, whole.scores)

    def none(self, embeddings):
        if embeddings is not None:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, embeddings)

    monkeypatch.setattr(EmbeddingPass, "logits", none)
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(NotEnoughMemoryError, match=r"one of the steps alone.*tokens in one pass"),
    ):
        attribute_tokens(gpt2, None, IDS, n_steps=2)


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_threads_wait_for_one_another(method):
    """Also where a baseline is looked up, while another thread exchanges embeddings."""
    model = families.build("gpt2")
    asked = {"method": method, "targets": 7, "check_gradients": False}
    alone = attribute_tokens(model, None, IDS, **asked).scores
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(attribute_tokens, model, None, IDS, **asked) for _ in range(20)]
        for run in runs:
            close(run.result().scores, alone)


# --- Models without a gradient --------------------------------------------------------------------


class Cut(nn.Module):
    """A layer without a backward pass that says nothing of it, as quantized kernels may be."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden).detach()


class InPlace(nn.Module):
    """Writes into what it still needs for its gradient."""

    def forward(self, hidden):
        made = hidden.exp()
        made.add_(1)
        return made


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_silently_cut_graph_is_found(layer, dtype):
    model = families.build("llama").to(dtype)
    check_gradient(Architecture(model))
    block = model.model.layers[layer]
    block.self_attn.v_proj = Cut(block.self_attn.v_proj)
    name = rf"model\.layers\.{layer}\.self_attn\.v_proj"
    with pytest.raises(ArchitectureError, match=rf"see through {name} .*method='occlusion'"):
        attribute_tokens(model, None, IDS)
    assert np.isfinite(attribute_tokens(model, None, IDS, "occlusion").scores).all()


def test_a_verdict_ends_with_what_it_was_of():
    """A hook that cuts the graph is found whenever it comes, and forgotten when it is gone."""
    model = families.build("llama")
    asked = {"method": "gradient_x_input", "targets": 7}
    plain = attribute_tokens(model, None, IDS, **asked).scores
    for _ in range(2):
        with model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out.detach()):
            with pytest.raises(ArchitectureError, match=r"see through model\.layers\.1\.mlp "):
                attribute_tokens(model, None, IDS, **asked)
            wrong = attribute_tokens(model, None, IDS, **asked, check_gradients=False).scores
        close(attribute_tokens(model, None, IDS, **asked).scores, plain)
    assert np.abs(wrong - plain).max() > 0.1 * np.abs(plain).max()
    old = model.model.layers[1].mlp
    model.model.layers[1].mlp = Cut(old)
    with pytest.raises(ArchitectureError, match="see through"):
        attribute_tokens(model, None, IDS, **asked)
    model.model.layers[1].mlp = old
    close(attribute_tokens(model, None, IDS, **asked).scores, plain)


def test_autocast_is_low_precision_and_no_fault():
    model = families.build("llama")
    asked = {"method": "gradient_x_input", "targets": 7}
    with torch.autocast("cpu", torch.bfloat16):
        low = attribute_tokens(model, None, IDS, **asked).scores
    plain = attribute_tokens(model, None, IDS, **asked).scores
    close(low, plain, 0.3)


def test_a_model_is_checked_once(gpt2, monkeypatch):
    check_gradient(Architecture(gpt2))
    monkeypatch.setattr("gradient_check._fault", lambda _: pytest.fail("it was checked again"))
    attribute_tokens(gpt2, None, IDS, "saliency")
    attribute_tokens(gpt2, None, IDS, "gradient_attention")


def test_a_wrong_derivative_is_found():
    """Autograd sees through it, and is told another slope."""

    class Wrong(nn.Module):
        def forward(self, hidden):
            return 2 * hidden - hidden.detach()

    model = families.build("llama")
    check_gradient(Architecture(model))
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Wrong())
    with pytest.raises(ArchitectureError, match=r"they differ by \d+% on a probe"):
        attribute_tokens(model, None, IDS)


def test_no_family_is_suspected_in_half_precision(family):
    check_gradient(Architecture(copy.deepcopy(family[1]).to(torch.bfloat16)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_quantized_weights():
    """Torch's own int8 layers have no backward pass."""
    model = torch.ao.quantization.quantize_dynamic(families.build("llama"), {nn.Linear})
    with pytest.raises(ArchitectureError, match=r"quantized weights.*method='occlusion'"):
        attribute_tokens(model, None, IDS, "saliency")
    exact = attribute_tokens(built("llama"), None, IDS, "occlusion", targets=7).scores
    close(attribute_tokens(model, None, IDS, "occlusion", targets=7).scores, exact, 0.3)


def test_the_check_can_be_left_out():
    model = families.build("llama")
    model.model.layers[1].mlp = Cut(model.model.layers[1].mlp)
    with pytest.raises(ArchitectureError, match="check_gradients=False"):
        attribute_tokens(model, None, IDS, "saliency")
    assert attribute_tokens(model, None, IDS, "saliency", check_gradients=False).scores.any()


@pytest.mark.parametrize("check", [True, False])
def test_no_gradient_at_all_is_said(check):
    model = families.build("gpt2")
    model.transformer.ln_f = Cut(model.transformer.ln_f)
    with pytest.raises(ArchitectureError, match=r"no gradient with respect to its embeddings"):
        attribute_tokens(model, None, IDS, "saliency", check_gradients=check)
    model.transformer.ln_f = InPlace()
    with pytest.raises(ArchitectureError, match=r"no gradient.*inplace operation"):
        attribute_tokens(model, None, IDS, "saliency", check_gradients=check)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_looks_tokens_up_twice_is_refused():
    model = families.build("gpt2")
    inner = model.transformer.ln_f

    class Twice(nn.Module):
        def forward(self, hidden):
            return inner(hidden) + model.transformer.wte(torch.tensor([IDS[: hidden.shape[1]]]))

    model.transformer.ln_f = Twice()
    with pytest.raises(ArchitectureError, match="looks its tokens up 2 times"):
        attribute_tokens(model, None, IDS, "saliency", check_gradients=False)


# --- The result -----------------------------------------------------------------------------------


def test_a_target_is_a_number_or_a_label():
    found = some_result()
    assert [found.index(each) for each in (1, -1, np.int64(1), " b")] == [1] * 4
    assert type(found.index(np.int64(-1))) is int
    for wrong in (True, 0.0, None, 2, " c"):
        with pytest.raises(InputError):
            found.index(wrong)


def some_result(**changes):
    fields = {
        "scores": np.array([[3.0, -5.0, 0.0], [1.0, 2.0, -4.0]]),
        "value": np.array([2.0, 1.0]),
        "baseline_value": np.array([4.5, 2.0]),
        "tokens": (" the", " the", "\n"),
        "token_ids": (4, 4, 9),
        "target_positions": (1, 2),
        "targets": (" a", " b"),
        "target_ids": (7, 8),
        "method": "integrated_gradients",
        "metric": "log_prob",
        "unit": "nats",
        "baseline": "zero",
        "steps": 50,
    }
    return TokenAttribution(**(fields | changes))


def test_top_frame_and_repr():
    found = some_result()
    assert found.top(2) == [(1, " the", -5.0), (0, " the", 3.0)]
    assert found.top(1, " b") == [(2, "\n", -4.0)] == found.top(1, -1)
    frame = found.to_frame()
    assert len(frame) == 6 and frame["score"].tolist() == found.scores.ravel().tolist()
    assert frame.loc[4, ["target_label", "position", "token"]].tolist() == [" b", 1, " the"]
    np.testing.assert_allclose(found.completeness_error, [0.5, 0.0])
    np.testing.assert_allclose(found.relative_error, [0.5 / 8, 0.0])
    assert repr(found) == (
        "TokenAttribution(integrated_gradients, log_prob, 2 targets × 3 tokens, "
        "completeness error 6.2e-02)"
    )
    assert found.score_unit == "nats" and some_result(method="saliency").score_unit != "nats"
    assert some_result(value=np.full(2, np.nan)).relative_error.shape == (2,)


@pytest.mark.parametrize("dims", [None, np.ones((2, 3, 4), dtype=np.float32)])
def test_save_and_load(tmp_path, dims):
    found = some_result(per_dimension=dims)
    found.save(tmp_path / "a")
    again = TokenAttribution.load(tmp_path / "a")
    for name in ("scores", "value", "baseline_value"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert (again.per_dimension is None) == (dims is None)
    for name in ("tokens", "token_ids", "target_positions", "targets", "method", "steps", "unit"):
        assert getattr(again, name) == getattr(found, name)
    assert repr(again) == repr(found)
    (tmp_path / "b").write_bytes(b"nonsense" * 9)
    with pytest.raises(RecordFileError):
        TokenAttribution.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros((2, 4))}, "scores must be"),
        ({"value": np.zeros(3)}, "an entry per target"),
        ({"token_ids": (1, 2)}, "an id per token"),
        ({"target_positions": (1, 3)}, r"lie in 0\.\.2"),
        ({"per_dimension": np.zeros((2, 2, 4))}, "per_dimension must be"),
    ],
)
def test_numbers_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        some_result(**changes)


def test_a_target_that_is_not_there():
    with pytest.raises(InputError, match=r"targets 0\.\.1"):
        some_result().top(1, 2)
    with pytest.raises(InputError, match="0 targets are called"):
        some_result().top(1, " c")
    with pytest.raises(InputError, match="2 targets are called"):
        some_result(targets=(" a", " a")).top(1, " a")
    with pytest.raises(InputError, match="at least 1"):
        some_result().top(0)


def test_pictures(tmp_path):
    found = some_result()
    many = found.plot()
    assert len(many.axes[0].images) == 1
    one = found.plot(" a", save_path=tmp_path / "one.png")
    assert "' a' after token 1 (log_prob)" in one.axes[0].get_title("left")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert found.to_html().startswith("<!DOCTYPE html>")


def test_the_facade(gpt2):
    from model_analyzer import ModelAnalyzer

    analyzer = ModelAnalyzer(gpt2, tokenizer=families.tiny_tokenizer())
    found = analyzer.attribute_tokens("the cat sat", "saliency", " on", target_positions="all")
    assert len(found.scores) == len(found.tokens) and set(found.targets) == {" on"}


def test_attributions_are_silent(gpt2, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute_tokens(gpt2, None, IDS)
    assert capfd.readouterr() == ("", "")
