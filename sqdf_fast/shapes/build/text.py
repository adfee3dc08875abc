"""The word-level tokenizer and the small text encoder, both of CLIP's classes."""

from __future__ import annotations

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sqdf_fast.shapes.prompts import WORDS

MAX_TOKENS = 8
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def make_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer that keeps every word of the grammar whole.

    Each word is merged from its end towards its beginning, so a merge can only happen at the end of a word and no
    merge of one word can split another. Letters outside the words become the unknown token.
    """
    vocabulary = {START: 0, END: 1, UNKNOWN: 2}
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        ending = word[-1] + "</w>"
        vocabulary.setdefault(ending, len(vocabulary))
        for letter in reversed(word[:-1]):
            merges[letter, ending] = None
            ending = letter + ending
            vocabulary.setdefault(letter, len(vocabulary))
            vocabulary.setdefault(ending, len(vocabulary))
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def make_text_encoder(tokenizer: CLIPTokenizer, width: int = 96, layers: int = 2) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
