"""How the tokens of two prompts correspond, by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from forward_pass import InputError
from model_architecture import Architecture
from prompt_pairs import align_tokens, is_dataset, make_pairs, pair_positions

TOKENIZER = families.tiny_tokenizer()


@pytest.fixture(scope="module")
def architecture():
    return Architecture(families.build("gpt2"))


def pairs_of(
    architecture, clean, corrupted, direction="noising", align=None, answer=None, foil=None
):
    return make_pairs(architecture, TOKENIZER, clean, corrupted, direction, align, answer, foil)


CHAT = [{"role": "user", "content": "a cat"}]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", False),
        ([1, 2], False),
        (torch.tensor([1, 2]), False),
        ([torch.tensor(1), torch.tensor(2)], False),
        ([np.int64(1)], False),
        (np.array([[1, 2]]), False),
        (CHAT, False),
        ([], False),
        (["a cat"], True),
        (("a", "b"), True),
        ([[1, 2], [3]], True),
        ([torch.tensor([1, 2])], True),
        ([np.array([1, 2])], True),
        ([CHAT, CHAT], True),
    ],
)
def test_is_dataset(prompt, expected):
    assert is_dataset(prompt) is expected


@given(st.integers(1, 6), st.integers(1, 6))
def test_prompts_that_end_alike(n_base, n_source):
    base, source = list(range(4, 4 + n_base)), list(range(20, 20 + n_source))
    found = align_tokens(None, base, source, "end")
    shared = min(n_base, n_source)
    by_hand = dict(
        zip(range(n_base - shared, n_base), range(n_source - shared, n_source), strict=True)
    )
    assert found == by_hand
    if n_base == n_source:
        assert align_tokens(None, base, source) == by_hand
    else:
        with pytest.raises(InputError, match=rf"have {n_base} and {n_source} tokens.*<4>.*<20>"):
            align_tokens(None, base, source)


def test_a_mapping_is_ordered_and_absolute():
    assert align_tokens(None, [1, 2, 3], [4, 5], {-1: -1, 0: 0}) == {0: 0, 2: 1}
    with pytest.raises(InputError, match="position 3 is out of range"):
        align_tokens(None, [1, 2, 3], [4, 5], {3: 0})
    with pytest.raises(InputError, match=r"position 2 is out of range.*2 tokens"):
        align_tokens(None, [1, 2, 3], [4, 5], {0: 2})
    with pytest.raises(InputError, match="position 2 of the edited prompt twice"):
        align_tokens(None, [1, 2, 3], [4, 5], {2: 0, -1: 1})
    with pytest.raises(InputError, match="align is None, 'end' or a mapping"):
        align_tokens(None, [1], [1], "left")


def test_which_prompt_is_edited(architecture):
    (noising,) = pairs_of(architecture, [5, 6], [7, 8], "noising")
    assert (noising.base, noising.source) == ([5, 6], [7, 8])
    (denoising,) = pairs_of(architecture, [5, 6], [7, 8], "denoising")
    assert (denoising.base, denoising.source) == ([7, 8], [5, 6])
    assert denoising.clean == noising.clean == [5, 6]
    assert denoising.shape == noising.shape == (2, 2, ((0, 0), (1, 1)))


def test_answers_belong_to_their_pairs(architecture):
    found = pairs_of(
        architecture,
        ["a cat", "a mat"],
        ["a mat", "a cat"],
        answer=[" cat", 5],
        foil=" on",
        align="end",
    )
    assert [pair.answer for pair in found] == [" cat", 5]
    assert [pair.foil for pair in found] == [" on", " on"]
    assert found[0].clean == TOKENIZER("a cat")["input_ids"]
    with pytest.raises(InputError, match="3 tokens for 2 pairs"):
        pairs_of(architecture, [[5], [6]], [[7], [8]], answer=[1, 2, 3])


@pytest.mark.parametrize(
    ("clean", "corrupted", "message"),
    [
        ([[5]], [[5], [6]], "two lists of one length"),
        ([[5]], [5], "come in pairs"),
        ("a", ["a"], "come in pairs"),
        ([5], [200], "token id 200"),
        ([5] * 129, [5] * 129, "context holds 128"),
    ],
)
def test_refused(architecture, clean, corrupted, message):
    with pytest.raises(InputError, match=message):
        pairs_of(architecture, clean, corrupted)


def test_positions_of_pairs(architecture):
    same = pairs_of(architecture, [[5, 6, 7], [8, 9, 10]], [[5, 6, 8], [8, 9, 11]])
    assert pair_positions(same, None, True) == [(0, 1, 2)] * 2
    assert pair_positions(same, [-1, 0], True) == [(2, 0)] * 2
    other = pairs_of(architecture, [[5, 6, 7], [8, 9]], [[5, 6, 8], [8, 10]])
    assert pair_positions(other, "last", False) == [(2,), (1,)]
    assert pair_positions(other, None, False) == [(0, 1, 2), (0, 1)]
    for positions in (None, "last"):
        with pytest.raises(
            InputError, match=r"means something else in each.*prompts of one length"
        ):
            pair_positions(other, positions, True)
    with pytest.raises(InputError, match="position 2 is out of range"):
        pair_positions(other, 2, True)
    ends = pairs_of(architecture, [5, 6, 7], [7, 8], align="end")
    assert pair_positions(ends, None, True) == [(1, 2)]
    with pytest.raises(InputError, match=r"positions \[0, 2\] have no counterpart"):
        pair_positions(ends, [0, 2], True)
