"""The tokenizer: round trips, fixed tokens, and sameness."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoding import BOS, EOS, SPECIAL_TOKENS, boilerplate, encode_messages
from model.tokenizer import Tokenizer

TEXTS = [f"Ada has {a} coins and finds {b}. {a}+{b}={a + b}. The answer is \\boxed{{{a + b}}}." for a in range(30) for b in range(10)]
SCHEMA = '{"name": "find", "parameters": {}}'
SYSTEM = {"role": "system", "content": "Shop.", "tools": [{"name": "find", "parameters": {}}]}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400, boilerplate=[SCHEMA])


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.lists(st.sampled_from([*SPECIAL_TOKENS, "é", " 12"])).map("".join)
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


def test_special_tokens_are_single_and_first(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (0, 1) == (tokenizer.token_id(BOS), tokenizer.token_id(EOS))
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[id] for id in range(len(SPECIAL_TOKENS))]


def test_boilerplate_is_one_token_each(tokenizer):
    text = encode_messages([SYSTEM, {"role": "user", "content": "x"}], "thinking")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.encode(piece) == [tokenizer.token_id(piece)] for piece in [*boilerplate(), SCHEMA])
    assert len(ids) < 20


def test_numbers_are_cut_in_groups_of_three_and_do_not_merge_with_what_stands_before():
    numbers = Tokenizer.train([f"item {n} costs {n}; " for n in range(100, 999)] * 3, 1600)
    assert len(numbers.encode("123456")) == 2 and len(numbers.encode("1234")) == 2
    assert numbers.encode("x 123")[-1:] == numbers.encode("123")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest() == tokenizer.digest()
    assert loaded.encode(TEXTS[7]) == tokenizer.encode(TEXTS[7])
    assert loaded.vocab_size == tokenizer.vocab_size <= 400


def test_training_is_deterministic_and_the_digest_tells_others_apart(tokenizer):
    assert Tokenizer.train(TEXTS, 400, boilerplate=[SCHEMA]).digest() == tokenizer.digest()
    assert Tokenizer.train(TEXTS[:50], 305, boilerplate=[SCHEMA]).digest() != tokenizer.digest()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        Tokenizer.train(TEXTS, 100)


def test_a_missing_token_is_named(tokenizer):
    with pytest.raises(ValueError, match="nope"):
        tokenizer.token_id("nope")


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("€")
    assert "\ufffd" in tokenizer.decode(ids[:1])
