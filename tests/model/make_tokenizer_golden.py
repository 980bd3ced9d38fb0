"""Ask llama.cpp for the ids of the paragraphs and write tokenizer_golden.json.

    PEER/bin/python tests/model/make_tokenizer_golden.py MODEL.gguf [PRE=VOCAB.gguf ...]

PEER has llama-cpp-python. MODEL is the default model; each VOCAB is a file of `make_vocab_variants.py`. For
MODEL, ids of each paragraph are kept as 8 bytes of SHA-256, so a test can name the paragraph that differs; for the
variants, one hash over all.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import llama_cpp
from paragraphs import NUM_PARAGRAPHS, SEED, make_paragraphs

HERE = Path(__file__).parent


def ids_of(model: llama_cpp.Llama, text: str, parse_special: bool) -> list[int]:
    """llama.cpp's ids."""
    return model.tokenize(text.encode(), add_bos=False, special=parse_special)


def digest(ids: list[int]) -> str:
    """8 bytes of SHA-256 over the ids in decimal."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def main() -> None:
    """Write the file."""
    texts = [text for _, text in make_paragraphs()]
    assert len(texts) == NUM_PARAGRAPHS, len(texts)
    model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    golden = {
        "llama_cpp": llama_cpp.__version__,
        "seed": SEED,
        "num_tokens": sum(len(ids_of(model, text, False)) for text in texts),
        "plain": "".join(digest(ids_of(model, text, False)) for text in texts),
        "parse_special": "".join(digest(ids_of(model, text, True)) for text in texts),
        "variants": {},
    }
    for argument in sys.argv[2:]:
        name, _, path = argument.partition("=")
        variant = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        golden["variants"][name] = digest([i for text in texts for i in [*ids_of(variant, text, False), -1]])
    (HERE / "tokenizer_golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
