"""Too little memory: batches are halved with the same result; the last error says what it needs."""

import json
import re
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import activation_extraction
import continuations
import families
from activation_extraction import ActivationExtractor, extract_batch, make_request
from continuations import continuation_nats, sample_continuations
from direction_finding import read_examples
from edited_runs import abilities
from forward_pass import InputError, Site
from long_calls import CALLS, same
from memory_estimate import (
    MemoryEstimate,
    ModelSizes,
    SiteSize,
    estimate,
    estimate_memory,
    measure_sizes,
)
from memory_limits import (
    NotEnoughMemoryError,
    SmallerBatchWarning,
    explain,
    free_bytes,
    in_batches,
    in_words,
    is_out_of_memory,
)
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from patch_oracle import assert_untouched, state_of
from path_patching import patch_paths

ROWS = [families.token_ids(1, n, seed=n)[0].tolist() for n in (5, 8, 1, 8, 3, 6, 2)]
CLEAN, CORRUPTED = [5, 9, 12, 7, 20], [5, 10, 12, 7, 20]
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


def starve(monkeypatch, module, name, cost, limit, error=None):
    """Let a function fail for want of memory where its arguments cost too much; costs it saw."""
    real, seen = getattr(module, name), []

    def limited(*args, **kwargs):
        seen.append(cost(*args, **kwargs))
        if seen[-1] > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)
    return seen


# --- What an allocator says -----------------------------------------------------------------------


def test_what_this_computers_allocators_raise_is_recognized():
    for ask in (lambda: torch.empty(2**50), lambda: np.empty(2**58), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value), caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_which_errors_are_about_memory(error, expected):
    assert is_out_of_memory(error) is expected


# --- Halving --------------------------------------------------------------------------------------


def run_sizes(batches, limit, **options):
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise MemoryError
        return sum(batch)

    return list(in_batches(batches, run, unit="things", **options)), sizes


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_halves_come_in_order_and_later_batches_are_small_at_once(limit):
    batches = [list(range(n, n + 8)) for n in (0, 8, 16)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done, sizes = run_sizes(batches, limit)
    expected = "8 things at a time do not fit into memory: going on with 4"
    assert [str(each.message) for each in said[:1]] == [expected] * (limit < 8)
    assert all(each.category is SmallerBatchWarning for each in said)
    assert [item for batch, _ in done for item in batch] == list(range(24))
    assert all(found == sum(batch) for batch, found in done)
    failed = [size for size in sizes if size > limit]
    assert failed == sorted(set(failed), reverse=True), "no size fails twice"


def test_what_costs_less_is_not_made_smaller():
    batches = [[5] * 4, [1] * 12, [5] * 4]
    with pytest.warns(SmallerBatchWarning):
        done = list(
            in_batches(batches, lambda b: 0 if sum(b) <= 12 else fail(), unit="things", cost=sum)
        )
    assert [len(batch) for batch, _ in done] == [2, 2, 6, 6, 2, 2]


def fail():
    raise MemoryError


def test_one_alone_is_an_error_in_words():
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(NotEnoughMemoryError, match=r"one of the things alone does not .*: 3 are too")
        as caught,
    ):  # fmt: skip
        run_sizes([[3, 4]], 0, needs=lambda batch: f"{batch[0]} are too many")
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_other_errors_pass():
    def run(_batch):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches([[1, 2]], run, unit="things"))


def test_what_a_failed_batch_held_is_let_go():
    """Or else the half would not fit either."""
    import weakref

    held = []

    class Big:
        pass

    def run(batch):
        if len(batch) > 1:
            big = Big()
            held.append(weakref.ref(big))
            raise MemoryError
        assert all(ref() is None for ref in held)
        return 0

    with pytest.warns(SmallerBatchWarning):
        list(in_batches([[1, 2, 3, 4]], run, unit="things"))
    assert len(held) > 1


def test_an_error_is_explained():
    with ExitStack() as stack, pytest.raises(NotEnoughMemoryError) as caught:
        with ExitStack() as inner:
            inner.push(explain)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
        assert stack
    assert re.match(
        r"a pass of the model does not fit into memory: CUDA out of memory. Tried to allocate 2 "
        r"GiB\. Shorten the text",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert caught.value.__cause__.__traceback__ is None, "its frames hold what did not fit"
    for other in (NotEnoughMemoryError("inner"), RuntimeError("shapes"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as caught, ExitStack() as stack:
            stack.push(explain)
            raise other
        assert caught.value is other


def test_an_estimate_that_does_not_fit_itself_is_left_out():
    with pytest.raises(NotEnoughMemoryError, match=r"^one of the things alone does not fit into m"):
        list(in_batches([[1]], lambda _: fail(), unit="things", needs=lambda _: fail()))

    def explained(_batch):
        raise NotEnoughMemoryError("as it was said")

    with pytest.raises(NotEnoughMemoryError, match=r"^as it was said$"):
        list(in_batches([[1]], explained, unit="things", needs=lambda _: fail()))


# --- The calls that have batches ------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 16, 24])
@pytest.mark.parametrize("positions", [None, "last"])
def test_an_extraction_goes_on_with_smaller_batches(gpt2, monkeypatch, limit, positions):
    arch, before = Architecture(gpt2), None
    request = make_request(arch, include_attention=True, return_logits=True)
    alone = [extract_batch(arch, None, [row], request, positions, **QUIET)[0] for row in ROWS]
    before = state_of(gpt2)
    seen = starve(
        monkeypatch, activation_extraction, "record",
        lambda _arch, inputs, *_a, **_k: inputs["input_ids"].numel(), limit,
    )  # fmt: skip
    with pytest.warns(SmallerBatchWarning) as said:
        found = extract_batch(arch, None, ROWS, request, positions, **QUIET)
    assert max(seen) > limit
    assert "7 prompts at a time do not fit" in str(said[0].message)
    for record, expected in zip(found, alone, strict=True):
        assert (record.token_ids, record.positions) == (expected.token_ids, expected.positions)
        for (*where, a), (*other, b) in zip(record.tensors(), expected.tensors(), strict=True):
            assert where == other
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_untouched(gpt2, before)


def test_a_prompt_that_does_not_fit_alone_is_refused_with_the_numbers(gpt2, monkeypatch):
    arch = Architecture(gpt2)
    starve(monkeypatch, activation_extraction, "record", lambda *_a, **_k: 1, 0)
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(
            NotEnoughMemoryError,
            match=r"a prompt of 8 tokens needs about [\d.]+ KiB beside the model's [\d.]+ KiB, and "
            r".* are free\. Shorten the text, ask for fewer",
        ),
    ):
        extract_batch(arch, None, ROWS, make_request(arch), **QUIET)


def test_continuations_go_on_with_smaller_batches(gpt2, monkeypatch):
    arch = Architecture(gpt2)
    expected = sample_continuations(arch, None, ROWS, 2, max_new_tokens=3, seed=4)
    nats = continuation_nats(arch, expected)
    starve(monkeypatch, continuations, "_generate", lambda _a, _t, batch, *_r: len(batch), 3)
    starve(monkeypatch, continuations, "record",
           lambda _a, inputs, *_r, **_k: len(inputs["input_ids"]), 4)  # fmt: skip
    with pytest.warns(SmallerBatchWarning) as said:
        again = sample_continuations(arch, None, ROWS, 2, max_new_tokens=3, seed=4)
    assert again == expected
    assert "14 continuations at a time" in str(said[0].message)
    with pytest.warns(SmallerBatchWarning):
        np.testing.assert_allclose(continuation_nats(arch, expected), nats, rtol=1e-4)


def test_paths_go_on_with_smaller_batches(gpt2, monkeypatch):
    import path_patching

    call = {"answer": 20, "foil": 30, **QUIET}
    expected = patch_paths(gpt2, None, CLEAN, CORRUPTED, **call).values
    starve(monkeypatch, path_patching, "run_paths", lambda _runs, batch, _g: len(batch), 3)
    with pytest.warns(SmallerBatchWarning):
        found = patch_paths(gpt2, None, CLEAN, CORRUPTED, **call).values
    np.testing.assert_allclose(found, expected, atol=1e-4)


QUICK = ("extraction", "head summary", "paths", "probes", "steering sweep", "sweep", "lens")


@pytest.mark.parametrize(
    "call",
    [call if call in QUICK else pytest.param(call, marks=pytest.mark.slow) for call in CALLS],
)
def test_every_long_call_goes_on_or_says_what_does_not_fit(monkeypatch, call):
    """With passes of fewer and fewer rows: the same result and a line, or an error in words."""
    model, rows = families.build("gpt2"), []
    kind, limit = type(Architecture(model).blocks[0]), float("inf")
    real = kind.forward

    def limited(self, hidden, *args, **kwargs):
        rows.append(len(hidden))
        if len(hidden) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return real(self, hidden, *args, **kwargs)

    CALLS[call](model)
    monkeypatch.setattr(kind, "forward", limited)
    expected, most, before = CALLS[call](model), max(rows), state_of(model)
    for limit in sorted({most - 1, most // 2, 1, 0}, reverse=True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = CALLS[call](model)
            except NotEnoughMemoryError as error:
                assert limit == 0 or call in ONE_PASS
                assert "Shorten the text, ask for fewer" in str(error)
                assert re.search(
                    r"Tried to allocate 2 GiB|need about|takes|\d are free", str(error)
                )
            else:
                same(found, expected, rtol=1e-4, atol=1e-4)
                assert any(each.category is SmallerBatchWarning for each in said) == (limit < most)
        assert_untouched(model, before)


ONE_PASS = {"paths", "trace", "head writes", "weighted patterns", "copying"}
"""Calls with a pass of several rows that belong together: two runs, noise, a matrix' columns."""


def test_the_unmodified_runs_of_many_pairs_are_made_in_smaller_batches(gpt2, monkeypatch):
    import patching_sweep as module

    pairs = [[CLEAN, [7, *CLEAN[1:]], [8, *CLEAN[1:]]], [CORRUPTED] * 3]
    call = {"answer": 20, "foil": 30, **QUIET}
    expected = module.patching_sweep(gpt2, None, *pairs, **call)
    starve(monkeypatch, module, "run_base", lambda _a, ids, *_r, **_k: len(ids), 1)
    with pytest.warns(SmallerBatchWarning, match=r"3 pairs of prompts at a time .* with 1"):
        found = module.patching_sweep(gpt2, None, *pairs, **call)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
    starve(monkeypatch, module, "run_base", lambda *_a, **_k: 1, 0)
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(NotEnoughMemoryError, match="one of the pairs of prompts alone"),
    ):
        module.patching_sweep(gpt2, None, *pairs, **call)


def test_too_little_memory_is_not_taken_for_what_a_model_cannot_do(monkeypatch):
    """The shortcuts are tried once per model: what is found then is remembered."""
    import edited_runs

    model = families.build("gpt2")
    expected = abilities(Architecture(families.build("gpt2")))
    with monkeypatch.context() as patch:
        starve(patch, edited_runs, "resume_growing", lambda *_: 1, 0)
        with pytest.raises(torch.OutOfMemoryError):
            abilities(Architecture(model))
    assert abilities(Architecture(model)) == expected


# --- The estimate ---------------------------------------------------------------------------------


def test_an_estimate_from_sizes_alone():
    sizes = ModelSizes(
        weights=1000, per_token=10.0, per_pair=0.5, logits=40,
        sites=(SiteSize(Site("resid_post", 0), 32), SiteSize(Site("attn_pattern", 0), 8)),
    )  # fmt: skip
    found = estimate(sizes, [4, 6, 2], [4, 6, 2], 2, free=5000.0)
    kept = [n * (40 + 32 + 8 * n) for n in (4, 6, 2)]
    assert found.results == sum(kept)
    assert found.captured == 2 * 6 * (40 + 32 + 8 * 6)
    assert found.working == 2 * max(int(10 * 6 + 0.5 * 36), 40 * 6)
    assert found.needed == found.results + found.captured + found.working
    assert found.fits
    assert repr(found) == (
        "MemoryEstimate(3.16 KiB beside 1000 bytes of weights: results 1.28 KiB, captured 1.41 "
        "KiB, working 480 bytes; 4.88 KiB free, fits)"
    )
    assert not MemoryEstimate(0, 10, 0, 0, 9.0).fits


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**31, "2 GiB"), (2**42, "4 TiB")],
)
def test_bytes_in_words(nbytes, words):
    assert in_words(nbytes) == words


def peak_of(call):
    """Bytes that torch's CPU allocator held more at the peak, and what the call returned."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = call()
    events = profiler.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = np.cumsum([nbytes for _, nbytes in sorted(sizes)])
    return int(held.max()), found


OPTIONS = (
    {},
    {"positions": "last"},
    {"return_logits": True},
    {"include_attention": True},
    {"sites": ("resid_post", "query", "key", "head_out", "mlp_out"), "positions": [0, -1]},
)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom", "gptj", "mixtral"])
def test_results_are_known_to_the_byte_and_the_peak_within_a_factor_of_two(name):
    arch = Architecture(families.build(name))
    rows = [families.token_ids(1, n, seed=n)[0].tolist() for n in (100, 120, 128, 128, 90, 60)]
    for options in OPTIONS:
        expected = estimate_memory(arch, None, rows, batch_size=3, **options)
        asked = {k: v for k, v in options.items() if k != "positions"}
        request = make_request(arch, **asked)
        peak, records = peak_of(
            lambda request=request, options=options: extract_batch(
                arch, None, rows, request, options.get("positions"), batch_size=3, **QUIET
            )
        )
        back = sum(tensor.nbytes for record in records for *_, tensor in record.tensors())
        assert expected.results == back, options
        assert 0.5 < expected.needed / peak < 2, (options, expected, peak)


def test_an_estimate_runs_a_few_tokens_and_leaves_the_model_as_it_was(gpt2, monkeypatch):
    arch = Architecture(gpt2)
    arch.structure  # noqa: B018
    before, lengths = state_of(gpt2), []
    handle = gpt2.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = estimate_memory(arch, None, [[5] * 128] * 1000)
    handle.remove()
    assert lengths == [16, 32]
    assert_untouched(gpt2, before)
    assert found.weights == sum(p.nbytes for p in gpt2.parameters()) + sum(
        b.nbytes for b in gpt2.buffers()
    )
    assert found.results == 1000 * 128 * families.HIDDEN * 4 * 3


def test_a_context_of_few_tokens_is_measured_too():
    config = dict(families.FAMILIES["gpt2"].kwargs) | {"n_positions": 12}
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    sizes = measure_sizes(Architecture(model), make_request(Architecture(model)))
    assert sizes.per_token > 0


def test_the_facade_estimates(gpt2):
    analyzer = ModelAnalyzer(gpt2, tokenizer=families.tiny_tokenizer())
    texts = ["a cat", "the cat sat on the mat"]
    found = analyzer.estimate_memory(texts, layer_indices=[1], return_logits=True)
    records = analyzer.extract_batch_activations(
        texts, layer_indices=[1], return_logits=True, **QUIET
    )
    assert found.results == sum(t.nbytes for record in records for *_, t in record.tensors())
    assert json.dumps(found.needed)
    assert re.fullmatch(r"MemoryEstimate\(.* fits\)", repr(found))
    for wrong in ("a text", [[5] * 1000], [[999]]):
        with pytest.raises(InputError):
            analyzer.estimate_memory(wrong)
    assert analyzer.estimate_memory([[5]], batch_size=np.int64(2)).results > 0


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", True, None])
def test_what_is_no_batch_size(gpt2, batch_size):
    analyzer = ModelAnalyzer(gpt2, tokenizer=families.tiny_tokenizer())
    for call in (
        lambda: analyzer.estimate_memory([[5]], batch_size=batch_size),
        lambda: analyzer.extract_batch_activations([[5]], batch_size=batch_size),
        lambda: read_examples(gpt2, None, [[5]], [1], batch_size=batch_size),
        lambda: sample_continuations(analyzer.architecture, None, [[5]], batch_size=batch_size),
    ):
        with pytest.raises(InputError, match=f"batch_size must be at least 1.*came {batch_size!r}"):
            call()


def test_there_is_some_memory():
    assert free_bytes(torch.device("cpu")) > 2**20


GIB = 2**30
GROUPS = {
    "second": ("0::/box\n", "box", "memory.max", "memory.current", "inactive_file"),
    "root": ("0::/not/seen/inside\n", "", "memory.max", "memory.current", "inactive_file"),
    "first": ("9:cpu:/a\n4:memory,x:/box\n", "memory/box", "memory.limit_in_bytes",
              "memory.usage_in_bytes", "total_inactive_file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_free_is_what_a_container_may_use(kind, tmp_path, monkeypatch):
    """Written as Linux does: a limit of 4 GiB, 3 in use, of which 1 is cached files."""
    listed, place, limit, used, idle = GROUPS[kind]
    monkeypatch.setattr("memory_limits.PROC", tmp_path / "proc")
    monkeypatch.setattr("memory_limits.CGROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    meminfo = f"MemTotal: {99 * 2**20} kB\nMemFree: 5 kB\nMemAvailable:   {8 * 2**20} kB\n"
    (tmp_path / "proc" / "meminfo").write_text(meminfo)
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == 8 * GIB, "what caches of files would give back counts"
    (tmp_path / "proc" / "self" / "cgroup").write_text(listed)
    group = tmp_path / "groups" / place
    group.mkdir(parents=True)
    (group / used).write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon {2 * GIB}\n{idle} {GIB}\n")
    (group / limit).write_text(f"{4 * GIB}\n")
    assert free_bytes(cpu) == 2 * GIB
    (group / limit).write_text("max\n")
    assert free_bytes(cpu) == 8 * GIB


def test_the_extractor_says_nothing_where_there_is_enough(gpt2, recwarn):
    ActivationExtractor(gpt2).extract_batch_activations(ROWS, **QUIET)
    assert len(recwarn) == 0
