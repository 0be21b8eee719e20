"""The lens against the model's own logits, and against norm, head, scale and soft-cap by hand."""

import gc
import weakref

import numpy as np
import pytest
import scipy.special
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import families
import lens_rows
import logit_lens
from forward_pass import ArchitectureError, InputError, LayerError, Site, SiteError, record
from lens_metrics import DEFAULT_METRICS, METRICS
from lens_result import EMBED, LensResult
from logit_lens import LogitLens
from model_loader import load_model
from tuned_lens import TunedLens

LENGTH = 9
IDS = families.token_ids(1, LENGTH)[0].tolist()
TEXT = "the cat sat on the mat."


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    return LogitLens(families.build("gpt2"), tokenizer=tokenizer)


@pytest.fixture
def lens(family, tokenizer):
    return LogitLens(family[1], tokenizer=tokenizer)


def own_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def block_outputs(model, ids=IDS):
    """What enters block 0 and what leaves each block, by plain hooks; the last axis is d_model."""
    blocks = LogitLens(model).architecture.blocks
    seen, handles = [], []

    def entering(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden[0].clone())

    def leaving(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0].clone())

    handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
    handles += [block.register_forward_hook(leaving) for block in blocks]
    try:
        own_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


NORMS = {
    "gpt2": lambda m: m.transformer.ln_f,
    "gptj": lambda m: m.transformer.ln_f,
    "gpt_neo": lambda m: m.transformer.ln_f,
    "gpt_neox": lambda m: m.gpt_neox.final_layer_norm,
    "opt": lambda m: m.model.decoder.final_layer_norm,
    "bloom": lambda m: m.transformer.ln_f,
    "mpt": lambda m: m.transformer.norm_f,
    "falcon": lambda m: m.transformer.ln_f,
    "falcon_new": lambda m: m.transformer.ln_f,
    "phi": lambda m: m.model.final_layernorm,
    "mamba": lambda m: m.backbone.norm_f,
}
"""Where the final norm is; elsewhere it is ``model.model.norm``."""

AFTER_HEAD = {
    "gemma2": lambda z: 10 * torch.tanh(z / 10),
    "cohere": lambda z: z * 0.5,
    "granite": lambda z: z / 2,
}
"""What a model does to its logits, with the numbers of `families`."""


def lens_by_hand(name, model, hidden, apply_ln=True):
    norm = NORMS.get(name, lambda m: m.model.norm)(model)
    with torch.no_grad():
        logits = model.get_output_embeddings()(norm(hidden) if apply_ln else hidden)
    return AFTER_HEAD.get(name, lambda z: z)(logits)


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [hook for pair in tables for table in pair for hook in table.values()]


def kl(p_logits, q_logits):
    p, q = (scipy.special.log_softmax(z.double().numpy(), axis=-1) for z in (p_logits, q_logits))
    return (np.exp(p) * (p - q)).sum(-1)


# --- Every architecture ---------------------------------------------------------------------------


def test_the_last_row_is_the_model_itself_to_the_bit(family, lens):
    own = own_logits(family[1])
    n_layers = lens.architecture.n_layers
    stream = block_outputs(family[1])[-1]
    assert torch.equal(lens.apply_lens_to_hidden_state(stream), own)
    found = lens.get_layer_predictions(IDS, return_logits=True)
    assert torch.equal(found["layers"][n_layers - 1]["logits"], own)
    assert torch.equal(found["final_logits"], own)
    result = lens.run(IDS, 99, metrics=METRICS)
    assert (result.top_logits[-1] == own.sort(descending=True).values.numpy()).all()
    np.testing.assert_allclose(
        result.top_probs[-1], own.softmax(-1).sort(descending=True).values, rtol=2e-5, atol=1e-9
    )
    for name in ("kl_divergence", "js_divergence", "total_variation", "top1_rank"):
        assert (result.metrics[name][-1] == 0).all()
    assert (result.metrics["top1_match"][-1] == 1).all()


@pytest.mark.parametrize("apply_ln", [True, False])
def test_every_row_is_norm_and_head_by_hand(family, lens, apply_ln):
    """Also with soft-cap and scales; without the norm, what follows it stays."""
    name, model = family
    streams = block_outputs(model)
    result = lens.run(IDS, 99, apply_ln=apply_ln, target=5)
    assert result.row_labels == (EMBED, *map(str, range(len(streams) - 1)))
    own = own_logits(model)
    for row, stream in enumerate(streams):
        expected = lens_by_hand(name, model, stream, apply_ln)
        found = torch.empty_like(expected)
        ids = torch.from_numpy(result.top_ids[row])
        found.scatter_(1, ids, torch.from_numpy(result.top_logits[row]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        last_kl = result.metrics["kl_divergence"][row]
        np.testing.assert_allclose(last_kl, kl(own, expected), rtol=1e-3, atol=1e-4)
        shares = expected.softmax(-1)[:, 5]
        np.testing.assert_allclose(result.metrics["target_prob"][row], shares, rtol=1e-3, atol=1e-6)
    assert hooks_of(model) == []


def test_leaving_the_norm_out_changes_the_logits(family, lens):
    """So the norm was really found."""
    hidden = 3 * torch.randn(2, 3, families.HIDDEN, generator=torch.Generator().manual_seed(1))
    with_norm, without = (lens.apply_lens_to_hidden_state(hidden, flag) for flag in (True, False))
    assert with_norm.shape == without.shape == (2, 3, families.VOCAB)
    assert (with_norm - without).abs().max() > 0.5


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_other_sites_are_what_the_engine_records_there(family, lens, site):
    name, model = family
    arch = lens.architecture
    have = [i for i in range(arch.n_layers) if arch.missing(Site(site, i)) is None]
    if not have:
        with pytest.raises(SiteError, match=site):
            lens.run(IDS, site=site)
        return
    sites = [Site(site, layer) for layer in have]
    kept = record(arch, arch.inputs(torch.tensor([IDS])), sites)
    result = lens.run(IDS, 3, site=site, metrics=("kl_divergence",))
    assert result.row_labels == tuple(map(str, have))
    own = own_logits(model)
    for row, where in enumerate(sites):
        expected = lens_by_hand(name, model, kept[where][0])
        torch.testing.assert_close(
            torch.from_numpy(result.top_logits[row]), expected.topk(3).values, rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            result.metrics["kl_divergence"][row], kl(own, expected), rtol=1e-3, atol=1e-4
        )


def test_heads_and_bias_add_up_to_what_attention_adds(family, lens):
    """Without norm and soft-cap the lens is linear, so the logits of the heads add up too."""
    name, model = family
    arch = lens.architecture
    if arch.missing(Site("head_out", 0)):
        with pytest.raises(SiteError, match="head_out"):
            lens.run(IDS, site="head_out", head=0)
        return
    if name in ("gemma2", "gemma3", "olmo2"):
        pytest.skip("a norm follows attention, so its parts do not add up")
    n_heads, structure = arch.heads(0)[0], arch.structure[0]
    projection = arch.blocks[0].get_submodule(structure.out_proj)
    kept = record(
        arch, arch.inputs(torch.tensor([IDS])), [Site("attn_out", 0), Site("head_out", 0)]
    )
    width = kept[Site("head_out", 0)].flatten(-2).shape[-1]
    with torch.no_grad():
        bias = structure.scale * projection(torch.zeros(1, width))[0]
    nothing, total = (lens_by_hand(name, model, h, False) for h in (torch.zeros_like(bias), bias))
    total = total.expand(LENGTH, -1).clone()
    for head in range(n_heads):
        result = lens.run(IDS, 99, site="head_out", head=head, layer_indices=[0], apply_ln=False)
        ids, logits = (torch.from_numpy(table[0]) for table in (result.top_ids, result.top_logits))
        total.scatter_add_(1, ids, logits)
        total -= nothing  # the head's own bias (GPT-J, Phi) counts once
    expected = lens_by_hand(name, model, kept[Site("attn_out", 0)][0], apply_ln=False)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)


def test_a_negative_head_counts_from_the_end(gpt2):
    last, same = (gpt2.run(IDS, 2, site="head_out", head=head) for head in (3, -1))
    assert (last.top_logits == same.top_logits).all()
    assert (last.top_logits != gpt2.run(IDS, 2, site="head_out", head=0).top_logits).any()


# --- Configs with another way to the logits -------------------------------------------------------


@pytest.mark.parametrize("apply_ln", [True, False])
def test_a_model_without_a_final_norm(apply_ln):
    """OPT-350m: norms after the sublayers, none at the end, and a projection to the embedding."""
    model = families.build("opt", do_layer_norm_before=False, word_embed_proj_dim=16)
    lens = LogitLens(model)
    assert lens.architecture.final_norm is None
    stream = block_outputs(model)[1]
    with torch.no_grad():
        expected = model.lm_head(model.model.decoder.project_out(stream))
    torch.testing.assert_close(lens.apply_lens_to_hidden_state(stream, apply_ln), expected)
    last = lens.apply_lens_to_hidden_state(block_outputs(model)[-1], apply_ln)
    assert torch.equal(last, own_logits(model))


def test_a_projection_behind_the_final_norm_stays_without_the_norm():
    model = families.build("opt", word_embed_proj_dim=16)
    lens = LogitLens(model)
    stream = block_outputs(model)[1]
    decoder = model.model.decoder
    assert lens.architecture.final_norm is decoder.final_layer_norm
    with torch.no_grad():
        expected = model.lm_head(decoder.project_out(stream))
    torch.testing.assert_close(lens.apply_lens_to_hidden_state(stream, apply_ln=False), expected)


def test_half_precision(tokenizer):
    model = families.build("llama").bfloat16()
    lens = LogitLens(model, tokenizer=tokenizer)
    result = lens.run(IDS, 4)
    assert torch.equal(lens.get_layer_predictions(IDS)["final_logits"], own_logits(model))
    assert (result.top_logits[-1] == own_logits(model).float().topk(4).values.numpy()).all()
    assert (result.metrics["kl_divergence"][-1] == 0).all()
    assert lens.apply_lens_to_hidden_state(torch.zeros(1, 32)).dtype == torch.bfloat16


def test_a_model_in_training_mode_is_read_without_dropout_and_left_in_it(tokenizer):
    model = families.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = LogitLens(model).run(IDS, 3)
    model.train()
    found = LogitLens(model).run(IDS, 3)
    assert (found.top_logits == expected.top_logits).all()
    assert all(module.training for module in model.modules())


# --- One hidden state -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (1, 2, 2, 2)])
def test_any_leading_axes(gpt2, shape):
    hidden = torch.randn(*shape, families.HIDDEN, generator=torch.Generator().manual_seed(0))
    found = gpt2.apply_lens_to_hidden_state(hidden)
    expected = lens_by_hand("gpt2", gpt2.model, hidden)
    torch.testing.assert_close(found, expected)


def test_more_rows_than_the_context_holds(gpt2):
    hidden = torch.randn(families.POSITIONS + 50, families.HIDDEN)
    assert gpt2.apply_lens_to_hidden_state(hidden).shape == (
        families.POSITIONS + 50,
        families.VOCAB,
    )


@pytest.mark.parametrize("shape", [(3, 31), (), (0, 32)])
def test_what_is_no_hidden_state_is_refused(gpt2, shape):
    with pytest.raises(InputError, match=r"a hidden state is \[\.\.\., 32\]"):
        gpt2.apply_lens_to_hidden_state(torch.zeros(shape))


def test_hidden_states_without_values_are_refused(gpt2):
    with pytest.raises(InputError, match="have no values"):
        gpt2.apply_lens_to_hidden_state(torch.zeros(1, 32, device="meta"))


# --- Tables ---------------------------------------------------------------------------------------


def test_next_tokens_are_those_of_the_text(gpt2):
    metrics = gpt2.run(IDS, 1).metrics
    shares = own_logits(gpt2.model).double().softmax(-1)
    for position, token in enumerate(IDS[1:]):
        share = float(shares[position, token])
        assert metrics["next_token_prob"][-1, position] == pytest.approx(share, rel=1e-4)
        assert metrics["cross_entropy"][-1, position] == pytest.approx(-np.log(share), rel=1e-4)
        rank = int((shares[position] > share).sum())
        assert metrics["next_token_rank"][-1, position] == rank
    for name in ("next_token_prob", "next_token_rank", "cross_entropy"):
        assert np.isnan(metrics[name][:, -1]).all()
        assert np.isfinite(metrics[name][:, :-1]).all()


@pytest.mark.parametrize("positions", [1, 2, 4, 100])
def test_chunks_of_any_size_give_the_same_result(gpt2, positions, monkeypatch):
    whole, kept = gpt2.run(IDS, 5, target=7, metrics=METRICS), gpt2.compare_to_input(IDS)
    predictions = gpt2.get_layer_predictions(IDS, return_probs=True)
    monkeypatch.setattr(lens_rows, "CHUNK_VALUES", positions * families.VOCAB)
    parts, again = gpt2.run(IDS, 5, target=7, metrics=METRICS), gpt2.compare_to_input(IDS)
    assert (parts.top_ids == whole.top_ids).all()
    for name, table in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name], table, rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("input_token_rank", "input_token_prob", "kl_from_input"):
        np.testing.assert_allclose(again[name], kept[name], rtol=1e-4, atol=1e-5)
    for layer, found in gpt2.get_layer_predictions(IDS, return_probs=True)["layers"].items():
        torch.testing.assert_close(found["probs"], predictions["layers"][layer]["probs"])


@pytest.mark.parametrize(("device", "size"), [("cpu", 2), ("cuda", 8), ("mps", 8)])
def test_a_gpu_gets_larger_chunks(device, size):
    """Each call costs a GPU more than what it computes."""
    found = list(lens_rows.position_chunks(11, 2**23, torch.device(device)))
    assert found[0] == slice(0, size)
    assert [i for part in found for i in range(11)[part]] == list(range(11))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_rows_go_through_the_head_together(gpt2, rows, monkeypatch):
    monkeypatch.setattr(lens_rows, "GROUP_VALUES", LENGTH * families.VOCAB)
    whole = gpt2.run(IDS, 5, metrics=METRICS)
    heads = []
    handle = gpt2.model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    monkeypatch.setattr(lens_rows, "GROUP_VALUES", rows * LENGTH * families.VOCAB)
    together = gpt2.run(IDS, 5, metrics=METRICS)
    handle.remove()
    others = len(whole.row_labels) - 1
    assert len(heads) == 1 + -(-others // rows), "the final row, and the others in groups"
    assert (together.top_ids == whole.top_ids).all()
    for name, table in whole.metrics.items():
        np.testing.assert_allclose(
            together.metrics[name], table, rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_a_target_by_text_or_id(gpt2, tokenizer):
    token = tokenizer(" cat", add_special_tokens=False)["input_ids"]
    by_text, by_id = (gpt2.run(TEXT, 1, target=target) for target in (" cat", token[0]))
    assert len(token) == 1
    shares = own_logits(gpt2.model, list(by_text.token_ids)).softmax(-1)[:, token[0]]
    np.testing.assert_allclose(by_text.metrics["target_prob"][-1], shares, rtol=1e-4)
    for name in ("target_prob", "target_rank"):
        assert (by_text.metrics[name] == by_id.metrics[name]).all()


def test_layers_in_any_order_and_spelling(gpt2):
    some, all_layers = gpt2.run(IDS, 2, layer_indices=[2, "h.0", -3]), gpt2.run(IDS, 2)
    assert some.row_labels == ("2", "0")
    assert (some.top_logits[0] == all_layers.top_logits[3]).all()
    assert (some.metrics["kl_divergence"][1] == all_layers.metrics["kl_divergence"][1]).all()
    assert (some.metrics["kl_divergence"][0] == 0).all()


def test_layer_predictions_have_the_keys_and_axes_of_the_contract(gpt2, tokenizer):
    found = gpt2.get_layer_predictions(TEXT, [1, -1, 1], 4)
    ids = tokenizer(TEXT)["input_ids"]
    assert list(found) == ["input_text", "input_tokens", "input_ids", "final_logits", "layers"]
    assert found["input_text"] == TEXT
    assert found["input_ids"] == ids
    assert "".join(found["input_tokens"]) == TEXT
    assert torch.equal(found["final_logits"], own_logits(gpt2.model, ids))
    assert list(found["layers"]) == [1, 2]
    streams = block_outputs(gpt2.model, ids)
    for layer, table in found["layers"].items():
        assert list(table) == ["top_k_tokens", "top_k_probs", "top_k_indices"]
        shares = lens_by_hand("gpt2", gpt2.model, streams[layer + 1]).softmax(-1).topk(4)
        assert (table["top_k_indices"] == shares.indices.numpy()).all()
        np.testing.assert_allclose(table["top_k_probs"], shares.values, rtol=1e-4)
        for position, tokens in enumerate(table["top_k_tokens"]):
            best = table["top_k_indices"][position]
            assert tokens == gpt2.strings(best).tolist()


def test_layer_predictions_with_full_tables_on_request(gpt2):
    found = gpt2.get_layer_predictions(IDS, [0], return_logits=True, return_probs=True)["layers"][0]
    expected = lens_by_hand("gpt2", gpt2.model, block_outputs(gpt2.model)[1])
    torch.testing.assert_close(found["logits"], expected)
    torch.testing.assert_close(found["probs"], expected.softmax(-1))


def test_convergence_has_the_keys_and_axes_of_the_contract(gpt2):
    found = gpt2.get_convergence_metrics(IDS)
    own, streams = own_logits(gpt2.model), block_outputs(gpt2.model)
    for row, stream in enumerate(streams):
        logits = lens_by_hand("gpt2", gpt2.model, stream)
        best = own.argmax(-1)
        expected = {
            "kl_divergence": kl(own, logits),
            "top1_match": logits.argmax(-1) == best,
            "top1_rank": (logits > logits.gather(1, best[:, None])).sum(1),
            "top1_logit": logits.max(-1).values,
            "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        }
        for name, values in expected.items():
            assert found[name].shape == (len(streams), LENGTH)
            np.testing.assert_allclose(found[name][row], values, rtol=1e-3, atol=1e-4)
    assert found["row_labels"] == [EMBED, "0", "1", "2"]
    assert found["input_tokens"] == list(gpt2.run(IDS, 1).tokens)


def test_input_preservation_has_the_keys_and_axes_of_the_contract(gpt2):
    found = gpt2.compare_to_input(IDS)
    streams, ids = block_outputs(gpt2.model), torch.tensor(IDS)
    first = lens_by_hand("gpt2", gpt2.model, streams[0])
    for row, stream in enumerate(streams):
        logits = lens_by_hand("gpt2", gpt2.model, stream)
        own = logits.gather(1, ids[:, None])
        expected = {
            "input_token_rank": (logits > own).sum(1),
            "input_token_prob": logits.softmax(-1).gather(1, ids[:, None])[:, 0],
            "kl_from_input": kl(first, logits),
        }
        for name, values in expected.items():
            assert found[name].shape == (len(streams), LENGTH)
            np.testing.assert_allclose(found[name][row], values, rtol=1e-3, atol=1e-5)
    assert (found["kl_from_input"][0] == 0).all()
    assert set(found) == {*expected, "input_tokens", "row_labels"}


@pytest.mark.parametrize("apply_ln", [True, False])
def test_contract_tables_without_the_norm(gpt2, apply_ln):
    streams, own = block_outputs(gpt2.model), own_logits(gpt2.model)
    last = lens_by_hand("gpt2", gpt2.model, streams[-1], apply_ln)
    converged = gpt2.get_convergence_metrics(IDS, apply_ln=apply_ln)["kl_divergence"][-1]
    np.testing.assert_allclose(converged, kl(own, last), rtol=1e-3, atol=1e-4)
    kept = gpt2.compare_to_input(IDS, apply_ln=apply_ln)["kl_from_input"][-1]
    first = lens_by_hand("gpt2", gpt2.model, streams[0], apply_ln)
    np.testing.assert_allclose(kept, kl(first, last), rtol=1e-3, atol=1e-4)


# --- Texts, ids, chats ----------------------------------------------------------------------------


def test_ids_need_no_tokenizer():
    bare = LogitLens(families.build("gpt2"))
    result = bare.run(IDS, 2, target=4)
    assert result.tokens == tuple(f"<{token}>" for token in IDS)
    assert result.text == "".join(result.tokens)
    with pytest.raises(InputError, match="needs a tokenizer"):
        bare.run(IDS, 2, target=" cat")
    with pytest.raises(InputError, match="needs a tokenizer"):
        bare.run(TEXT)


def test_ids_as_a_tensor_and_one_token(gpt2):
    assert (gpt2.run(torch.tensor([IDS]), 1).top_ids == gpt2.run(IDS, 1).top_ids).all()
    one = gpt2.run([IDS[0]], 1)
    assert one.top_ids.shape == (4, 1, 1)
    assert np.isnan(one.metrics["cross_entropy"]).all()


def test_a_chat_is_read_through_its_template(gpt2):
    tokenizer = families.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    lens = LogitLens(gpt2.model, tokenizer=tokenizer)
    result = lens.run([{"role": "user", "content": "the cat"}], 1)
    assert result.text == "the cat."
    assert (result.top_ids == lens.run("the cat.", 1).top_ids).all()


def test_a_result_keeps_its_text_and_survives_a_file(gpt2, tmp_path):
    result = gpt2.run(TEXT, 3, target=" cat", metrics=METRICS)
    assert result.text == TEXT
    assert "".join(result.tokens) == TEXT
    result.save(tmp_path / "lens.safetensors")
    loaded = LensResult.load(tmp_path / "lens.safetensors")
    assert loaded.to_frame().equals(result.to_frame())


def test_printing_shows_the_last_layer(gpt2, capsys):
    gpt2.print_layer_predictions(TEXT, layer_step=2, max_tokens=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", EMBED, "0", "2"]
    assert lines[-1].endswith("0.000")


# --- Errors come before any work, and leave nothing behind ----------------------------------------

WRONG = {
    "metric": ({"metrics": ("kl", "entropy")}, InputError, "no metric 'kl'"),
    "top_k": ({"top_k": 100}, InputError, r"top_k must lie in 1\.\.99; came 100"),
    "top_k 0": ({"top_k": 0}, InputError, "came 0"),
    "site": ({"site": "resid"}, SiteError, "not 'resid'"),
    "head": ({"site": "head_out", "head": 4}, InputError, r"needs head=0\.\.3; came 4"),
    "no head": ({"site": "head_out"}, InputError, "came None"),
    "head elsewhere": ({"head": 1}, InputError, "goes with site='head_out'"),
    "layer": ({"layer_indices": [3]}, LayerError, "out of range"),
    "no layer": ({"layer_indices": []}, InputError, "layer_indices is empty"),
    "two tokens": ({"target": "cats"}, InputError, r"'cats' is \d tokens"),
    "spaced": ({"target": "cat"}, InputError, "' cat' is one token"),
    "no such id": ({"target": 99}, InputError, "outside the model's vocabulary"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_found_before_the_model_runs(gpt2, case, monkeypatch):
    arguments, error, message = WRONG[case]
    monkeypatch.setattr(logit_lens, "record", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        gpt2.run(TEXT, **arguments)
    assert hooks_of(gpt2.model) == []


@pytest.mark.parametrize("prompt", ["", [], [0] * (families.POSITIONS + 1), [99], 5])
def test_prompts_that_cannot_be_run(gpt2, prompt):
    for call in (gpt2.run, gpt2.get_layer_predictions, gpt2.compare_to_input):
        with pytest.raises(InputError):
            call(prompt)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ArchitectureError, match="the logit lens needs the language-model head"):
        LogitLens(families.build("gpt2").transformer)


def test_a_failure_in_the_middle_leaves_no_hook(gpt2, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt2.model.lm_head, "forward", interrupt)
    for apply_ln in (True, False):
        with pytest.raises(KeyboardInterrupt):
            gpt2.run(IDS, apply_ln=apply_ln)
    assert hooks_of(gpt2.model) == []
    assert "forward" not in gpt2.architecture.blocks[0].__dict__


def test_the_model_and_the_users_hooks_are_left_as_they_were(tokenizer):
    model = families.build("gpt2")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lens = LogitLens(model, tokenizer=tokenizer)
    lens.run(TEXT, apply_ln=False)
    lens.get_layer_predictions(TEXT)
    assert calls
    assert len(hooks_of(model)) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- Memory ---------------------------------------------------------------------------------------


def peak_bytes(n_layers, call):
    """The most bytes of full-vocabulary tensors that are alive at once."""
    model = families.build("gpt2", n_layer=n_layers)
    lens = LogitLens(model)
    lens.run(IDS, 1)
    alive, peaks = {}, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= LENGTH * families.VOCAB:
                    number = id(tensor)
                    alive[number] = tensor.untyped_storage().data_ptr(), tensor.nbytes
                    weakref.finalize(tensor, alive.pop, number, None)
            peaks.append(sum(dict(alive.values()).values()))
            return out

    gc.collect()
    with Watch():
        call(lens)
    return max(peaks)


CALLS = {
    "run": lambda lens: lens.run(IDS, 3, metrics=DEFAULT_METRICS),
    "every metric": lambda lens: lens.run(IDS, 3, metrics=METRICS),
    "component": lambda lens: lens.run(IDS, 3, site="head_out", head=0),
    "predictions": lambda lens: lens.get_layer_predictions(IDS),
    "input": lambda lens: lens.compare_to_input(IDS),
}


@pytest.mark.parametrize("name", CALLS)
def test_full_vocabulary_tensors_alive_do_not_grow_with_the_layers(name, monkeypatch):
    """Rows go through the head together, up to a budget: here it holds two rows."""
    monkeypatch.setattr(lens_rows, "GROUP_VALUES", 2 * LENGTH * families.VOCAB)
    few, many = (peak_bytes(layers, CALLS[name]) for layers in (6, 12))
    assert 0 < few == many
    assert many <= 11 * LENGTH * families.VOCAB * 4


# --- Tuned, and the bundled model -----------------------------------------------------------------


def tuned_for(lens, seed=0):
    """A tuned lens with translators drawn at random, not trained."""
    tuned = TunedLens(steps=0, context=2).fit(lens.architecture, None, [IDS])
    generator = torch.Generator().manual_seed(seed)
    tuned.weight_ = 0.2 * torch.randn(tuned.weight_.shape, generator=generator)
    tuned.bias_ = torch.randn(tuned.bias_.shape, generator=generator)
    return tuned


def test_a_tuned_lens_translates_every_row_but_the_last(gpt2):
    tuned = tuned_for(gpt2)
    lens = LogitLens(gpt2.model, tuned=tuned)
    result = lens.run(IDS, 99)
    streams = block_outputs(gpt2.model)
    for row, stream in enumerate(streams[:-1]):
        moved = stream + stream @ tuned.weight_[row].T + tuned.bias_[row]
        expected = lens_by_hand("gpt2", gpt2.model, moved).sort(descending=True).values
        np.testing.assert_allclose(result.top_logits[row], expected, rtol=1e-4, atol=1e-3)
    assert (result.metrics["kl_divergence"][-1] == 0).all()
    before = lens.run(IDS, 99, site="resid_pre")
    np.testing.assert_allclose(before.top_logits, result.top_logits[:-1], rtol=1e-4, atol=1e-4)
    predictions = lens.get_layer_predictions(IDS, top_k=99)["layers"]
    assert (predictions[0]["top_k_indices"] == result.top_ids[1]).all()
    assert repr(lens).startswith("LogitLens, tuned(")


@pytest.mark.parametrize("site", ["attn_out", "resid_mid", "head_out"])
def test_a_tuned_lens_reads_nothing_but_the_stream(gpt2, site):
    lens = LogitLens(gpt2.model, tuned=tuned_for(gpt2))
    with pytest.raises(SiteError, match="a tuned lens reads the stream between blocks"):
        lens.run(IDS, site=site)


def test_the_bundled_model_from_its_folder():
    model, tokenizer = load_model()
    lens = LogitLens(model.name_or_path)
    text = "The capital of France is"
    result = lens.run(text, 3)
    ids = tokenizer(text)["input_ids"]
    assert list(result.token_ids) == ids
    assert (result.top_ids[-1] == own_logits(model, ids).topk(3).indices.numpy()).all()
    assert result.decision_depth().max() < len(result.row_labels)
    assert len(result.to_text().splitlines()) == len(result.row_labels) + 1
