"""Which columns of a pass a specification means, counted by hand and by plain Python lists."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from forward_pass import ArchitectureError, InputError
from pass_positions import CLASSES, SequenceClock, check_spec

PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
"""Two rows of three and five tokens, padded on the left."""


class Cache:
    """As much of a cache as a clock reads."""

    def __init__(self, held):
        self.held = held

    def get_seq_length(self):
        return self.held


class Body(nn.Module):
    """A model without blocks."""

    def forward(self, input_ids, **_kwargs):
        return input_ids


class Passes:
    """Drives a clock with passes written out by hand."""

    def __init__(self):
        self.body, self.clock, self.stack = Body(), SequenceClock(), ExitStack()
        self.clock.attach(self.stack, self.body)

    def run(self, tokens, mask=None, held=None, **kwargs):
        tokens = torch.as_tensor(tokens)
        if tokens.dim() == 1:
            tokens = tokens[None]
        cache = {} if held is None else {"past_key_values": Cache(held)}
        self.body(tokens, attention_mask=mask, **cache, **kwargs)

    def columns(self, spec, first=None):
        """Return ``{row: [(column, order)]}``."""
        chosen = self.clock.select(check_spec(spec), first)
        found = {row: [] for row in range(self.clock.batch)}
        flat = (each.flatten().tolist() for each in chosen)
        for row, column, order in zip(*flat, strict=True):
            found[row].append((column, order))
        return found


@pytest.fixture
def passes():
    driver = Passes()
    yield driver
    driver.stack.close()
    assert not driver.body._forward_pre_hooks


def pairs(*columns, start=0):
    return [(column, start + i) for i, column in enumerate(columns)]


# --- Specifications -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (None, None),
        ("all", None),
        ("last", -1),
        ("prompt", "prompt"),
        ("generated", "generated"),
        (3, 3),
        (np.int64(-2), -2),
        (torch.tensor(4), 4),
        (np.array(4), 4),
        ([0, -1], [0, -1]),
        ((5,), [5]),
        (range(3), [0, 1, 2]),
        (torch.tensor([2, 0]), [2, 0]),
        (np.array([7]), [7]),
        (slice(2, None), slice(2, None)),
        (slice(np.int64(1), torch.tensor(5), 2), slice(1, 5, 2)),
    ],
)
def test_check_spec(given_, expected):
    found = check_spec(given_)
    assert found == expected
    assert type(found) is type(expected)
    assert check_spec(found) == found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompts", "'prompts' is none of all, prompt, generated, last"),
        (True, "positions is an index.*came True"),
        (torch.tensor(True), "positions is an index"),
        (np.True_, "positions is an index"),
        (torch.tensor([True, False]), "positions is an index"),
        ([True, False], "positions is an index"),
        (np.array([True]), "positions is an index"),
        (1.0, "positions is an index"),
        ([0, 1.5], "positions is an index"),
        ([[0, 1]], "positions is an index"),
        (torch.zeros(2, 2, dtype=torch.long), "positions is an index"),
        (torch.tensor([0.0]), "positions is an index"),
        (object(), "positions is an index"),
        ([], "at least one token"),
        ([1, 1], r"each once; came \[1, 1\]"),
        (slice(None, None, -1), "step forwards"),
        (slice(None, None, 0), "step forwards"),
        (slice("a", None), "made of integers"),
        (slice(0, 2.0), "made of integers"),
        (slice(True, None), "made of integers"),
    ],
)
def test_check_spec_refuses(spec, message):
    with pytest.raises(InputError, match=message):
        check_spec(spec)


def meant(spec, prompt, total):
    """Return the tokens that a specification means, by plain lists: absolute position and order."""
    if spec is None or spec == "all":
        return pairs(*range(total))
    if spec == "prompt":
        return pairs(*range(prompt))
    if spec == "generated":
        return pairs(*range(prompt, total))
    if isinstance(spec, slice):
        start, stop = (
            None if end is None else max(end + prompt, 0) if end < 0 else end
            for end in (spec.start, spec.stop)
        )
        return pairs(*range(total)[start : stop : spec.step])
    asked = [-1] if spec == "last" else [spec] if isinstance(spec, int) else list(spec)
    absolute = [position + prompt if position < 0 else position for position in asked]
    return sorted((position, i) for i, position in enumerate(absolute) if position < total)


LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=3)
END = st.none() | st.integers(-6, 9)
INDICES = st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True)
SPECS = (
    st.none()
    | st.sampled_from(CLASSES)
    | st.integers(-1, 8)
    | INDICES
    | st.builds(slice, END, END, st.none() | st.integers(1, 3))
)


@given(LENGTHS, SPECS, st.booleans(), st.integers(0, 3), st.booleans())
def test_select_means_the_same_tokens_however_they_come(lengths, spec, left, new, cached):
    """Padded left or right, cached or not: the tokens that plain lists name, and no others."""
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length if left else 0 : width if left else length] = 1
    prompt = torch.arange(mask.numel()).view_as(mask)
    driver = Passes()
    driver.run(prompt, mask, use_cache=cached)
    seen = driver.columns(spec)
    here = {row: [(real_column(mask[row], column), order) for column, order in found]
            for row, found in seen.items()}  # fmt: skip
    assert here == {row: meant(spec, length, length) for row, length in enumerate(lengths)}
    tokens = prompt
    for step in range(new):
        tokens = torch.cat([tokens, torch.full((len(lengths), 1), 50 + step)], 1)
        if cached:
            driver.run(tokens[:, -1:], held=width + step)
        else:
            driver.run(tokens, use_cache=False)
        for row, found in driver.columns(spec).items():
            length = lengths[row]
            after = [
                (column - width + length if not cached else length + step, order)
                for column, order in found
                if cached or column >= width
            ]
            expected = [
                pair for pair in meant(spec, length, length + step + 1) if pair[0] >= length
            ]
            if cached:
                expected = [pair for pair in expected if pair[0] == length + step]
            assert after == expected
    driver.stack.close()


def real_column(mask, column):
    """Return the number of a real token in its row."""
    assert mask[column], "padding was chosen"
    return int(mask[:column].sum())


# --- By hand --------------------------------------------------------------------------------------


def test_left_padding_by_hand(passes):
    passes.run(torch.arange(10).view(2, 5), PADDED)
    assert passes.columns(None) == {0: pairs(2, 3, 4), 1: pairs(0, 1, 2, 3, 4)}
    assert passes.columns(0) == {0: [(2, 0)], 1: [(0, 0)]}
    assert passes.columns(-1) == {0: [(4, 0)], 1: [(4, 0)]}
    assert passes.columns([-1, 0]) == {0: [(2, 1), (4, 0)], 1: [(0, 1), (4, 0)]}
    assert passes.columns(slice(-2, None)) == {0: pairs(3, 4), 1: pairs(3, 4)}
    assert passes.columns(slice(1, None, 2)) == {0: pairs(3), 1: pairs(1, 3)}
    assert passes.columns(4) == {0: [], 1: [(4, 0)]}
    assert passes.columns("prompt") == passes.columns(None)
    assert passes.columns("generated") == {0: [], 1: []}


def test_right_padding_by_hand(passes):
    passes.run(torch.arange(10).view(2, 5), PADDED.flip(1))
    assert passes.columns(None) == {0: pairs(0, 1, 2), 1: pairs(0, 1, 2, 3, 4)}
    assert passes.columns("last") == {0: [(2, 0)], 1: [(4, 0)]}
    assert passes.columns("generated") == {0: [], 1: []}
    passes.run([[90], [91]], held=5)
    assert passes.columns("generated") == {0: [(0, 0)], 1: [(0, 0)]}
    assert passes.columns(3) == {0: [(0, 0)], 1: []}
    assert passes.columns(5) == {0: [], 1: [(0, 0)]}


def test_a_mask_with_a_hole(passes):
    passes.run([1, 2, 3, 4], torch.tensor([[1, 0, 1, 1]]))
    assert passes.columns(None) == {0: pairs(0, 2, 3)}
    assert passes.columns(1) == {0: [(2, 0)]}


def test_equal_counts_are_a_rectangle_and_unequal_ones_a_line(passes):
    passes.run(torch.arange(10).view(2, 5), PADDED)
    assert passes.clock.select(-1).rows.tolist() == [[0], [1]]
    assert passes.clock.select([0, 1]).columns.tolist() == [[2, 3], [0, 1]]
    assert passes.clock.select(None).rows.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert passes.clock.select("generated").rows.shape == (2, 0)


def test_cached_decoding_by_hand(passes):
    passes.run([7, 8, 9], held=0)
    for step in range(3):
        passes.run([50 + step], held=3 + step)
        assert passes.columns(None) == {0: [(0, 3 + step)]}
        assert passes.columns("generated") == {0: [(0, step)]}
        assert passes.columns("prompt") == passes.columns(-1) == {0: []}
        assert passes.columns(4) == {0: [(0, 0)] if step == 1 else []}
        assert passes.columns(slice(2, None, 2)) == {0: [(0, 1)] if step == 1 else []}
        # keys and values hold the whole cache, or of a sliding window its end
        assert passes.columns(-1, first=0) == {0: [(2, 0)]}
        assert passes.columns([4, 0], first=0)[0][0] == (0, 1)
        assert passes.columns(-1, first=2) == {0: [(0, 0)]}
        assert passes.columns(0, first=2) == {0: []}
    assert passes.clock.generated


def test_several_tokens_in_one_cached_pass(passes):
    passes.run([7, 8, 9], held=0)
    passes.run([50, 51], held=3)
    assert passes.columns("generated") == {0: pairs(0, 1)}
    assert passes.columns(4) == {0: [(1, 0)]}


def test_uncached_decoding_by_hand(passes):
    tokens = [7, 8, 9]
    for step in range(4):
        passes.run(tokens, use_cache=False)
        assert passes.columns(-1) == {0: [(2, 0)]}
        assert passes.columns("prompt") == {0: pairs(0, 1, 2)}
        assert passes.columns("generated") == {0: pairs(*range(3, 3 + step))}
        tokens.append(50 + step)
    assert passes.clock.passes == 4


@pytest.mark.parametrize(
    "second",
    [[7, 8, 9], [7, 8, 9, 4, 5], [7, 8, 1, 4], [7, 8], [1]],
    ids=["the same", "two more", "another prefix", "shorter", "one token"],
)
@pytest.mark.parametrize("use_cache", [False, None])
def test_another_prompt_is_a_new_sequence(passes, second, use_cache):
    passes.run([7, 8, 9], use_cache=use_cache)
    passes.run(second, use_cache=use_cache)
    assert passes.columns(-1) == {0: [(len(second) - 1, 0)]}
    assert not passes.clock.generated


def test_a_prompt_that_goes_on_is_a_new_sequence_unless_caching_is_off(passes):
    """``model(a)`` and ``model(a + b)`` are two prompts; only a decoding loop turns caches off."""
    passes.run([7, 8, 9])
    passes.run([7, 8, 9, 4])
    assert passes.columns(-1) == {0: [(3, 0)]}


@pytest.mark.parametrize("second", [[7, 8], [7, 8, 9, 4], [7, 8, 9]])
def test_a_prompt_after_a_cached_generation(passes, second):
    passes.run([7, 8, 9], held=0)
    passes.run([50], held=3)
    passes.run(second, held=0)
    assert passes.columns(-1) == {0: [(len(second) - 1, 0)]}
    passes.run(second, use_cache=False)
    assert passes.columns("prompt") == {0: pairs(*range(len(second)))}


def test_a_prompt_of_one_token_after_a_cached_generation(passes):
    passes.run([7], held=0)
    passes.run([50], held=1)
    passes.run([7, 8], use_cache=False)
    assert passes.columns(-1) == {0: [(1, 0)]}


def test_rows_that_are_repeated_for_beams(passes):
    passes.run(torch.arange(10).view(2, 5), PADDED, held=0)
    passes.run(torch.arange(6).view(6, 1), held=5)
    assert passes.columns(3) == {row: [(0, 0)] if row < 3 else [] for row in range(6)}
    assert passes.columns(5) == {row: [(0, 0)] if row >= 3 else [] for row in range(6)}
    first_tokens = {row: [(2 if row < 3 else 0, 0)] for row in range(6)}
    assert passes.columns(0, first=0) == first_tokens
    with pytest.raises(ArchitectureError, match="changed from 6 rows to 4"):
        passes.run(torch.arange(4).view(4, 1), held=6)


def test_embeddings_instead_of_ids(passes):
    passes.run(torch.zeros(2, 5, 8), PADDED)
    assert passes.columns(0) == {0: [(2, 0)], 1: [(0, 0)]}


# --- Refused --------------------------------------------------------------------------------------


def test_a_negative_position_before_the_start_of_a_prompt(passes):
    passes.run(torch.arange(10).view(2, 5), PADDED)
    assert passes.columns(-3) == {0: [(2, 0)], 1: [(2, 0)]}
    for spec in (-4, [-1, -4]):
        with pytest.raises(
            InputError, match=r"position -4 lies before the start of row 0.*3 tokens"
        ):
            passes.columns(spec)


def test_padding_that_cannot_be_seen(passes):
    with pytest.raises(ArchitectureError, match=r"not \[batch, position\]"):
        passes.run(torch.arange(10).view(2, 5), torch.zeros(2, 1, 5, 5))
    passes.run([1, 2], torch.zeros(1, 1, 2, 2))
    assert passes.columns(None) == {0: pairs(0, 1)}


def test_a_sequence_that_began_before(passes):
    with pytest.raises(InputError, match="open the handler before the first pass"):
        passes.run([5], held=3)


def test_listeners_are_called_when_the_clock_is_right(passes):
    seen = []
    passes.clock.announce_to(lambda: seen.append((passes.clock.offset, passes.clock.length)))
    passes.run([7, 8, 9], held=0)
    passes.run([5], held=3)
    assert seen == [(0, 3), (3, 1)]
