"""How BPE text is cut into pieces before merging: one entry for each name that `tokenizer.ggml.pre` may have.

A piece never merges with its neighbour, so a wrong cut gives other ids than the model was trained on, and no error.
Each pattern cuts every piece of the one before it into what it matches and what lies between. The patterns are facts
of the models (their tokenizer.json); the names are llama.cpp's. tests/model/test_pretokenizers.py holds every entry
against it; only of `_cased_words` it has an approximation, and there ours is the models' own.
Nothing here knows vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hob.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a family of models cuts text, and what it takes for granted beside."""

    patterns: tuple[str, ...]
    """Regular expressions (Oniguruma, Unicode), applied one after the other."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Texts begin with the BOS token where the file does not say."""


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_CONTRACTIONS_ANY_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES

_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_ONE_DIGIT = r"\p{N}"
_THREE_DIGITS = r"\p{N}{1,3}"


def _words(digits: str, letters: str = r"\p{L}") -> str:
    """GPT-4's cut: a word takes one sign before it along, a run of signs the line ends after it."""
    marks = "" if letters == r"\p{L}" else r"\p{M}"
    word = letters if not marks else f"[{letters}{marks}]"
    return (
        rf"{_CONTRACTIONS_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?{word}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_LINES}"
    )


def _cased_words(digits: str, contractions: str) -> str:
    """GPT-4o's cut: a word also ends where small letters are followed by a capital."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
    )


_GPT2_LIKE = PreTokenizer((_GPT2,))
_DIGITS_APART = PreTokenizer((_ONE_DIGIT, _GPT2))
_LLAMA3 = PreTokenizer((_words(_THREE_DIGITS),))
_QWEN2 = PreTokenizer((_words(_ONE_DIGIT),))
_PUNCTUATION_APART = r"[\p{P}\$\+<=>\^~\|]+"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION_APART, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_LIKE,
    "mpt": _GPT2_LIKE,
    "olmo": _GPT2_LIKE,
    "phi-2": _GPT2_LIKE,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "codeshell": _DIGITS_APART,
    "exaone": _DIGITS_APART,
    "minerva-7b": _DIGITS_APART,
    "llama-bpe": replace(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": replace(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": replace(_LLAMA3, ignore_merges=True, add_bos=True),
    "falcon3": replace(_LLAMA3, ignore_merges=True, add_bos=True),
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "hunyuan": _QWEN2,
    "qwen35": PreTokenizer((_words(_ONE_DIGIT, r"\p{L}\p{M}"),)),
    "tekken": PreTokenizer((_cased_words(_ONE_DIGIT, ""),), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_cased_words(_THREE_DIGITS, f"{_CONTRACTIONS_ANY_CASE}?"),)),
    "llama4": PreTokenizer((_cased_words(_THREE_DIGITS, f"{_CONTRACTIONS_ANY_CASE}?"),)),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The cut of that name. Raises ModelFileError listing the known ones: a guess would give wrong ids in silence."""
    if name not in PRE_TOKENIZERS:
        raise ModelFileError(
            f"tokenizer.ggml.pre is '{name[:80]}', a way of cutting text that Hob does not know. "
            f"Known: {', '.join(sorted(PRE_TOKENIZERS))}. Take another model (`hob list`)."
        )
    return PRE_TOKENIZERS[name]
