"""Word-level tokenizers: each word of the captions is one token, in the ordinary vocabularies of CLIP and T5."""

from __future__ import annotations

import itertools
from collections import Counter

from transformers import CLIPTokenizer, T5Tokenizer

from ..scenes import MAX_TOKENS, vocabulary

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
Word = tuple[str, ...]


def _join(word: Word, pair: tuple[str, str]) -> Word:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until each word is a single symbol."""
    pieces: list[Word] = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges = []
    while any(len(piece) > 1 for piece in pieces):
        pairs = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        pair = max(sorted(pairs), key=lambda p: pairs[p])
        merges.append(pair)
        pieces = [_join(piece, pair) for piece in pieces]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of both the flow model's text encoders and the reward model; `END` has the highest id."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = _merges(vocabulary())
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    symbols += [token for token in dict.fromkeys("".join(pair) for pair in merges) if token not in symbols]
    vocab = {token: number for number, token in enumerate([*symbols, BEGIN, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_t5_tokenizer() -> T5Tokenizer:
    """The tokenizer of a FLUX pipeline's second text encoder."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("\u2581" + word, -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=[*special, *words], extra_ids=0, model_max_length=MAX_TOKENS)
