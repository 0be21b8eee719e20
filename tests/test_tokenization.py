"""Prompts, readable tokens, positions, padding: against the tokenizer's own output, and by hand."""

import math
import types

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import families
import tokenization
from forward_pass import InputError
from sites import check_count, is_count
from tokenization import (
    as_ids,
    check_ids,
    context_length,
    encode,
    encode_texts,
    is_token_ids,
    pad_left,
    resolve_positions,
    token_strings,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}.{% endfor %}"
)
CHAT = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return families.tiny_tokenizer(bos=True)


def metaspace_tokenizer():
    """A tokenizer in the manner of sentencepiece: a space is a mark in front of the word."""
    pieces = ["<unk>", "▁the", "▁cat", "▁", "s", "at", "▁a", "a"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def all_bytes_tokenizer():
    """GPT-2's 256 bytes and nothing else, so that a character outside ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# --- Prompts --------------------------------------------------------------------------------------


def test_text_is_tokenized_as_the_tokenizer_does_by_default(tokenizer, bos_tokenizer):
    assert encode(tokenizer, "the cat") == tokenizer("the cat")["input_ids"]
    assert encode(bos_tokenizer, "the cat") == [1, *tokenizer("the cat")["input_ids"]]


def test_a_chat_has_one_bos():
    tokenizer = families.tiny_tokenizer(bos=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    plain = families.tiny_tokenizer()
    assert encode(tokenizer, CHAT) == [1, *encode(plain, "user: the cat sat.")]


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        [np.int64(5), torch.tensor(6)],
        np.array([5, 6], dtype=np.int32),
        torch.tensor([5, 6]),
        torch.tensor([[5, 6]]),
        np.array([[5, 6]]),
    ],
)
def test_token_ids_of_every_kind(ids):
    assert is_token_ids(ids)
    assert encode(None, ids) == as_ids(ids) == [5, 6]
    assert all(type(token) is int for token in encode(None, ids))


@pytest.mark.parametrize(
    "ids",
    [
        [True, False],
        [1.0],
        [[1, 2]],
        ["a", "b"],
        np.array([1.0]),
        torch.tensor([True]),
        [torch.tensor(True)],
        torch.tensor([[1], [2]]),
        torch.tensor(5),
    ],
)
def test_what_is_no_list_of_integers_is_refused(ids):
    with pytest.raises(InputError, match="token ids"):
        encode(None, ids)


def test_a_prompt_without_tokens_is_refused(tokenizer, bos_tokenizer):
    for empty in ([], np.array([], dtype=int), torch.tensor([], dtype=torch.long)):
        with pytest.raises(InputError, match="empty list of token ids"):
            encode(tokenizer, empty)
    with pytest.raises(InputError, match=r"'' gives no token; write some text$"):
        encode(tokenizer, "")
    assert encode(bos_tokenizer, "") == [1], "the BOS token alone is a prompt"
    # one that has a BOS token, but does not put it in front by itself
    knows_bos = families.tiny_tokenizer()
    knows_bos.bos_token = "<s>"
    with pytest.raises(InputError, match=r"pass the BOS token alone as token ids: \[1\]"):
        encode(knows_bos, "")


@pytest.mark.parametrize("prompt", [b"ab", 5, None, {"role": "user"}, {1, 2}])
def test_other_kinds_of_prompt_are_refused(tokenizer, prompt):
    with pytest.raises(InputError, match=f"text, a chat or token ids, not {type(prompt).__name__}"):
        encode(tokenizer, prompt)


def test_half_a_character_is_refused_by_its_place(tokenizer):
    chatty = families.tiny_tokenizer()
    chatty.chat_template = CHAT_TEMPLATE
    for prompt in ("the\ud83d cat", [{"role": "", "content": "the\ud83d cat"}]):
        with pytest.raises(InputError, match=r"not valid Unicode: '\\ud83d' at character 3"):
            encode(chatty, prompt)


def test_text_needs_a_tokenizer_and_a_chat_a_template(tokenizer):
    with pytest.raises(InputError, match="pass tokenizer=, or give token ids"):
        encode(None, "the cat")
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, CHAT)


def test_a_tokenizer_is_only_read(bos_tokenizer):
    def state():
        others = {k: repr(v) for k, v in vars(bos_tokenizer).items() if k != "_tokenizer"}
        return others, bos_tokenizer.backend_tokenizer.to_str()

    before = state()
    encode(bos_tokenizer, "the cat")
    token_strings(bos_tokenizer, [1, 5, 99])
    assert state() == before
    assert bos_tokenizer.pad_token is None


# --- What a model can run -------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_and_the_context_are_refused_with_the_numbers():
    config = types.SimpleNamespace(vocab_size=99, max_position_embeddings=8)
    check_ids([0, 98], config)
    check_ids([5] * 8, config)
    check_ids([5] * 6, config, extra=2)
    for token in (99, -1):
        with pytest.raises(InputError, match=rf"token id {token} .* vocabulary of 99 \(0\.\.98\)"):
            check_ids([5, token], config)
    with pytest.raises(InputError, match="9 tokens; the model's context holds 8"):
        check_ids([5] * 9, config)
    with pytest.raises(InputError, match="6 tokens and 3 to generate; the model's context holds 8"):
        check_ids([5] * 6, config, extra=3)


def test_the_context_is_the_models_own(family):
    """Where a model has a table of positions, one token more than its context cannot be run."""
    name, model = family
    config = model.config
    expected = None if name in ("bloom", "mamba") else families.POSITIONS
    assert context_length(types.SimpleNamespace(max_position_embeddings=-1)) is None
    assert context_length(config) == expected
    if name in ("gpt2", "gptj", "gpt_neo", "opt", "mpt"):
        with torch.no_grad():
            model(families.token_ids(1, expected))
            with pytest.raises((IndexError, RuntimeError)):
                model(families.token_ids(1, expected + 1))


# --- Readable tokens ------------------------------------------------------------------------------


def test_byte_level_tokens_keep_their_space_and_join_to_the_text(tokenizer):
    text = "a cat sat  on\nthe mat."
    tokens = token_strings(tokenizer, encode(tokenizer, text))
    assert tokens[:3] == ["a", " cat", " sat"]
    assert "".join(tokens) == text


def test_sentencepiece_tokens_keep_their_space():
    tokenizer = metaspace_tokenizer()
    ids = encode(tokenizer, "the cat sat")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁cat", "▁", "s", "at"]
    assert token_strings(tokenizer, ids) == [" the", " cat", " ", "s", "at"]


def test_a_token_that_is_part_of_a_character_is_shown_as_the_tokenizers_piece():
    tokenizer = all_bytes_tokenizer()
    tokens = token_strings(tokenizer, encode(tokenizer, "a é€"))
    assert tokens == ["a", " ", "Ã", "©", "â", "Ĥ", "¬"]


def test_special_unknown_and_missing_tokens_are_shown(bos_tokenizer):
    assert token_strings(bos_tokenizer, [1, 0]) == ["<s>", "<unk>"]
    assert token_strings(bos_tokenizer, [500]) == ["<500>"], "a model may have more rows than that"
    assert token_strings(None, [7, 8]) == ["<7>", "<8>"]


# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("last", [4]),
        (0, [0]),
        (-1, [4]),
        (-5, [0]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        ([3, 0, -1], [3, 0, 4]),
        ((1,), [1]),
        (range(2), [0, 1]),
        (np.array([3, 1]), [3, 1]),
        (torch.tensor([3, 1]), [3, 1]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [3, 4]),
        (slice(None, None, -2), [4, 2, 0]),
    ],
)
def test_positions_in_the_order_given(positions, expected):
    assert resolve_positions(positions, 5) == expected


@pytest.mark.parametrize("positions", [5, -6, [0, 5]])
def test_positions_out_of_range_are_refused_with_the_range(positions):
    with pytest.raises(InputError, match=r"the prompt has 5 tokens, valid are 0\.\.4 or -5\.\.-1"):
        resolve_positions(positions, 5)


@pytest.mark.parametrize("positions", [[0, 0], [0, -5]])
def test_a_position_given_twice_is_refused(positions):
    with pytest.raises(InputError, match="names a token twice"):
        resolve_positions(positions, 5)


@pytest.mark.parametrize("positions", [[], slice(5, 9), slice(3, 1)])
def test_positions_that_select_nothing_are_refused(positions):
    with pytest.raises(InputError, match="selects none of the 5 tokens"):
        resolve_positions(positions, 5)


@pytest.mark.parametrize(
    "positions",
    # a mask of truth values would silently be read as positions 1 and 0
    ["first", 1.5, [1.0], True, [True, False], np.array([True]), [[0, 1]], slice(0.5, 2), object()],
)
def test_other_kinds_of_positions_are_refused(positions):
    told = "positions is 'last', 'all', an index, a slice, a list or None"
    with pytest.raises(InputError, match=told):
        resolve_positions(positions, 5)


# --- Batches --------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_left():
    ids, mask = pad_left([[5, 6, 7], [8], [5, 9]], pad_id=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8], [3, 5, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_pad_id_inside_a_text_is_no_padding():
    _, mask = pad_left([[0, 0, 0], [0, 5]], pad_id=0)
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]


def test_many_texts_are_encoded_as_each_by_itself(tokenizer, monkeypatch):
    """In any order, over the ends of chunks, among what is no text and what is refused."""
    monkeypatch.setattr(tokenization, "TEXTS_AT_ONCE", 4)
    words = ("the", "cat", "sat", "on", "a", "mat", "\u00e9t\u00e9 \U0001f600")
    texts = [" ".join(words[: 1 + i % 7]) + "!" * (i % 3) for i in range(23)]
    prompts = [*texts, [5, 6], "", "bad \ud800", texts[3], CHAT]
    found = encode_texts(tokenizer, prompts)
    assert found[:23] == [list(tokenizer(text)["input_ids"]) for text in texts]
    assert found[23:] == [None, None, None, found[3], None]
    assert encode_texts(None, prompts) == [None] * len(prompts)
    assert encode_texts(tokenizer, [[1], [2, 3]]) == [None, None]


@pytest.mark.parametrize(
    ("number", "most", "expected"),
    [
        (1, 9, True), (9, 9, True), (np.int64(3), 9, True), (torch.tensor(3), 9, True),
        (0, 9, False), (10, 9, False), (True, 9, False), (2.0, 9, False), ("3", 9, False),
        (None, 9, False), (torch.tensor(2.5), 9, False), (10**9, math.inf, True),
    ],
)  # fmt: skip
def test_what_counts_things(number, most, expected):
    assert is_count(number, most) is expected
    if most == math.inf:
        return
    if is_count(number):
        check_count(number, "k")
    else:
        with pytest.raises(InputError, match="k must be at least 1; came"):
            check_count(number, "k")
