"""Many edited runs in few passes, each against one hooked forward pass of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edited_runs
import families
from base_run import logits_at, run_base
from edited_runs import Run, Work, _starts, abilities, default_tokens, run_edited
from forward_pass import READ_ONLY, ArchitectureError, InputError, Site
from growing_pass import Edit, put_edit
from intervention_handler import ActivationPatch, InterventionHandler
from memory_limits import NotEnoughMemoryError, SmallerBatchWarning
from model_architecture import Architecture
from patch_oracle import (
    assert_untouched,
    by_token,
    hooked_logits,
    hooks_on,
    put,
    state_of,
)

IDS = torch.tensor([[7, 11, 15, 6, 49, 10, 13, 12], [30, 11, 15, 8, 49, 21, 13, 40]])
LENGTH = IDS.shape[1]
READ = (-1, 5)
NEVER = 1e12
"""A cost of calling a block at which no group of runs of its own pays, so that all start at 0."""


def all_sites(architecture):
    return [
        Site(name, layer)
        for layer in range(architecture.n_layers)
        for name in architecture.available_sites(layer)
        if name not in ("embed", *READ_ONLY)
    ]


def base_of(architecture, ids=IDS, read=READ, sites=()):
    return run_base(architecture, ids, sites, read, cached=abilities(architecture).suffix)


def keep_logits(_numbers, logits):
    return logits


def close(found, expected):
    """Equal up to rounding: logits of these models go up to 70, so 1e-5 of their scale."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(scale, 50))


@pytest.fixture(params=[0.0, NEVER], ids=["suffixes", "whole"])
def overhead(request, monkeypatch):
    monkeypatch.setattr(edited_runs, "_overhead", lambda _architecture: request.param)
    return request.param


# --- Against one hooked pass per run --------------------------------------------------------------


def make_runs(base, sites):
    """Return runs that put another prompt's activation somewhere, and their hooked passes."""
    runs, changes = [], []
    for number, site in enumerate(sites):
        value = by_token(base.sites[site], site)
        for row, position in ((0, 2), (1, LENGTH - 1), (number % 2, None)):
            there = value[1 - row]
            if position is None:
                edit = Edit(site, there[2:], torch.arange(2, LENGTH))
                change = put(there)
            else:
                edit = Edit(site, there[position], position)
                change = put(there[position], position)
            runs.append(Run((edit,), row))
            changes.append((site, change if position is not None else from_two(there)))
    return runs, changes


def from_two(there):
    def change(shown):
        new = shown.clone()
        new[0, 2:] = there[2:]
        return new

    return change


def overhead_of(name, monkeypatch):
    """Let suffixes pay for every other family."""
    chosen = 0.0 if list(families.FAMILIES).index(name) % 2 else NEVER
    monkeypatch.setattr(edited_runs, "_overhead", lambda _architecture: chosen)
    return chosen


def test_every_site_of_every_layer_of_every_family(family, monkeypatch):
    """Two prompts in one base, all runs at once; a hooked pass for every other one of them."""
    name, model = family
    overhead = overhead_of(name, monkeypatch)
    check_every_site(model, overhead)


@pytest.mark.slow
def test_every_site_of_every_layer_of_every_family_both_ways(family, overhead):
    _, model = family
    check_every_site(model, overhead)


def check_every_site(model, overhead):
    architecture = Architecture(model)
    sites = all_sites(architecture)
    base = base_of(architecture, sites=sites)
    runs, changes = make_runs(base, sites)
    work = Work()
    found = run_edited(architecture, base, runs, keep_logits, work=work)
    assert found.shape == (len(runs), 2, families.VOCAB)
    offset = 0 if overhead else 1
    for number in range(offset, len(runs), 2):
        expected = hooked_logits(model, IDS[runs[number].base], [changes[number]])
        close(found[number], expected[0, [5, LENGTH - 1]])
    able = abilities(architecture)
    assert work.passes < len(runs) / 4
    if able.suffix and not overhead:
        assert work.done == work.needed
    else:
        assert work.done > work.needed


def test_heads_and_neurons(family, monkeypatch):
    """In the other turn than above: suffixes where that has whole passes."""
    name, model = family
    chosen = NEVER - overhead_of(name, monkeypatch)
    monkeypatch.setattr(edited_runs, "_overhead", lambda _architecture: chosen)
    architecture = Architecture(model)
    sites = all_sites(architecture)
    base = base_of(architecture, IDS, (-1,), sites)
    runs, changes = [], []
    for site in sites:
        value = by_token(base.sites[site], site)[1]
        place = 3 + site.layer
        if value.dim() == 3:
            head = (site.layer + 1) % value.shape[1]
            runs.append(Run((Edit(site, value[place, head], place, head),)))
            changes.append((site, put(value[place], place, head)))
        if site.name != "attn_pattern":
            neuron = value.shape[-1] - 1 - site.layer
            edit = Edit(
                site, value[[place, 7]][..., neuron], torch.tensor([place, 7]), None, neuron
            )
            runs.append(Run((edit,)))
            changes.append((site, two_neurons(value, place, neuron)))
    found = run_edited(architecture, base, runs, keep_logits)
    for number, change in enumerate(changes):
        close(found[number, 0], hooked_logits(model, IDS[0], [change])[0, -1])


def two_neurons(value, place, neuron):
    def change(shown):
        new = shown.clone()
        new[0, [place, 7], ..., neuron] = value[[place, 7]][..., neuron]
        return new

    return change


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gptj", "gemma2", "mamba"])
def test_several_edits_in_one_run(name, overhead):
    """Later ones see what earlier ones made; also at the site where the run joins."""
    model = families.build(name)
    architecture = Architecture(model)
    base = base_of(architecture, read=(-1,), sites=all_sites(architecture))

    def edit(site, layer, position):
        place = Site(site, layer)
        value = by_token(base.sites[place], place)[1]
        return Edit(place, value[position], position), (place, put(value[position], position))

    n = architecture.n_layers
    sets = [
        [edit("resid_post", 0, 2), edit("attn_out", 1, 5)],
        [edit("attn_out", 1, 5), edit("resid_post", 0, 2)],
        [edit("resid_pre", 1, 3), edit("resid_pre", 2, 3), edit("resid_post", n - 1, 7)],
        [edit("resid_pre", 1, 3), edit("resid_pre", 1, 6)],
        [edit("resid_post", n - 1, 7)],
        [edit("resid_post", 1, 4), edit("resid_pre", 2, 4), edit("attn_out", 2, 4)],
        [],
    ]
    runs = [Run(tuple(each for each, _ in edits)) for edits in sets]
    found = run_edited(architecture, base, runs, keep_logits)
    for number, edits in enumerate(sets):
        expected = hooked_logits(model, IDS[0], [change for _, change in edits])
        close(found[number, 0], expected[0, -1])


def test_in_float64_the_numbers_are_those_of_hooked_passes_to_the_last_digits(overhead):
    """Models whose norms compute in double: what remains is rounding, not a method."""
    for name in ("gpt2", "gpt_neox", "opt", "falcon"):
        model = families.build(name).double()
        architecture = Architecture(model)
        sites = [site for site in all_sites(architecture) if site.name != "attn_pattern"]
        base = base_of(architecture, sites=sites)
        runs, changes = make_runs(base, sites)
        found = run_edited(architecture, base, runs, keep_logits)
        for number in range(0, len(runs), 5):
            expected = hooked_logits(model, IDS[runs[number].base], [changes[number]])
            torch.testing.assert_close(
                found[number], expected[0, [5, LENGTH - 1]], rtol=0, atol=1e-11
            )


@pytest.mark.parametrize("max_tokens", [1, 8, 20, 50])
def test_small_batches_give_the_same(max_tokens, overhead):
    for name in ("gpt2", "bloom"):
        architecture = Architecture(families.build(name))
        sites = [Site("mlp_out", layer) for layer in range(3)] + [Site("resid_pre", 1)]
        base = base_of(architecture, sites=sites)
        runs, _ = make_runs(base, sites)
        seen = []
        found = run_edited(
            architecture, base, runs[::-1], keep_logits, max_tokens=max_tokens, progress=seen.append
        )
        close(found.flip(0), run_edited(architecture, base, runs, keep_logits))
        assert sum(seen) == len(runs)
        assert max(seen) <= max(1, max_tokens)


def test_reduce_sees_which_runs_it_is_given(overhead):
    architecture = Architecture(families.build("gpt2"))
    site = Site("resid_pre", 1)
    base = base_of(architecture, read=(-1,), sites=[site])
    runs = [Run((Edit(site, base.sites[site][1, p], p),)) for p in (6, 1, 4, 7, 2)]
    whole = run_edited(architecture, base, runs, keep_logits)

    def reduce(numbers, logits):
        close(logits, whole[numbers])
        return numbers

    assert run_edited(architecture, base, runs, reduce, max_tokens=16).tolist() == [0, 1, 2, 3, 4]


def test_positions_read_before_the_edit_are_those_of_the_base(overhead):
    model = families.build("llama")
    architecture = Architecture(model)
    site = Site("resid_pre", 1)
    base = run_base(architecture, IDS, [site], range(LENGTH), cached=True)
    assert base.read == tuple(range(LENGTH))
    runs = [
        Run((Edit(site, base.sites[site][1 - row, p], p),), row) for row in (0, 1) for p in (2, 6)
    ]
    found = run_edited(architecture, base, runs, keep_logits)
    for number, (row, p) in enumerate((row, p) for row in (0, 1) for p in (2, 6)):
        change = put(base.sites[site][1 - row, p], p)
        close(found[number], hooked_logits(model, IDS[row], [(site, change)])[0])
    early = run_base(architecture, IDS, [site], (0, 3), cached=True)
    late = run_edited(architecture, early, runs[1:2], keep_logits)
    close(late[0], base.logits[0, [0, 3]])


def test_a_prompt_of_one_token(overhead):
    model = families.build("llama")
    architecture = Architecture(model)
    sites = [Site("resid_post", layer) for layer in range(3)]
    base = base_of(architecture, torch.tensor([[7], [9]]), (-1,), sites)
    runs = [Run((Edit(site, base.sites[site][1, 0], 0),)) for site in sites]
    found = run_edited(architecture, base, runs, keep_logits)
    for number, site in enumerate(sites):
        change = put(base.sites[site][1, 0], 0)
        close(found[number], hooked_logits(model, [7], [(site, change)])[0])


# --- The user's own hooks, and what is left behind ------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_hooks_of_the_users_own_act_once(name, overhead):
    """A hook on a block's input is in the recorded stream already when a run joins there."""
    model = families.build(name)
    architecture = Architecture(model)
    push = torch.randn(families.HIDDEN, generator=torch.Generator().manual_seed(1))
    blocks = architecture.blocks
    assert architecture.structure  # a model is understood as it is, before it is hooked
    handles = [
        blocks[1].register_forward_pre_hook(
            lambda _m, args, kwargs: ((args[0] * 1.5 + push, *args[1:]), kwargs), with_kwargs=True
        ),
        blocks[2].register_forward_hook(
            lambda _m, _a, out: (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push
        ),
    ]
    before = hooks_on(model)
    sites = [
        Site(name, layer) for name in ("resid_pre", "attn_out", "resid_post") for layer in range(3)
    ]
    base = base_of(architecture, read=(-1,), sites=sites)
    runs, changes = make_runs(base, sites)
    found = run_edited(architecture, base, runs, keep_logits)
    for number, change in enumerate(changes):
        expected = hooked_logits(model, IDS[runs[number].base], [change])
        close(found[number, 0], expected[0, -1])
    assert hooks_on(model) == before
    for handle in handles:
        handle.remove()


def test_nothing_is_changed(family):
    _, model = family
    architecture = Architecture(model)
    abilities(architecture)
    before = state_of(model)
    sites = all_sites(architecture)
    base = base_of(architecture, sites=sites)
    copies = [stream.clone() for stream in base.streams]
    held = [tuple(each.clone() for each in layer) for layer in base.cache if layer is not None]
    runs, _ = make_runs(base, sites)
    run_edited(architecture, base, runs, keep_logits)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(_numbers, _logits, error=error):
            raise error("on purpose")

        with pytest.raises(error, match="on purpose"):
            run_edited(architecture, base, runs, fail)
    with pytest.raises((RuntimeError, IndexError)):
        run_edited(architecture, base, [Run((Edit(sites[-1], torch.zeros(3), 2),))], keep_logits)
    assert_untouched(model, before)
    assert all(map(torch.equal, base.streams, copies))
    now = [layer for layer in base.cache if layer is not None]
    assert all(
        torch.equal(a, b) for x, y in zip(now, held, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_dropout_is_off_and_back_on():
    model = families.build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    architecture = Architecture(model)
    site = Site("mlp_out", 1)
    base = base_of(architecture, read=(-1,), sites=[site])
    run = Run((Edit(site, base.sites[site][1, 3], 3),))
    expected = run_edited(architecture, base, [run], keep_logits)
    model.train()
    trained = base_of(architecture, read=(-1,), sites=[site])
    assert torch.equal(trained.logits, base.logits)
    assert torch.equal(run_edited(architecture, trained, [run], keep_logits), expected)
    assert all(module.training for module in model.modules())


def test_too_little_memory_splits_a_batch(monkeypatch):
    architecture = Architecture(families.build("gpt2"))
    site = Site("resid_pre", 1)
    base = base_of(architecture, read=(-1,), sites=[site])
    runs = [Run((Edit(site, base.sites[site][1, p], p),)) for p in range(LENGTH)]
    expected = run_edited(architecture, base, runs, keep_logits)
    real, sizes = edited_runs.resume_growing, []

    def small(arch, base, joining, hooks, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return real(arch, base, joining, hooks, prompts, *rest)

    monkeypatch.setattr(edited_runs, "resume_growing", small)
    with pytest.warns(
        SmallerBatchWarning, match=r"edited runs at a time do not fit .*going on with"
    ):
        found = run_edited(architecture, base, runs, keep_logits)
    close(found, expected)
    assert max(sizes) > 2
    assert sum(size > 2 for size in sizes) <= 3, "later batches are made small at once"

    def never(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(edited_runs, "resume_growing", never)
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(NotEnoughMemoryError, match=r"one of the edited runs alone .*need about"),
    ):
        run_edited(architecture, base, runs, keep_logits)


def test_refused():
    model = families.build("gpt2")
    architecture = Architecture(model)
    base = base_of(architecture)
    with pytest.raises(InputError, match="nothing to run"):
        run_edited(architecture, base, [], keep_logits)
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        abilities(Architecture(model.transformer))


# --- What a model allows --------------------------------------------------------------------------


def test_abilities(family):
    """Every family is causal; a state space has no keys to hand out; ALiBi wants a row per run."""
    name, model = family
    able = abilities(Architecture(model))
    assert able.causal
    assert able.suffix == (name != "mamba")
    assert able.grows == (name != "bloom")


def test_a_model_that_looks_ahead_is_not_cut(monkeypatch):
    """Bidirectional attention: earlier positions change too, so no suffix may be run."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = families.build("llama")
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def both_ways(module, query, key, value, mask, **kwargs):
        return real(module, query, key, value, None, **{**kwargs, "is_causal": False})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", both_ways)
    architecture = Architecture(model)
    able = abilities(architecture)
    assert (able.causal, able.suffix) == (False, False)
    monkeypatch.setattr(edited_runs, "_overhead", lambda _architecture: 0.0)
    site = Site("resid_pre", 1)
    base = run_base(architecture, IDS, [site], READ, cached=False)
    value = base.sites[site][1, 4]
    (found,) = run_edited(architecture, base, [Run((Edit(site, value, 4),))], keep_logits)
    expected = hooked_logits(model, IDS[0], [(site, put(value, 4))])[0, [5, 7]]
    close(found, expected)


def test_abilities_are_found_anew_when_a_module_is_replaced(monkeypatch):
    model = families.build("gpt2")
    architecture = Architecture(model)
    calls = []
    real = edited_runs._try_abilities
    monkeypatch.setattr(edited_runs, "_try_abilities", lambda a: calls.append(1) or real(a))
    abilities(architecture)
    abilities(Architecture(model))
    assert calls == [1]
    model.transformer.h[1].mlp.act = torch.nn.ReLU()
    abilities(architecture)
    assert calls == [1, 1]


# --- The base run ---------------------------------------------------------------------------------


def test_a_base_run_holds_what_the_model_computes(family):
    _, model = family
    architecture = Architecture(model)
    n = architecture.n_layers
    base = base_of(architecture, read=(2, -1))
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert (base.read, base.length, base.count) == ((2, LENGTH - 1), LENGTH, 2)
    close(base.logits, logits[:, [2, -1]])
    assert len(base.streams) == n + 1
    states = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: states.append(out)) for b in architecture.blocks
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(n):
        state = states[layer][0] if isinstance(states[layer], tuple) else states[layer]
        torch.testing.assert_close(base.streams[layer + 1], state, rtol=0, atol=1e-5)
    assert not any(stream.requires_grad for stream in base.streams)


def test_edits_that_belong_to_the_base(overhead):
    model = families.build("llama")
    architecture = Architecture(model)
    corrupt = (Site("resid_pre", 0), lambda h: h + 0.5)
    site = Site("mlp_out", 1)
    base = run_base(architecture, IDS[:1], [site], cached=True, edits=[corrupt])
    expected = hooked_logits(model, IDS[0], [corrupt])[0, -1]
    close(base.logits[0, 0], expected)
    value = torch.zeros(families.HIDDEN)
    (found,) = run_edited(architecture, base, [Run((Edit(site, value, 4),))], keep_logits)
    close(found[0], hooked_logits(model, IDS[0], [corrupt, (site, put(value, 4))])[0, -1])


def test_logits_at():
    logits = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(logits_at(logits, [1, 3]), logits[:, [1, 3]])
    assert torch.equal(logits_at(logits, [5, 6], 4), logits[:, [1, 2]])
    assert torch.equal(logits_at(logits[:, :2], [1, 3]), logits[:, :2])


# --- Small parts ----------------------------------------------------------------------------------


@given(
    st.integers(2, 3),
    st.none() | st.integers(3, 6) | st.lists(st.integers(3, 6), min_size=1, unique=True),
    st.none() | st.integers(0, 1),
    st.none() | st.integers(0, 4),
    st.integers(0, 3),
)
def test_put_edit_writes_there_and_nowhere_else(dims, position, head, neuron, offset):
    """By NumPy-like indexing of every entry on its own."""
    head = None if dims == 2 else head
    shape = (2, 7 - offset, 2, 5) if dims == 3 else (2, 7 - offset, 5)
    batch = torch.zeros(shape)
    places = list(range(7 - offset)) if position is None else position
    places = [places] if isinstance(places, int) else sorted(places)
    local = places if position is None else [place - offset for place in places]
    given_ = torch.tensor(places) if isinstance(position, list) else position
    part = torch.ones(shape)[1][local]
    if head is not None:
        part = part[:, head]
    if neuron is not None:
        part = part[..., neuron]
    value = part * torch.arange(1.0, 1 + part.numel()).view(part.shape)
    value = value[0] if isinstance(position, int) else value
    put_edit(batch, 1, Edit(Site("key", 0), value, given_, head, neuron), offset)
    expected, count = torch.zeros(shape), 1.0
    for place in local:
        for h in range(2) if dims == 3 else [None]:
            for i in range(5):
                if head not in (None, h) or neuron not in (None, i):
                    continue
                expected[(1, place, i) if h is None else (1, place, h, i)] = count
                count += 1
    assert torch.equal(batch, expected)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from([0.0, 3.0, 40.0, 1e9]),
)
def test_starts_cost_the_least(runs, overhead):
    """Against every way to choose starts out of the positions at which runs begin."""
    length, n_layers = 10, 4
    planned = [
        edited_runs._Planned(i, Run(()), layer, start) for i, (start, layer) in enumerate(runs)
    ]

    def cost(starts):
        work = sum(
            (n_layers - layer) * (length - max(s for s in starts if s <= start))
            for start, layer in runs
        )
        return work + n_layers * overhead * len(starts)

    edges = sorted({start for start, _ in runs})
    choices = [
        [edges[0], *(edge for bit, edge in enumerate(edges[1:]) if mask >> bit & 1)]
        for mask in range(2 ** (len(edges) - 1))
    ]
    found = _starts(planned, length, n_layers, overhead)
    assert found[0] == edges[0]
    assert cost(found) == pytest.approx(min(map(cost, choices)))


def test_starts_of_a_long_prompt_are_thinned():
    planned = [edited_runs._Planned(i, Run(()), 0, i) for i in range(1000)]
    starts = _starts(planned, 1000, 4, 0.0)
    assert starts[0] == 0
    assert 32 <= len(starts) <= 64


def test_default_tokens_hold_one_run_at_least():
    architecture = Architecture(families.build("gpt2"))
    base = base_of(architecture)
    assert default_tokens(architecture, base) == 2**13
    assert edited_runs.free_bytes(torch.device("cpu")) > 0


@pytest.mark.slow
def test_long_prompts(family, overhead):
    """Past every sliding window, several times over."""
    _, model = family
    architecture = Architecture(model)
    ids = families.token_ids(2, 40)
    sites = [Site("resid_pre", 1), Site("attn_out", 1)]
    base = base_of(architecture, ids, (-1, 20), sites)
    runs = [
        Run((Edit(site, base.sites[site][1, p], p),)) for site in sites for p in (0, 13, 30, 39)
    ]
    found = run_edited(architecture, base, runs, keep_logits)
    for number, run in enumerate(runs):
        (edit,) = run.edits
        change = put(edit.value, edit.position)
        close(found[number], hooked_logits(model, ids[0], [(edit.site, change)])[0, [20, 39]])


def test_running_while_a_handler_is_open(overhead):
    """An ablation in force changes base and runs alike; what cannot be right is refused."""
    model = families.build("llama")
    architecture = Architecture(model)
    site = Site("mlp_out", 2)
    abilities(architecture)
    frozen = ActivationPatch(1, None, 0.5, "scale", site="attn_out")
    with InterventionHandler(model).register_activation_patch(frozen):
        base = run_base(architecture, IDS[:1], [site], cached=True)
        run = Run((Edit(site, torch.zeros(families.HIDDEN), 4),))
        (found,) = run_edited(architecture, base, [run], keep_logits)
    changes = [
        (Site("attn_out", 1), lambda h: h * 0.5),
        (site, put(torch.zeros(families.HIDDEN), 4)),
    ]
    close(found[0], hooked_logits(model, IDS[0], changes)[0, -1])


def test_positions_beyond_the_prompt_are_not_read():
    architecture = Architecture(families.build("gpt2"))
    for read in ((0, LENGTH), (-LENGTH - 1,), (1.5,), (True,)):
        with pytest.raises(InputError, match=r"is out of range: the prompt has|positions is"):
            run_base(architecture, IDS, (), read, cached=False)
    ends = run_base(architecture, IDS, (), (LENGTH - 1, -LENGTH), cached=False)
    assert ends.read == (0, LENGTH - 1)


def test_another_attention_implementation_is_tried_anew(monkeypatch):
    architecture = Architecture(families.build("llama"))
    tried = []
    real = edited_runs._try_abilities
    monkeypatch.setattr(edited_runs, "_try_abilities", lambda a: tried.append(a) or real(a))
    edited_runs.abilities(architecture)
    edited_runs.abilities(architecture)
    assert len(tried) == 1
    architecture.model.set_attn_implementation("eager")
    edited_runs.abilities(architecture)
    assert len(tried) == 2
