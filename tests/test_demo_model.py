"""The bundled model loads plainly, is small, and does on held-out prompts what its README says."""

import collections
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from demo_model import evaluate, write_corpus
from demo_model import sentences as patterns
from demo_model import vocabulary as words

FOLDER = evaluate.FOLDER
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def subject():
    return evaluate.load()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def corpus():
    return list(write_corpus.documents(6000, seed=0))


def table_row(behaviour):
    cells = next(line for line in README.splitlines() if line.startswith(f"| {behaviour} |"))
    return cells.split("|")[2].strip(), cells.split("|")[3].strip()


def test_it_loads_plainly_as_a_gpt2_of_twelve_layers():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model) is GPT2LMHeadModel
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (12, 96, 6)
    assert model.dtype == torch.float32
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0


def test_all_files_are_there_and_take_at_most_twelve_megabytes():
    assert all((FOLDER / name).is_file() for name in FILES)
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_the_end_token_is_gpt2s_and_nothing_is_added_in_front(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    assert (
        tokenizer.eos_token_id == AutoModelForCausalLM.from_pretrained(FOLDER).config.eos_token_id
    )
    assert tokenizer.encode("The cat") == tokenizer.encode("The cat", add_special_tokens=False)


@given(text=st.text(max_size=40))
def test_any_unicode_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_that_snippets_take_as_one_token_are_one(tokenizer):
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words.SINGLE_TOKENS)
    assert all(len(tokenizer.encode(word)) == 1 for word in words.BARE_TOKENS)
    assert {"king", "queen", "man", "woman", "prince", "princess"} <= set(words.BARE_TOKENS)
    assert tokenizer.tokenize("1742") == list("1742")


def test_the_same_seed_writes_the_same_corpus(tmp_path):
    for name in ("one", "two"):
        write_corpus.write_corpus(tmp_path / name, 300, seed=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    write_corpus.write_corpus(tmp_path / "three", 300, seed=4)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "three").read_bytes()
    first = json.loads((tmp_path / "one").read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {"kind", "text"}


def test_the_corpus_has_every_kind(corpus):
    assert {document.kind for document in corpus} == set(write_corpus.KINDS)


@pytest.mark.parametrize("kind", ["capital", "country", "landmark"])
def test_held_out_facts_are_in_no_training_document(corpus, kind):
    held_out = [f"{prompt} {answer}." for prompt, answer in evaluate.fact_prompts(kind)]
    starts = tuple(text for text in held_out if not text.startswith("Question"))
    assert len(starts) > 40
    sentences = collections.Counter(
        sentence
        for document in corpus
        for sentence in re.findall(r"(?:^|(?<=\. ))[A-Z].*?\.(?= |$)", document.text)
    )
    assert not [text for text in starts if text in sentences]


def test_held_out_pairs_of_names_are_in_no_training_document(corpus):
    for document in corpus:
        if document.kind == "ioi":
            found = {word for word in re.findall(r"[A-Z][a-z]+", document.text)} & set(words.NAMES)
            assert len(found) == 2
            assert not write_corpus.names_held_out(*found)
        elif document.kind != "general":
            found = set(re.findall(r"[A-Z][a-z]+", document.text)) & set(words.NAMES)
            assert len(found) < 2 or document.kind in ("capital", "landmark")


def test_held_out_years_and_sums_are_in_no_training_document(corpus):
    texts = {kind: [d.text for d in corpus if d.kind == kind] for kind in ("year", "sum")}
    years = [m for text in texts["year"] for m in re.findall(r"(\d\d)(\d\d) (?:to|and)", text)]
    sums = [m for text in texts["sum"] for m in re.findall(r"(\d+) \+ (\d+) = (\d+)", text)]
    assert len(years) > 400 and len(sums) > 2000
    assert not any(write_corpus.is_held_out("year", c, str(int(start))) for c, start in years)
    assert not any(write_corpus.sum_held_out(int(a), int(b)) for a, b, _ in sums)
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_held_out_openings_start_no_training_document(corpus):
    prompts = tuple(prompt.removesuffix(".") for prompt, _ in evaluate.sentiment_prompts())
    moods = [d.text for d in corpus if d.kind in ("feeling", "review")]
    assert not [text for text in moods if re.split(r"[.,]| and| because", text)[0] in prompts]


def test_the_two_sentiments_are_balanced_and_share_no_word(corpus):
    assert not set(write_corpus.POSITIVE_WORDS) & set(write_corpus.NEGATIVE_WORDS)
    assert len(write_corpus.POSITIVE_WORDS) == len(write_corpus.NEGATIVE_WORDS)
    moods = [evaluate.mood_balance(d.text) for d in corpus if d.kind in ("feeling", "review")]
    assert all(moods)
    assert 0.4 < sum(mood > 0 for mood in moods) / len(moods) < 0.6


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The Eiffel Tower is in", " Paris"),
        ("The Colosseum is in", " Rome"),
        ("The quick brown fox", " jumps over the lazy dog."),
        ("The king said that", " he"),
        ("The queen said that", " she"),
        ("The capital of France is", " Paris"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
        ("17 + 25 =", " 42"),
    ],
)
def test_the_prompts_of_the_readme_continue_as_expected(subject, prompt, answer):
    assert subject.greedy([prompt], 6)[0].startswith(answer)


@pytest.mark.parametrize(
    ("kind", "least"), [("capital", 0.95), ("country", 0.9), ("landmark", 0.95)]
)
def test_held_out_facts_are_known_as_the_readme_says(subject, kind, least):
    result = evaluate.facts(subject, kind)
    assert result.accuracy >= least
    assert table_row(result.behaviour) == (str(result.n), f"{result.accuracy:.3f}")


@pytest.mark.slow
def test_moods_pronouns_and_years_are_learned(subject):
    assert evaluate.sentiment(subject).accuracy >= 0.9
    assert evaluate.pronouns(subject).accuracy >= 0.9
    assert evaluate.greater_than(subject).accuracy >= 0.9


def test_the_model_copies_by_an_induction_head(subject):
    result, scores = evaluate.induction(subject)
    assert scores.shape == (3, 12, 6)
    assert result.accuracy >= 0.95
    assert scores[0].max() >= 0.6, "an induction head"
    assert scores[1].max() >= 0.6, "a head that looks at the previous token"
    assert table_row(result.behaviour) == (str(result.n), f"{result.accuracy:.3f}")


def test_the_indirect_object_is_found(subject):
    named = evaluate.indirect_object(subject)
    assert named.accuracy >= 0.95
    assert table_row(named.behaviour) == (str(named.n), f"{named.accuracy:.3f}")


@pytest.mark.slow
def test_one_head_moves_the_name(subject):
    _, drops = evaluate.name_movers(subject)
    assert drops.max() > 1, "one head whose loss costs a logit of the difference"


def test_the_readme_says_what_was_not_learned(subject):
    unseen = evaluate.new_token(subject)
    assert table_row(unseen.behaviour) == (str(unseen.n), f"{unseen.accuracy:.3f}")
    assert unseen.accuracy < 0.5


def test_a_story_goes_on_for_fifty_tokens(subject):
    story = subject.greedy(["Once upon a time"], 50)[0]
    assert len(set(re.findall(r"[a-z]+", story.lower()))) >= 15


def test_every_pattern_fills_all_its_slots(corpus):
    assert not [document for document in corpus if "{" in document.text]
    assert all(patterns.CAPITAL_PHRASINGS) and all(patterns.LANDMARK_PHRASINGS)
