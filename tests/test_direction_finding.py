"""Directions from examples: planted ones are found; activations are those a plain hook sees."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import optimize

import families
from direction_finding import (
    METHODS,
    erased_direction,
    find_direction,
    find_directions,
    first_component,
    leace_eraser,
    mean_difference,
    probe_normal,
    read_examples,
)
from forward_pass import InputError, LayerError, SiteError
from intervention_handler import ActivationPatch, InterventionHandler
from model_architecture import Architecture

POSITIVE = ["the cat sat on the mat", "a cat", "the mat is here"]
NEGATIVE = ["no dog ran", "the big dog is on a road", "it"]
WIDTH = 16


@pytest.fixture(scope="module")
def model():
    return families.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [list(table.values()) for pair in tables for table in pair]


def block_outputs(model, ids, layer):
    """What a block returns for one prompt, by a plain hook: ``[position, d]``."""
    seen = []

    def keep(_module, _args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

    handle = Architecture(model).blocks[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0]


def planted(n=40, gap=3.0, seed=0):
    """Two noisy sets of vectors, and the unit vector by which they differ."""
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=WIDTH)
    unit /= np.linalg.norm(unit)
    centre = 5 * rng.normal(size=WIDTH)
    positive, negative = centre + 0.3 * rng.normal(size=(2, n, WIDTH))
    return torch.from_numpy(positive + gap * unit), torch.from_numpy(negative), unit


def cosine(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


# --- Methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [mean_difference, first_component, probe_normal])
def test_a_planted_direction_is_found(method):
    positive, negative, unit = planted()
    found = method(positive, negative)
    assert cosine(found, unit) > 0.98
    assert found.norm() == pytest.approx(3, abs=0.3)
    assert cosine(method(negative, positive), -unit) > 0.98


def test_pca_is_not_centred():
    """Where all pairs differ alike, centring leaves noise alone: the trap of many toolkits."""
    rng = np.random.default_rng(0)
    unit = np.eye(WIDTH)[3]
    negative = rng.normal(size=(30, WIDTH))
    positive = negative + 3 * unit + 0.1 * rng.normal(size=(30, WIDTH))
    differences = positive - negative
    centred = np.linalg.svd(differences - differences.mean(0))[2][0]
    uncentred = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    assert abs(cosine(centred, unit)) < 0.5
    found = first_component(torch.from_numpy(positive), torch.from_numpy(negative))
    assert cosine(found, unit) > 0.999
    assert abs(cosine(found, uncentred)) == pytest.approx(1, abs=1e-12)


def test_the_probe_minimises_the_logistic_loss():
    """Against the loss of logistic regression written out and minimised by SciPy."""
    rng = np.random.default_rng(1)
    scales = np.linspace(0.2, 2, 4)
    negative = rng.normal(size=(50, 4)) * scales
    positive = rng.normal(size=(60, 4)) * scales + [0.3, 0.0, 0.8, 1.0]
    x = np.concatenate([positive, negative])
    x = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).mean())
    sign = np.r_[np.ones(60), -np.ones(50)]

    def loss(w):
        return 0.5 * w[:4] @ w[:4] + np.logaddexp(0, -sign * (x @ w[:4] + w[4])).sum()

    expected = optimize.minimize(loss, np.zeros(5), tol=1e-12).x[:4]
    found = probe_normal(torch.from_numpy(positive), torch.from_numpy(negative))
    assert cosine(found, expected) > 0.99999
    gap = positive.mean(0) - negative.mean(0)
    assert cosine(gap, expected) < 0.99  # another answer than the mean difference


@pytest.mark.parametrize("method", [first_component, probe_normal])
def test_a_line_is_as_long_as_the_means_are_apart_along_it(method):
    positive, negative, _ = planted(n=6, gap=0.5)
    found = method(positive, negative)
    gap = positive.mean(0) - negative.mean(0)
    assert found.norm() == pytest.approx(float(gap @ found / found.norm()), rel=1e-6)


def test_methods_do_not_write_into_their_examples():
    for method in (mean_difference, first_component, probe_normal):
        tables = planted()[:2]
        copies = [table.clone() for table in tables]
        method(*tables)
        assert all(torch.equal(a, b) for a, b in zip(tables, copies, strict=True))


def oas_share(x):
    """Chen et al. 2010, equation 23, written out; 2 / p is taken as 0, as scikit-learn does."""
    centred = x - x.mean(0)
    n, p = x.shape
    s = centred.T @ centred / n
    square, trace = float((s @ s).trace()), float(s.trace())
    return min(1.0, (square + trace**2) / ((n + 1) * (square - trace**2 / p)))


@pytest.mark.parametrize(("n", "d"), [(6, 40), (200, 12)])
def test_leace_is_its_formula(n, d):
    """Σ^(½) P Σ^(−½) of the shrunk covariance, from a square root by another routine."""
    torch.manual_seed(n)
    spread = torch.linspace(0.2, 3, d, dtype=torch.float64)
    positive, negative = (torch.randn(n, d, dtype=torch.float64) * spread + k for k in (0.5, 0.0))
    x = torch.cat([positive, negative])
    share, sigma = oas_share(x), torch.cov(x.T, correction=0)
    sigma = (1 - share) * sigma + share * sigma.trace() / d * torch.eye(d, dtype=torch.float64)
    root = torch.from_numpy(scipy.linalg.sqrtm(sigma.numpy()).real)
    white = torch.linalg.solve(root, positive.mean(0) - negative.mean(0))
    projector = torch.outer(white, white) / (white @ white)
    map_ = torch.eye(d, dtype=torch.float64) - root @ projector @ torch.linalg.inv(root)
    expected = (x - x.mean(0)) @ map_.T + x.mean(0)
    torch.testing.assert_close(leace_eraser(positive, negative)(x), expected, rtol=1e-4, atol=1e-4)
    line = erased_direction(positive, negative)
    assert abs(cosine(line, root @ white)) == pytest.approx(1, abs=1e-9)


def test_leace_erases_what_a_linear_probe_could_find():
    positive, negative, unit = planted(n=400, gap=1.0)
    found = METHODS["leace"](positive, negative)
    assert cosine(found, unit) > 0.95
    erase = leace_eraser(positive, negative)
    gap = erase(positive).mean(0) - erase(negative).mean(0)
    assert gap.norm() < 1e-4
    assert (erase(positive) - positive).norm(dim=1).mean() < 1  # half the gap, and the noise
    half = erase(positive[None].bfloat16())
    assert (half.dtype, half.shape) == (torch.bfloat16, (1, *positive.shape))


def test_leace_can_be_put_in_force(model, tokenizer):
    examples = [read_examples(model, tokenizer, t, [1])[:, 0] for t in (POSITIVE, NEGATIVE)]
    erase = leace_eraser(*examples)
    handler = InterventionHandler(model)
    handler.register_activation_patch(ActivationPatch(1, None, erase))
    with handler:
        erased = [read_examples(model, tokenizer, t, [1])[:, 0] for t in (POSITIVE, NEGATIVE)]
    for before, after in zip(examples, erased, strict=True):
        torch.testing.assert_close(after, erase(before), rtol=1e-4, atol=1e-4)


def test_too_few_examples_for_leace_are_refused():
    with pytest.raises(InputError, match="give more of them"):
        leace_eraser(torch.ones(1, 4), torch.ones(1, 4))


# --- Reading --------------------------------------------------------------------------------------


def test_examples_are_read_as_one_by_one(family, tokenizer):
    """Padded in one batch, for every family, against a plain hook on each prompt alone."""
    _, model = family
    layers = [0, Architecture(model).n_layers - 1]
    before = hooks_of(model)
    found = read_examples(model, tokenizer, POSITIVE, layers)
    assert hooks_of(model) == before
    assert found.shape == (3, 2, families.HIDDEN)
    for row, text in enumerate(POSITIVE):
        for column, layer in enumerate(layers):
            expected = block_outputs(model, tokenizer(text)["input_ids"], layer)[-1]
            torch.testing.assert_close(found[row, column], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("read", "chosen"),
    [
        ("last", slice(-1, None)),
        (-1, slice(-1, None)),
        (1, slice(1, 2)),
        ("mean", slice(None)),
        (None, slice(None)),
        (slice(1, None), slice(1, None)),
        ([0, -1], [0, -1]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_which_tokens_are_read(model, tokenizer, read, chosen, batch_size):
    texts = ["the cat sat on the mat", "a cat", "no dog ran"]
    found = read_examples(model, tokenizer, texts, [1], read=read, batch_size=batch_size)
    for row, text in enumerate(texts):
        tokens = block_outputs(model, tokenizer(text)["input_ids"], 1)
        torch.testing.assert_close(found[row, 0], tokens[chosen].mean(0), rtol=1e-4, atol=1e-5)


def test_a_mean_leaves_special_tokens_out(model):
    tokenizer = families.tiny_tokenizer(bos=True)
    ids = tokenizer("the cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    found = read_examples(model, tokenizer, ["the cat"], [1], read="mean")
    expected = block_outputs(model, ids, 1)[1:].mean(0)
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="leaves out special tokens"):
        read_examples(model, tokenizer, [[1]], [1], read="mean")


def test_a_chat_goes_through_its_template_once(model):
    tokenizer = families.tiny_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} me{% endif %}"
    )
    chat = [{"role": "user", "content": "the cat"}]
    ids = list(
        tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    found = read_examples(model, tokenizer, [chat, chat], [2])
    torch.testing.assert_close(found[0, 0], block_outputs(model, ids, 2)[-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="write prompts="):
        read_examples(model, tokenizer, chat)


def test_a_mean_over_a_sink_warns():
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 200
    uneven, even = [[5, 6, 7, 8], [5, 6, 9]], [[5, 6, 7], [5, 6, 9]]
    with pytest.warns(UserWarning, match=r"read=slice\(1, None\)"):
        read_examples(model, None, uneven, [0], read="mean")
    with pytest.warns(UserWarning, match="prompts of different lengths"):
        find_direction(model, None, even, [[5, 7]], 0, read="mean")
    for rows, read in ((uneven, slice(1, None)), (uneven, "last"), (even, "mean")):
        read_examples(model, None, rows, [0], read=read)


# --- Directions -----------------------------------------------------------------------------------


def test_the_default_is_the_mean_difference_at_the_last_token(family, tokenizer):
    name, model = family
    found = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1)
    positive, negative = (
        torch.stack([block_outputs(model, tokenizer(t)["input_ids"], 1)[-1] for t in texts])
        for texts in (POSITIVE, NEGATIVE)
    )
    expected = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(found.vector, expected, rtol=1e-3, atol=3e-4)
    assert (found.layer, found.site, found.method) == (1, "resid_post", "mean")
    assert found.model == model.config.model_type, name


def test_every_layer_in_any_spelling(model, tokenizer):
    every = find_directions(model, tokenizer, POSITIVE, NEGATIVE)
    assert list(every) == [0, 1, 2]
    for layers in (-1, "layers.2", "model.layers.2", [2], np.int64(2)):
        (one,) = find_directions(model, tokenizer, POSITIVE, NEGATIVE, layers).values()
        assert one.layer == 2
        torch.testing.assert_close(one.vector, every[2].vector)
    unit = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 2, normalize=True, label="cat")
    assert unit.norm == pytest.approx(1)
    assert unit.label == "cat"
    assert unit.cosine(every[2]) == pytest.approx(1)


@pytest.mark.parametrize("method", ["pca", "probe", lambda p, n: p[0] - n[0]])
def test_other_methods_get_the_same_tables(model, tokenizer, method):
    seen = []

    def watched(positive, negative):
        seen.append((positive, negative))
        return METHODS.get(method, method)(positive, negative)

    found = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1, method=method)
    same = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1, method=watched)
    torch.testing.assert_close(found.vector, same.vector)
    assert same.method == "watched"
    for table, texts in zip(seen[0], (POSITIVE, NEGATIVE), strict=True):
        expected = read_examples(model, tokenizer, texts, [1])[:, 0]
        torch.testing.assert_close(table, expected.double())


def test_other_sites(model, tokenizer):
    found = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1, site="mlp_neurons")
    assert (found.site, len(found.vector)) == ("mlp_neurons", families.INTERMEDIATE)
    with pytest.raises(SiteError, match="one vector per token"):
        find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1, site="query")


def test_statistics_of_a_bfloat16_model_are_float32(tokenizer):
    model = families.build("llama").to(torch.bfloat16)
    found = find_direction(model, tokenizer, POSITIVE, NEGATIVE, 1)
    assert found.vector.dtype == torch.float32
    exact = find_direction(families.build("llama"), tokenizer, POSITIVE, NEGATIVE, 1)
    assert found.cosine(exact) > 0.99


def test_token_ids_need_no_tokenizer(model):
    rows = [families.token_ids(1, n, seed=n)[0] for n in (3, 5)]
    as_lists = find_direction(model, None, [rows[0].tolist()], [rows[1].tolist()], 1)
    as_tensors = find_direction(model, None, [rows[0]], [rows[1]], 1)
    assert torch.equal(as_lists.vector, as_tensors.vector)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positive_prompts": "the cat"}, r"write positive_prompts=\['the cat'\]"),
        ({"negative_prompts": [5, 6]}, "a single one came"),
        ({"positive_prompts": []}, "positive_prompts is empty"),
        ({"positive_prompts": None}, "came NoneType"),
        ({"negative_prompts": ["a", ""]}, r"negative_prompts\[1\]: .*no token"),
        ({"read": 7}, r"positive_prompts\[1\]: position 7 is out of range"),
        ({"read": "first"}, "positions is 'last'"),
        ({"read": 0, "negative_prompts": POSITIVE}, "same activation at resid_post of layer 1"),
        ({"negative_prompts": POSITIVE[::-1]}, "same activation"),
        ({"method": "median"}, "none of mean, pca, probe, leace"),
        ({"method": "pca", "negative_prompts": ["a"]}, "compares pairs: 3 positive and 1"),
        ({"method": lambda p, n: p}, r"must return a finite direction \[32\]"),
        ({"method": lambda p, n: p[0] * float("nan")}, "finite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_input_says_what_to_do(model, tokenizer, changed, message):
    arguments = {"positive_prompts": POSITIVE, "negative_prompts": NEGATIVE} | changed
    with pytest.raises(InputError, match=message):
        find_direction(model, tokenizer, layer=1, **arguments)


def test_a_wrong_layer_is_named(model, tokenizer):
    with pytest.raises(LayerError, match=r"valid are 0\.\.2"):
        find_direction(model, tokenizer, POSITIVE, NEGATIVE, 3)
    with pytest.raises(LayerError, match=r"nearest is 'model\.layers\.1'"):
        find_direction(model, tokenizer, POSITIVE, NEGATIVE, "h.1")


def test_the_first_token_alone_does_not_differ(model):
    tokenizer = families.tiny_tokenizer(bos=True)
    with pytest.raises(InputError, match="same activation"):
        find_direction(model, tokenizer, ["the cat"], ["no dog ran"], 1, read=0)
