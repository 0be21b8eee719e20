"""Threads that share a model, and edits that run it again: nothing mixes, nothing stays behind."""

import threading

import pytest
import torch

import families
from activation_extraction import ActivationExtractor
from forward_pass import InputError, Site, edit, record, recording
from intervention import ActivationPatch, InterventionHandler
from logit_lens import LogitLens
from long_calls import CALLS, CLEAN, ROWS, same
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from model_lock import lock_of
from patch_oracle import assert_untouched, state_of
from test_interrupts import process_state

ROUNDS = 6
SECONDS = 120
FAMILIES = ("gpt2", "llama", "bloom")
"""By the ways to attention: the registry, the registry with grouped keys, and products by hand."""

WORK = (
    "extraction", "lens", "sweep", "pattern sweep", "steering", "paths", "ablation", "features",
    "attention patterns", "head summary", "recorded generation", "copying",
)  # fmt: skip


def in_threads(*works):
    """Run functions at the same time, each in a thread; what each gave."""
    start, found = threading.Barrier(len(works)), [None] * len(works)

    def run(number):
        try:
            start.wait(SECONDS)
            found[number] = works[number]()
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's own thread
            found[number] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "two threads wait for each other"
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


# --- Two analyzers on one model -------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_two_threads_on_one_model_do_not_mix(name):
    """Every kind of work beside every other, many times, each in a thread of its own."""
    model = families.build(name)
    expected = {work: CALLS[work](model) for work in WORK}
    before, process = state_of(model), process_state()

    def repeated(order):
        return lambda: [(work, CALLS[work](model)) for work in order]

    orders = [WORK, WORK[::-1], WORK[5:] + WORK[:5]]
    for found in in_threads(*(repeated(order * 2) for order in orders)):
        assert len(found) == 2 * len(WORK)
        for work, result in found:
            same(result, expected[work])
    assert_untouched(model, before)
    assert process_state()[:3] == process[:3]


def test_the_first_use_of_a_model_may_be_by_many_threads():
    """Each finds out for itself, or waits for, what the model is made of."""
    expected = CALLS["pattern sweep"](families.build("llama"))
    for _ in range(4):
        model = families.build("llama")
        for found in in_threads(*[lambda model=model: CALLS["pattern sweep"](model)] * 3):
            same(found, expected)


def test_analyzers_of_one_model_have_one_lock_and_others_another():
    model, other = families.build("gpt2"), families.build("gpt2")
    one, two = (ModelAnalyzer(model, tokenizer=families.tiny_tokenizer()) for _ in range(2))
    assert lock_of(one.model) is lock_of(two.model) is lock_of(model.transformer.h[1])
    assert lock_of(other) is not lock_of(model)


def test_a_context_keeps_other_threads_out_until_it_is_closed():
    model = families.build("gpt2")
    arch, clean = Architecture(model), CALLS["lens"](model)
    order, entered, waiting = [], threading.Event(), threading.Event()

    def zero():
        with edit(arch, {Site("resid_post", 0): torch.zeros_like}):
            entered.set()
            assert waiting.wait(SECONDS)
            order.append("edit open")
            with torch.no_grad():
                changed = model(torch.tensor([CLEAN])).logits
            order.append("edit closed")
        return changed

    def look():
        assert entered.wait(SECONDS)
        waiting.set()
        found = LogitLens(model).run(CLEAN, 2)
        order.append("lens")
        return [found.top_logits, found.top_ids.astype(float)]

    changed, found = in_threads(zero, look)
    assert order == ["edit open", "edit closed", "lens"]
    same(found, clean)
    with torch.no_grad():
        assert (changed - model(torch.tensor([CLEAN])).logits).abs().max() > 0.1


def test_handlers_of_two_threads_take_turns():
    model = families.build("llama")
    ids = torch.tensor([CLEAN])

    def patched(value):
        handler = InterventionHandler(model)
        handler.register_activation_patch(
            ActivationPatch(1, -1, torch.full((families.HIDDEN,), value))
        )
        with torch.no_grad(), handler:
            return model(ids).logits.clone()

    expected = [patched(value) for value in (0.0, 1.0)]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    many = [lambda value=value: [patched(value) for _ in range(ROUNDS)] for value in (0.0, 1.0)]
    for results, wanted in zip(in_threads(*many), expected, strict=True):
        for found in results:
            torch.testing.assert_close(found, wanted)


def test_two_models_run_at_the_same_time():
    """The hooks of one are no hooks of the other, and neither waits for the other."""
    models = families.build("gpt2"), families.build("llama")
    expected = [CALLS["pattern sweep"](model) for model in models]
    met = threading.Barrier(2)

    def work(model):
        with recording(Architecture(model), [Site("query", 0)]):
            met.wait(SECONDS)  # both hold their models' locks here
        return [CALLS["pattern sweep"](model) for _ in range(ROUNDS)]

    for results, wanted in zip(
        in_threads(*(lambda model=model: work(model) for model in models)), expected, strict=True
    ):
        for found in results:
            same(found, wanted)


def test_an_error_in_one_thread_lets_the_other_go_on():
    model = families.build("gpt2")
    arch, expected = Architecture(model), CALLS["sweep"](model)
    before = state_of(model)

    def fail():
        for _ in range(ROUNDS):
            with (
                pytest.raises(ZeroDivisionError),
                edit(arch, {Site("mlp_out", 1): lambda _: 1 / 0}),
            ):
                model(torch.tensor([CLEAN]))
        return "failed"

    assert in_threads(fail, lambda: [CALLS["sweep"](model) for _ in range(ROUNDS)])[0] == "failed"
    same(CALLS["sweep"](model), expected)
    assert_untouched(model, before)


def test_a_thread_that_calls_the_model_itself_sees_the_edits_of_others():
    """No lock is taken by ``model(...)``: this is said in the guide, and shown here."""
    model = families.build("gpt2")
    ids, inside, done = torch.tensor([CLEAN]), threading.Event(), threading.Event()
    with torch.no_grad():
        clean = model(ids).logits.clone()

    def hold():
        with edit(Architecture(model), {Site("resid_post", 1): torch.zeros_like}):
            inside.set()
            assert done.wait(SECONDS)

    def call():
        assert inside.wait(SECONDS)
        try:
            with torch.no_grad():
                return model(ids).logits.clone()
        finally:
            done.set()

    _, seen = in_threads(hold, call)
    assert (seen - clean).abs().max() > 0.1


# --- An edit that runs the model again ------------------------------------------------------------

IDS = torch.tensor([CLEAN])
AGAIN = {
    "the model": lambda m: m(IDS),
    "its body": lambda m: Architecture(m).body(IDS),
    "generate": lambda m: m.generate(IDS, max_new_tokens=2, pad_token_id=0),
    "record": lambda m: record(Architecture(m), {"input_ids": IDS}, [Site("resid_post", 0)]),
    "another edit": lambda m: edit(Architecture(m), {Site("mlp_out", 0): torch.clone}).__enter__(),
    "a recording": lambda m: recording(Architecture(m), [Site("mlp_out", 0)]).__enter__(),
    "an extraction": lambda m: ActivationExtractor(m).extract_activations(CLEAN),
    "a lens": lambda m: LogitLens(m).run(CLEAN, 2),
    "a sweep": CALLS["sweep"],
    "steering": CALLS["steering"],
    "probes": CALLS["probes"],
    "a head summary": CALLS["head summary"],
    "weights of heads": CALLS["copying"],
}


@pytest.mark.parametrize("site", ["resid_post", "query", "mlp_neurons"])
@pytest.mark.parametrize("again", AGAIN)
def test_an_edit_that_runs_its_own_model_is_refused(again, site):
    model = families.build("llama")
    before, process = state_of(model), process_state()
    calls = []

    def hook(value):
        calls.append(1)
        AGAIN[again](model)
        return value

    with torch.no_grad(), edit(Architecture(model), {Site(site, 1): hook}):
        with pytest.raises(
            InputError, match=r"an edit function ran the model .* run the model before"
        ):
            model(IDS)
        assert calls == [1]
    assert_untouched(model, before)
    assert process_state() == process
    CALLS["sweep"](model)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_patch_function_that_runs_its_own_model_is_refused(name):
    analyzer = ModelAnalyzer(families.build(name), tokenizer=families.tiny_tokenizer())
    before = state_of(analyzer.model)
    patch = ActivationPatch(1, -1, lambda value: analyzer.extract_activations([5]) and value)
    with pytest.raises(InputError, match="an edit function ran the model"):
        analyzer.generate_with_patching(CLEAN, [patch], max_new_tokens=2)
    assert_untouched(analyzer.model, before)


def test_an_edit_may_run_another_model():
    model, other = families.build("llama"), families.build("gpt2")
    other_arch, site = Architecture(other), Site("resid_post", 1)
    wanted = record(other_arch, {"input_ids": IDS}, [site])[site]
    both = {site: lambda value: value + record(other_arch, {"input_ids": IDS}, [site])[site]}
    with torch.no_grad(), edit(Architecture(model), both):
        found = model(IDS).logits
    with torch.no_grad(), edit(Architecture(model), {site: lambda value: value + wanted}):
        torch.testing.assert_close(found, model(IDS).logits)


def test_contexts_of_one_thread_may_be_nested():
    model = families.build("gpt2")
    arch, before = Architecture(model), state_of(model)
    site, halve = Site("resid_post", 1), {Site("resid_post", 0): lambda value: value / 2}
    with torch.no_grad(), edit(arch, halve), recording(arch, [site]) as kept:
        inner = ActivationExtractor(model).extract_activations(CLEAN, layer_indices=[1])
        model(IDS)
    torch.testing.assert_close(inner.layer_activations[1], kept[site])
    assert_untouched(model, before)
    plain = ActivationExtractor(model).extract_batch_activations(ROWS, show_progress=False)
    assert len(plain) == len(ROWS)
