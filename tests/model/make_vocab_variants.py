"""Write vocabulary-only GGUF files for make_tokenizer_golden.py: `cut_vocabulary.py` under each pre-tokenizer name.

    .venv/bin/python -m tests.model.make_vocab_variants FOLDER

Prints the arguments for make_tokenizer_golden.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf

from hob.models.pretokenizers import PRE_TOKENIZERS
from tests.model.cut_vocabulary import cut_metadata, score_metadata


def write(path: Path, metadata: dict[str, Any]) -> None:
    """One file of metadata alone."""
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(keys["model"])
    writer.add_tokenizer_pre(keys.get("pre", "default"))
    writer.add_token_list(keys["tokens"])
    writer.add_token_types(keys["token_type"])
    if "merges" in keys:
        writer.add_token_merges(keys["merges"])
    else:
        writer.add_token_scores(keys["scores"])
        writer.add_unk_token_id(keys["unknown_token_id"])
    writer.add_bos_token_id(keys["bos_token_id"])
    writer.add_eos_token_id(keys["eos_token_id"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file per name, and one of SentencePiece."""
    folder = Path(sys.argv[1])
    variants = {name: cut_metadata(name) for name in PRE_TOKENIZERS} | {"sentencepiece": score_metadata()}
    for name, metadata in variants.items():
        write(folder / f"{name}.gguf", metadata)
        print(f"{name}={folder / name}.gguf")


if __name__ == "__main__":
    main()
