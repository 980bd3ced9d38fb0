"""Text to token ids and back, as a GGUF file's metadata says: ids equal llama.cpp's for the same file.

    text --cut at special tokens--> pieces --merges (`tokenizers`)--> ids
    ids --bytes of each token--> bytes --UTF-8, whole characters only--> text

Special tokens are cut out here and not by the library: whether a text may contain them is a question of each call
(a chat template may, what a user typed may not), and the library's answer is a switch shared by all threads.
This module knows nothing of models, requests or chat templates.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hob.errors import InvalidRequest, ModelFileError
from hob.models.merges import MERGE_MODELS
from hob.models.vocabulary import TokenType, Vocabulary, read_vocabulary

_NOT_TEXT = (TokenType.CONTROL, TokenType.UNKNOWN)


class Tokenizer:
    """One vocabulary. It never changes, so it is safe to use from several threads."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Build from GGUF metadata (`GgufFile.metadata`). Takes about 0.15 s for 49k tokens.

        Raises ModelFileError if the file has no tokenizer, one of an unknown kind, or a damaged one.
        """
        self.vocabulary: Vocabulary = read_vocabulary(metadata)
        kind = metadata.get("tokenizer.ggml.model")
        if not isinstance(kind, str) or kind not in MERGE_MODELS:
            raise ModelFileError(
                f"tokenizer.ggml.model is {kind!r:.40}. Expected one of: {', '.join(sorted(MERGE_MODELS))}. "
                "Take another model (`hob list`)."
            )
        self._merges = MERGE_MODELS[kind](self.vocabulary, metadata)
        self.adds_bos = self._merges.add_bos and self.vocabulary.bos_id is not None
        self._special = set(self.vocabulary.ids_of(*_NOT_TEXT))
        user_defined = self.vocabulary.ids_of(TokenType.USER_DEFINED)
        self._verbatim = self._special.union(user_defined)
        self._cut_always = _cutter(self.vocabulary, user_defined)
        self._cut_special = _cutter(self.vocabulary, self._verbatim)
        self._cut_control = _cutter(self.vocabulary, self._special)
        self._cut_ids = {self.vocabulary.tokens[i]: i for i in sorted(self._verbatim)}
        self._known_bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """V: ids are below it."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """Begins a text."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""
        return self.vocabulary.eos_id

    @property
    def eot_id(self) -> int | None:
        """Ends a turn, where the file names one apart from `eos_id`."""
        return self.vocabulary.eot_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: EOS and all that end a turn, ascending."""
        return self.vocabulary.stop_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: control tokens and the unknown token."""
        return frozenset(self._special)

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text.

        `add_bos`: begin with the BOS token, if the model wants one (`adds_bos`). `parse_special`: text such as
        '<|im_end|>' becomes that token; leave it off for text that others wrote. Raises InvalidRequest if the text
        has no UTF-8 form (a lone surrogate).
        """
        _check_encodable(text)
        ids = [self.vocabulary.bos_id] if add_bos and self.adds_bos and self.vocabulary.bos_id is not None else []
        cut = self._cut_special if parse_special else self._cut_always
        if cut is None:
            return ids + self._merges.encode(text, after_special=True) if text else ids
        after_special = True
        for i, piece in enumerate(cut.split(text)):
            if i % 2:  # `split` gives text and token by turns
                ids.append(self._cut_ids[piece])
                after_special = True
            elif piece:
                ids += self._merges.encode(piece, after_special=after_special)
                after_special = False
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Text cut at its special tokens: ids of these, and the non-empty texts between."""
        if self._cut_control is None:
            return [text] if text else []
        parts = self._cut_control.split(text)
        return [self._cut_ids[part] if i % 2 else part for i, part in enumerate(parts) if part]

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it. Raises InvalidRequest if there is no such token."""
        self._check_id(token_id)
        return self.vocabulary.tokens[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, not necessarily whole characters. Empty for special tokens.

        Raises InvalidRequest if there is no such token. Remembered once computed: every streamed token asks.
        """
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        if token_id in self._special:
            return b""
        text = self.vocabulary.tokens[token_id]
        if token_id in self._verbatim:
            return text.encode()
        return self._merges.token_bytes(text, self.vocabulary.types[token_id])

    def decode(self, token_ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD. Raises InvalidRequest for an unknown id."""
        parts = []
        for token_id in token_ids:
            raw = self.token_bytes(token_id)
            parts.append(raw if raw or skip_special else self.vocabulary.tokens[token_id].encode())
        text = b"".join(parts).decode("utf-8", "replace")
        return text[1:] if self._merges.add_space_prefix and text.startswith(" ") else text

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequest(f"token id {token_id} does not exist. Expected 0 to {self.vocab_size - 1}.")


class StreamDecoder:
    """Text of one reply, token by token. Never gives half a character: its bytes wait for the rest.

    Bytes that can be no UTF-8 become U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take in ids; give the text that is now whole. Special tokens give none."""
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """At the end: U+FFFD if a character was left unfinished, else nothing. The decoder can then be used anew."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def _cutter(vocabulary: Vocabulary, token_ids: Iterable[int]) -> re.Pattern[str] | None:
    """A pattern that finds these tokens in text, the longest where several begin at one place. None: no tokens."""
    texts = {vocabulary.tokens[i] for i in token_ids} - {""}
    if not texts:
        return None
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) + ")")


def _check_encodable(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(error.object[error.start]):04X}"
        raise InvalidRequest(
            f"text has the lone surrogate {code} at character {error.start}. Expected valid Unicode."
        ) from None
