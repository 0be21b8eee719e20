"""What the facade says of one position, against the model's own logits and the lens by hand."""

import numpy as np
import pytest
import torch

import families
import lens_reports
from activation_extraction import ActivationExtractor
from activation_record import ActivationRecord
from forward_pass import InputError, LayerError
from lens_reports import predict_last
from logit_lens import LogitLens
from model_analyzer import ModelAnalyzer
from record_files import FORMATS

TEXT = "the cat sat on the mat"
NEW = 8


@pytest.fixture(scope="module")
def analyzer():
    return ModelAnalyzer(families.build("gpt2"), tokenizer=families.tiny_tokenizer())


@pytest.fixture(scope="module")
def ids(analyzer):
    return analyzer.tokenize(TEXT)


def by_hand(model, ids, layer, position=-1, apply_ln=True):
    """Logits of the lens at one block and position, by a plain hook."""
    seen = []

    def keep(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0, position])

    handle = model.transformer.h[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]))
        handle.remove()
        norm = model.transformer.ln_f if apply_ln else torch.nn.Identity()
        return model.lm_head(norm(seen[0]))


def best(analyzer, logits, k):
    """The likeliest tokens and their probabilities, of which the smallest may be 0."""
    tokens = logits.topk(k).indices
    shares = logits.softmax(-1)[tokens]
    return [analyzer.get_tokens([token])[0] for token in tokens.tolist()], shares.tolist()


def refuse_to_run(monkeypatch):
    for name in ("record", "generate_ids"):
        monkeypatch.setattr(lens_reports, name, lambda *_, **__: pytest.fail("the model ran"))


# --- logit_lens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_ln", [True, False])
def test_logit_lens_has_the_best_tokens_of_the_last_position(analyzer, ids, apply_ln):
    found = analyzer.logit_lens(TEXT, top_k=4, apply_ln=apply_ln)
    assert list(found) == [0, 1, 2]
    for layer, pairs in found.items():
        tokens, shares = best(analyzer, by_hand(analyzer.model, ids, layer, -1, apply_ln), 4)
        assert [token for token, _ in pairs] == tokens
        assert [share for _, share in pairs] == pytest.approx(shares, rel=1e-4)
        assert all(isinstance(share, float) for _, share in pairs)


def test_logit_lens_of_some_layers_in_the_order_asked_for(analyzer):
    some, every = (
        analyzer.logit_lens(TEXT, ["h.2", 0, -1], top_k=2),
        analyzer.logit_lens(TEXT, top_k=2),
    )
    assert some == {layer: every[layer] for layer in (2, 0)}
    assert list(some) == [2, 0]


def test_the_last_layer_says_what_the_model_says(family):
    model = family[1]
    ids = families.token_ids(1, 6)[0].tolist()
    found = predict_last(LogitLens(model), ids, top_k=3)
    with torch.no_grad():
        shares, tokens = model(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(3)
    last = found[max(found)]
    assert [token for token, _ in last] == [f"<{token}>" for token in tokens.tolist()]
    assert [share for _, share in last] == pytest.approx(shares.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"top_k": 100}, InputError),
        ({"layer_indices": [3]}, LayerError),
        ({"layer_indices": []}, InputError),
    ],
)
def test_logit_lens_refuses_before_the_model_runs(analyzer, arguments, error, monkeypatch):
    refuse_to_run(monkeypatch)
    with pytest.raises(error):
        analyzer.logit_lens(TEXT, **arguments)


@pytest.mark.parametrize(("step", "shown"), [(1, [0, 1, 2]), (2, [0, 2]), (5, [0, 2])])
def test_print_logit_lens_always_shows_the_last_layer(analyzer, capsys, step, shown):
    analyzer.print_logit_lens(TEXT, layer_step=step, top_k=2)
    title, *lines = capsys.readouterr().out.splitlines()
    assert TEXT in title
    assert [int(line.split()[1]) for line in lines] == shown
    token, share = analyzer.logit_lens(TEXT, top_k=2)[2][0]
    assert f"{token!r} {share:.3f}" in lines[-1]


def test_print_logit_lens_refuses_a_step_of_zero_before_the_model_runs(analyzer, monkeypatch):
    refuse_to_run(monkeypatch)
    with pytest.raises(InputError, match="layer_step must be at least 1"):
        analyzer.print_logit_lens(TEXT, layer_step=0)


# --- logit_lens_on_activation ---------------------------------------------------------------------


@pytest.mark.parametrize(("position", "absolute"), [(-1, -1), (0, 0), (2, 2), (-3, -3)])
def test_a_record_is_read_like_the_text(analyzer, ids, position, absolute):
    record = analyzer.extract_activations(TEXT, metadata={"mine": 1})
    found = analyzer.logit_lens_on_activation(record, top_k=3, token_position=position)
    for layer, table in found["layers"].items():
        logits = by_hand(analyzer.model, ids, layer, absolute)
        tokens, shares = best(analyzer, logits, 3)
        assert list(table) == ["top_k_tokens", "top_k_probs", "logits"]
        torch.testing.assert_close(table["logits"], logits)
        assert table["top_k_tokens"] == tokens
        assert table["top_k_probs"] == pytest.approx(shares, rel=1e-4)
    metadata = found["metadata"]
    assert metadata["mine"] == 1
    assert metadata["prompt"] == TEXT
    assert metadata["token_position"] == range(len(ids))[absolute]
    assert metadata["token"] == record.tokens[absolute]


def test_tokens_of_vanishing_probability_keep_their_order(analyzer):
    """Without the norm the logits may be so large that all but one probability is 0."""
    record = analyzer.extract_activations(TEXT)
    record.layer_activations[1] *= 1000
    table = analyzer.logit_lens_on_activation(record, [1], 9, apply_ln=False)["layers"][1]
    assert table["top_k_probs"][2:] == [0.0] * 7
    assert table["top_k_tokens"] == best(analyzer, table["logits"], 9)[0]


def test_every_position_of_a_record(analyzer, ids):
    record = analyzer.extract_activations(TEXT, positions=[3, 1])
    found = analyzer.logit_lens_on_activation(record, [1], 2, token_position=None)
    table = found["layers"][1]
    assert found["metadata"]["token_position"] == [3, 1]
    for row, position in enumerate([3, 1]):
        logits = by_hand(analyzer.model, ids, 1, position)
        torch.testing.assert_close(table["logits"][row], logits)
        assert table["top_k_tokens"][row] == best(analyzer, logits, 2)[0]


def test_a_record_of_some_layers_and_positions(analyzer, ids):
    record = analyzer.extract_activations(TEXT, layer_indices=[0, 2], positions="last")
    found = analyzer.logit_lens_on_activation(record, apply_ln=False)
    assert list(found["layers"]) == [0, 2]
    torch.testing.assert_close(
        found["layers"][2]["logits"], by_hand(analyzer.model, ids, 2, apply_ln=False)
    )
    with pytest.raises(InputError, match=r"token_position=0 is not in this record of \d+ tokens"):
        analyzer.logit_lens_on_activation(record, token_position=0)
    with pytest.raises(LayerError, match="was not recorded"):
        analyzer.logit_lens_on_activation(record, [1])


def test_a_record_made_while_generating(analyzer):
    _, record = analyzer.generate(TEXT, max_new_tokens=NEW, return_activations=True)
    found = analyzer.logit_lens_on_activation(record, token_position=-2)
    best_token = int(found["layers"][2]["logits"].argmax())
    assert best_token == record.token_ids[-1]  # greedy: what was predicted is what came


def test_records_of_a_batch(analyzer):
    prompts = ["the cat", TEXT, "on"]
    records = analyzer.extract_batch_activations(prompts, show_progress=False)
    for prompt, record in zip(prompts, records, strict=True):
        found = analyzer.logit_lens_on_activation(record)["layers"][1]["logits"]
        expected = by_hand(analyzer.model, analyzer.tokenize(prompt), 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_record_from_a_file(analyzer, tmp_path, format):
    record = analyzer.extract_activations(TEXT)
    analyzer.save_activations(record, tmp_path / "record", format)
    loaded = analyzer.load_activations(tmp_path / "record")
    if format == "json":
        with pytest.raises(InputError, match="have no values"):
            analyzer.logit_lens_on_activation(loaded)
        return
    before, after = (analyzer.logit_lens_on_activation(r)["layers"] for r in (record, loaded))
    assert all(torch.equal(before[i]["logits"], after[i]["logits"]) for i in range(3))


def test_a_record_of_the_model_without_its_head(analyzer):
    base = ActivationExtractor(analyzer.model.transformer, analyzer.tokenizer)
    with_head, without = (e.extract_activations(TEXT) for e in (analyzer, base))
    found = [
        analyzer.logit_lens_on_activation(r)["layers"][1]["logits"] for r in (with_head, without)
    ]
    assert torch.equal(*found)


def test_records_that_cannot_be_read(analyzer):
    other = ActivationExtractor(families.build("gpt2", n_embd=64))
    with pytest.raises(InputError, match=r"a hidden state is \[\.\.\., 32\]"):
        analyzer.logit_lens_on_activation(other.extract_activations([1, 2, 3]))
    with pytest.raises(InputError, match="holds no layer's output"):
        analyzer.logit_lens_on_activation(ActivationRecord("a", ["a"], [5], {}))
    record = analyzer.extract_activations(TEXT)
    with pytest.raises(InputError, match="top_k must lie"):
        analyzer.logit_lens_on_activation(record, top_k=1000)
    with pytest.raises(InputError, match="token_position=99"):
        analyzer.logit_lens_on_activation(record, token_position=99)


# --- analyze_generation_token ---------------------------------------------------------------------


def continuation(analyzer, prompt=TEXT):
    """Ids of prompt and greedy continuation, by Hugging Face."""
    ids = analyzer.tokenize(prompt)
    with torch.no_grad():
        out = analyzer.model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    return out[0].tolist(), len(ids)


def check_analysis(analyzer, found, ids, position):
    """Each layer is read where the token was predicted: at the position before it."""
    assert found["token_position"] == position
    assert found["target_token"] == found["all_tokens"][position]
    assert found["all_tokens"] == analyzer.get_tokens(ids)
    assert found["generated_text"] == analyzer.decode(ids)
    for layer, table in found["analysis"].items():
        logits = by_hand(analyzer.model, ids[:position], layer)
        tokens, shares = best(analyzer, logits, len(table["top_k_tokens"]))
        assert table["top_k_tokens"] == tokens
        assert table["top_k_probs"] == pytest.approx(shares, rel=1e-3)
        target = logits[ids[position]]
        assert table["target_rank"] == int((logits > target).sum())
        share = float(logits.softmax(-1)[ids[position]])
        assert table["target_prob"] == pytest.approx(share, rel=1e-3)


def test_the_first_generated_token_is_meant_by_default(analyzer):
    ids, start = continuation(analyzer)
    found = analyzer.analyze_generation_token(TEXT, max_new_tokens=NEW, top_k=3)
    assert list(found["analysis"]) == [0, 1, 2]
    assert found["analysis"][2]["target_rank"] == 0  # greedy
    check_analysis(analyzer, found, ids, start)


@pytest.mark.parametrize("offset", [0, 3, NEW - 1])
def test_a_token_by_position(analyzer, offset):
    ids, start = continuation(analyzer)
    ask = analyzer.analyze_generation_token
    found = ask(TEXT, token_position=start + offset, max_new_tokens=NEW, layer_step=2)
    assert list(found["analysis"]) == [0, 2]
    check_analysis(analyzer, found, ids, start + offset)
    same = ask(TEXT, token_position=offset - NEW, max_new_tokens=NEW, layer_step=2)
    assert same == found


def planted(monkeypatch, analyzer, words):
    """Make generation continue the prompt with given tokens."""
    ids = [*analyzer.tokenize(TEXT), *analyzer.tokenize(words)]
    monkeypatch.setattr(lens_reports, "generate_ids", lambda *_, **__: list(ids))
    return ids, len(analyzer.tokenize(TEXT))


def test_a_repeated_token_means_its_first_occurrence_in_the_continuation(analyzer, monkeypatch):
    """It occurs in the prompt too, which does not count."""
    ids, start = planted(monkeypatch, analyzer, " and the cat sat on the cat")
    cat = analyzer.tokenize(" cat")
    assert ids.count(cat[0]) == 3
    assert cat[0] in ids[:start]
    for target in (" cat", cat[0]):
        found = analyzer.analyze_generation_token(TEXT, target, max_new_tokens=NEW)
        check_analysis(analyzer, found, ids, start + 2)
    last = analyzer.analyze_generation_token(TEXT, " cat", token_position=-1)
    check_analysis(analyzer, last, ids, len(ids) - 1)


def test_a_target_may_lack_its_leading_space(analyzer, monkeypatch):
    ids, start = planted(monkeypatch, analyzer, " and a cat")
    found = analyzer.analyze_generation_token(TEXT, "cat")
    assert found["target_token"] == " cat"
    exact = analyzer.analyze_generation_token(TEXT, " a")
    check_analysis(analyzer, exact, ids, start + 1)


def test_a_target_as_written_goes_before_one_with_a_space(analyzer, monkeypatch):
    ids, start = planted(monkeypatch, analyzer, " a cat on a")
    a = analyzer.tokenize("a")
    monkeypatch.setattr(lens_reports, "generate_ids", lambda *_, **__: [*ids, *a])
    found = analyzer.analyze_generation_token(TEXT, "a")
    assert found["token_position"] == len(ids)
    assert found["target_token"] == "a"
    assert analyzer.analyze_generation_token(TEXT, " a")["token_position"] == start


def test_targets_and_positions_that_do_not_fit(analyzer, monkeypatch):
    planted(monkeypatch, analyzer, " and a cat")
    ask = analyzer.analyze_generation_token
    with pytest.raises(InputError, match=r"' sat' does not occur in the continuation \[' and', "):
        ask(TEXT, " sat")
    with pytest.raises(InputError, match=r"the token at position \d+ is ' cat', not ' a'"):
        ask(TEXT, " a", token_position=-1)
    for position in (0, 100, -100):
        with pytest.raises(InputError, match=f"token_position={position} is out of range"):
            ask(TEXT, token_position=position)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_token": " cats"}, r"' cats' is 2 tokens"),
        ({"target_token": 99}, "outside the model's vocabulary"),
        ({"top_k": 0}, "top_k must lie"),
        ({"layer_step": 0}, "layer_step must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_generated(analyzer, arguments, message, monkeypatch):
    refuse_to_run(monkeypatch)
    with pytest.raises(InputError, match=message):
        analyzer.analyze_generation_token(TEXT, **arguments)


def test_sampling_options_are_passed_on(analyzer):
    ask = analyzer.analyze_generation_token
    first, again = (ask(TEXT, max_new_tokens=4, temperature=20.0, seed=3) for _ in range(2))
    assert first["all_tokens"] == again["all_tokens"]
    seeds = {
        tuple(ask(TEXT, max_new_tokens=4, temperature=20.0, seed=s)["all_tokens"]) for s in range(4)
    }
    assert len(seeds) > 1


def test_the_bundled_model_answers_every_call(capsys):
    analyzer = ModelAnalyzer(device="cpu")
    text = "The capital of France is"
    found = analyzer.logit_lens(text, top_k=3)
    assert len(found) == analyzer.get_num_layers()
    with torch.no_grad():
        logits = analyzer.model(torch.tensor([analyzer.tokenize(text)])).logits[0, -1]
    assert found[len(found) - 1][0][0] == analyzer.get_tokens([int(logits.argmax())])[0]
    record = analyzer.extract_activations(text)
    last = analyzer.logit_lens_on_activation(record)["layers"][len(found) - 1]
    np.testing.assert_allclose(last["logits"], logits, rtol=1e-4, atol=1e-4)
    answer = analyzer.analyze_generation_token(text, max_new_tokens=2)
    assert answer["target_token"] == found[len(found) - 1][0][0]
    analyzer.print_logit_lens(text, layer_step=5)
    assert f"layer {len(found) - 1}" in capsys.readouterr().out
