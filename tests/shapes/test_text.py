from __future__ import annotations

import pytest
from transformers import CLIPTokenizer

from sqdf_fast.shapes import ALL_PROMPTS, pipeline_folder
from sqdf_fast.shapes.build.text import MAX_TOKENS, UNKNOWN, make_tokenizer
from sqdf_fast.shapes.prompts import WORDS


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")


def test_every_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for prompt in ALL_PROMPTS:
        assert tokenizer.tokenize(prompt) == [word + "</w>" for word in prompt.split()]
    assert len({tokenizer.convert_tokens_to_ids(word + "</w>") for word in WORDS}) == len(WORDS)


def test_a_prompt_is_framed_and_padded(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a red star", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    words = tokenizer.convert_tokens_to_ids(["a</w>", "red</w>", "star</w>"])
    assert tokenizer.model_max_length == MAX_TOKENS == 8
    assert ids == [tokenizer.bos_token_id, *words, *[tokenizer.eos_token_id] * 4]


def test_an_unknown_word_leaves_the_others_whole(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer.tokenize("a zzz star")
    assert tokens == ["a</w>", UNKNOWN, UNKNOWN, UNKNOWN, "star</w>"]
    assert tokenizer.convert_tokens_to_ids(UNKNOWN) == tokenizer.unk_token_id not in tokenizer("a red star").input_ids


def test_the_shipped_tokenizer_is_the_one_the_command_makes(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
