"""Two models compared: nothing between twins, and a planted change where it was planted."""

import copy

import numpy as np
import pytest
import torch

import families
import model_comparison
from activation_rows import read_rows
from comparison_result import ModelComparison, WeightChanges
from forward_pass import InputError, Site, record
from logit_lens import LogitLens
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from model_comparison import compare_models, compare_weights
from saved_files import read_after_damage
from similarity import CKAMeter, linear_cka


def prompts_of(count=5, length=6):
    rng = np.random.default_rng(1)
    return [[int(t) for t in rng.integers(4, 90, length + i % 2)] for i in range(count)]


def change(model, name, size=0.05):
    """A copy with noise added to one parameter."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        parameter = dict(other.named_parameters())[name]
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        parameter.add_(size * noise)
    return other


def last_matrix_of_block(model, layer):
    """The name of a block's last parameter with two axes or more."""
    start = Architecture(model).layer_names[layer] + "."
    return [n for n, p in model.named_parameters() if n.startswith(start) and p.dim() > 1][-1]


def streams(model, prompts):
    """``[row, token, d]``, float64: the input of block 0, then the outputs of blocks."""
    arch = Architecture(model)
    sites = [Site("resid_pre", 0), *(Site("resid_post", i) for i in range(arch.n_layers))]
    found = [record(arch, arch.inputs(torch.tensor([ids])), sites) for ids in prompts]
    return torch.stack([torch.cat([kept[site][0] for kept in found]) for site in sites]).double()


# --- Twins and planted changes --------------------------------------------------------------------


def test_a_model_and_itself_are_the_same(family):
    _, model = family
    found = compare_models(model, None, model, prompts_of())
    assert not found.distance.any()
    assert not found.lens_kl.any()
    assert (found.agreement == 1).all()
    assert found.cosine == pytest.approx(np.ones(len(found.cosine)))
    assert found.cka == pytest.approx(np.ones(len(found.cka)))
    assert not found.weights.change.any()
    assert found.weights.total == 0
    assert not found.weights.unmatched
    assert found.row_labels == ("embed", *map(str, range(Architecture(model).n_layers)))


def test_a_planted_change_is_found_in_its_layer_and_only_there(family):
    _, model = family
    name = last_matrix_of_block(model, 1)
    other = change(model, name)
    found = compare_models(model, None, other, prompts_of())
    moved = [n for n, size in zip(found.weights.names, found.weights.change, strict=True) if size]
    assert moved == [name]
    place = found.weights.names.index(name)
    assert found.weights.layers[place] == 1
    table = found.weights.by_layer()
    assert (table.loc[1].fillna(0) > 0).sum() == 1
    assert not table.drop(index=1).fillna(0).to_numpy().any()
    assert not found.distance[:2].any()
    assert not found.lens_kl[:2].any()
    assert (found.distance[2:] > 0).all()
    assert (found.lens_kl[2:] > 0).all()
    assert (found.agreement[:2] == 1).all()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere", "granite", "mamba"])
def test_every_number_is_that_of_plain_formulas(name):
    model, prompts = families.build(name), prompts_of()
    other = change(model, last_matrix_of_block(model, 0), 0.3)
    found = compare_models(model, None, other, prompts)
    a, b = streams(model, prompts), streams(other, prompts)
    assert (found.texts, found.tokens) == (5, a.shape[1])
    for row in range(len(found.row_labels)):
        gap = ((b[row] - a[row]) ** 2).sum().sqrt() / (a[row] ** 2).sum().sqrt()
        assert found.distance[row] == pytest.approx(float(gap), abs=1e-6)
        cosine = torch.cosine_similarity(a[row], b[row], dim=-1).mean()
        assert found.cosine[row] == pytest.approx(float(cosine), abs=1e-6)
        assert found.cka[row] == pytest.approx(linear_cka(a[row], b[row], debiased=True), abs=1e-6)
        p, q = (
            LogitLens(m).apply_lens_to_hidden_state(x[row].float()).double().log_softmax(-1)
            for m, x in ((model, a), (other, b))
        )
        assert found.lens_kl[row] == pytest.approx(
            float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6
        )
        assert found.agreement[row] == float((p.argmax(-1) == q.argmax(-1)).float().mean())
    with torch.no_grad():
        logits = [
            torch.cat([m(torch.tensor([ids])).logits[0] for ids in prompts]).double()
            for m in (model, other)
        ]
    p, q = (x.log_softmax(-1) for x in logits)
    assert found.final_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_direction_of_the_divergence_is_first_to_second():
    one, two = families.build("llama"), families.build("llama", seed=1)
    there, back = (compare_models(a, None, b, prompts_of()) for a, b in ((one, two), (two, one)))
    assert abs(there.final_kl - back.final_kl) > 0.01
    assert there.agreement == pytest.approx(back.agreement)
    assert abs(there.distance[1] - back.distance[1]) > 1e-4


def test_cka_goes_by_minibatches_of_which_none_is_small(monkeypatch):
    monkeypatch.setattr(model_comparison, "BATCH_ROWS", 10)
    sizes = []

    class Watched(CKAMeter):
        def add(self, x, y=None):
            sizes.append(len(x))
            super().add(x, y)

    monkeypatch.setattr(model_comparison, "CKAMeter", Watched)
    one, two = families.build("llama"), families.build("llama", seed=1)
    found = compare_models(one, None, two, [[5] * 3 + list(range(4, 40)), [7, 8, 9, 10]])
    assert sizes == [10, 10, 10, 13 // 2, 13 - 13 // 2]
    assert sum(sizes) == found.tokens
    x, y = (read_rows(m, None, [[5, 6, 7]]).values for m in (one, two))
    assert x.shape == y.shape
    assert np.isnan(compare_models(one, None, two, [[5, 6, 7]]).cka).all()


# --- What is a second model -----------------------------------------------------------------------


def test_a_folder_an_analyzer_and_a_live_model_are_the_same(tmp_path):
    model, tokenizer = families.build("llama"), families.tiny_tokenizer()
    other = change(model, last_matrix_of_block(model, 2))
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the cat sat on the mat", "a cat"]
    analyzer = ModelAnalyzer(model, "cpu", tokenizer=tokenizer)
    found = [
        analyzer.compare_models(each, texts)
        for each in (str(tmp_path), ModelAnalyzer(other, "cpu", tokenizer=tokenizer), other)
    ]
    assert found[0].final_kl == found[1].final_kl == found[2].final_kl > 0
    assert found[0].models[1] == str(tmp_path)


def test_models_without_head_are_compared_up_to_the_lens():
    one, two = families.build("llama"), families.build("llama", seed=1)
    found = compare_models(one.model, None, two.model, prompts_of(), weights=False)
    whole = compare_models(one, None, two, prompts_of())
    assert found.distance == pytest.approx(whole.distance)
    assert np.isnan(found.lens_kl).all()
    assert np.isnan(found.agreement).all()
    assert found.weights is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_an_adapter_counts_with_what_it_adds():
    peft = pytest.importorskip("peft")
    base = families.build("llama")
    tuned = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name and ".1." in name:
                parameter.normal_(std=0.3)
    merged = copy.deepcopy(tuned).merge_and_unload()
    found = compare_models(base, None, tuned, prompts_of())
    wanted = compare_models(base, None, merged, prompts_of())
    assert found.distance == pytest.approx(wanted.distance, abs=1e-5)
    by_name = dict(zip(wanted.weights.names, wanted.weights.change, strict=True))
    assert found.weights.change == pytest.approx(
        [by_name[n] for n in found.weights.names], abs=1e-5
    )
    assert sum(found.weights.change > 0) == 2
    assert {found.weights.layers[i] for i in np.flatnonzero(found.weights.change)} == {1}
    assert not found.weights.unmatched


# --- Weights --------------------------------------------------------------------------------------


def test_changes_are_frobenius_norms():
    model = families.build("gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    other = change(model, name, 0.2)
    found = compare_weights(model, other)
    a, b = (dict(m.named_parameters())[name].detach().double() for m in (model, other))
    place = found.names.index(name)
    assert found.change[place] == pytest.approx(float((b - a).norm()), rel=1e-6)
    assert found.norm[place] == pytest.approx(float(a.norm()), rel=1e-6)
    assert found.relative[place] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    whole = sum(float((p.detach().double() ** 2).sum()) for p in model.parameters())
    assert found.total == pytest.approx(float((b - a).norm()) / whole**0.5, rel=1e-6)
    assert sum(found.sizes) == sum(p.numel() for p in model.parameters())
    assert "1 of" in repr(found)
    assert found.parts[place] == "attention"


def test_a_parameter_that_holds_nan_has_not_stayed():
    """A broken fine-tune: NaN is not less than any change, and no sum leaves it out."""
    one = families.build("gpt2")
    two = copy.deepcopy(one)
    with torch.no_grad():
        two.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
        two.transformer.h[2].mlp.c_fc.weight[0, 0] += 1
    found = compare_weights(one, two)
    relative = dict(zip(found.names, found.relative, strict=True))
    assert np.isnan(relative["transformer.h.1.mlp.c_fc.weight"])
    assert relative["transformer.h.2.mlp.c_fc.weight"] > 0
    assert relative["transformer.h.0.mlp.c_fc.weight"] == 0
    table = found.by_layer()
    assert np.isnan(table.loc[1, "mlp"]) and table.loc[2, "mlp"] > 0 and table.loc[0, "mlp"] == 0
    assert repr(found).startswith("WeightChanges(2 of 40 parameters moved, relative change nan")
    broken = compare_models(two, None, two, [[3, 4, 5, 6, 7]], weights=False)
    assert broken.agreement.tolist() == [1, 1, 0, 0]
    assert np.isnan(broken.lens_kl[2:]).all()


def test_every_parameter_has_its_place(family):
    _, model = family
    arch = Architecture(model)
    found = compare_weights(model, model)
    assert set(found.names) == {name for name, _ in model.named_parameters()}
    places = dict(zip(found.names, zip(found.layers, found.parts, strict=True), strict=True))
    for layer, block in enumerate(arch.layer_names):
        assert all(places[n][0] == layer for n in found.names if n.startswith(f"{block}."))
    embedding = next(
        n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight
    )
    assert places[embedding] == (-1, "embedding")
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        head = next(
            n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight
        )
        assert places[head] == (-1, "head")


def test_parameters_that_only_one_has_are_named():
    one, two = families.build("llama"), families.build("qwen2")
    found = compare_weights(one, two)
    assert "model.layers.0.self_attn.q_proj.bias" in found.unmatched
    assert "model.layers.0.self_attn.q_proj.weight" in found.names
    with pytest.raises(InputError, match="no parameter in common"):
        compare_weights(one, families.build("gpt2"))


# --- What is refused ------------------------------------------------------------------------------


def test_models_that_do_not_correspond_are_refused():
    model, tokenizer = families.build("llama"), families.tiny_tokenizer()
    less = families.tiny_tokenizer(95)
    for other, options, message in (
        (families.build("llama", num_hidden_layers=2), {}, "3 and 2 layers"),
        (families.build("gpt2", n_embd=16), {}, "32 and 16 dimensions"),
        (families.build("llama", vocab_size=120), {}, "99 and 120 tokens"),
        (model, {"other_tokenizer": less}, "tokenizers differ in 4 of 99"),
    ):
        with pytest.raises(InputError, match=message):
            compare_models(model, tokenizer, other, ["the cat"], **options)
    for texts, message in (("the cat", "list of prompts"), ([], "empty"), ([[500]], r"texts\[0\]")):
        with pytest.raises(InputError, match=message):
            compare_models(model, tokenizer, model, texts)
    with_bos = families.tiny_tokenizer(bos=True)
    with pytest.raises(InputError, match=r"split texts\[0\] differently"):
        compare_models(model, tokenizer, model, ["a cat"], other_tokenizer=with_bos)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- The result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    model = families.build("llama")
    return compare_models(model, None, change(model, last_matrix_of_block(model, 1)), prompts_of())


def test_a_comparison_survives_its_file_and_damage(result, tmp_path):
    result.save(tmp_path / "comparison")
    again = ModelComparison.load(tmp_path / "comparison")
    for name in ("distance", "cosine", "cka", "lens_kl", "agreement"):
        assert np.array_equal(getattr(again, name), getattr(result, name))
    assert again.weights.names == result.weights.names
    assert again.weights.by_layer().equals(result.weights.by_layer())
    assert repr(again) == repr(result)
    assert "\n" not in repr(result)
    assert read_after_damage(result, tmp_path / "comparison") > 20
    bare = compare_models(
        families.build("llama"), None, families.build("llama"), [[5, 6]], weights=False
    )
    bare.save(tmp_path / "bare")
    assert ModelComparison.load(tmp_path / "bare").weights is None


def test_frames_and_pictures(result, tmp_path):
    frame = result.to_frame()
    assert frame["lens_kl_nats"].tolist() == result.lens_kl.tolist()
    assert frame["layer"].tolist() == ["embed", "0", "1", "2"]
    weights = result.weights.to_frame()
    assert weights["relative"].tolist() == result.weights.relative.tolist()
    figure = result.plot(save_path=tmp_path / "x.png")
    lines = {line.get_label(): line.get_ydata().tolist() for ax in figure.axes for line in ax.lines}
    assert lines["debiased CKA"] == result.cka.tolist()
    assert lines["mlp"] == result.weights.by_layer()["mlp"].loc[[0, 1, 2]].tolist()
    drawn = np.asarray(result.weights.plot().axes[0].images[0].get_array())
    assert drawn == pytest.approx(
        np.ma.filled(result.weights.by_layer().T.to_numpy(), 0), nan_ok=True
    )


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="an entry for each of 2"):
        WeightChanges(("a", "b"), np.zeros(2), np.zeros(1), (0, 0), ("mlp",) * 2, (1, 1))
    with pytest.raises(InputError, match="3 numbers"):
        ModelComparison(*[np.zeros(2)] * 5, ("embed", "0", "1"), ("a", "b"), 1, 1)
