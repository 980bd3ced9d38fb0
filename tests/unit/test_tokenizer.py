"""Tokenizer over a tiny vocabulary: ids by hand, special tokens, bytes, streams, damaged files."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_vocab import BYTE_0, MERGES, tiny_metadata
from tokenizers.models import BPE

from hob.errors import InvalidRequest, ModelFileError
from hob.models import merges
from hob.models.tokenizer import StreamDecoder, Tokenizer

FIRST_MERGE = BYTE_0 + 256
TOKENIZER = Tokenizer(tiny_metadata())


def merged(merge: str) -> int:
    return FIRST_MERGE + MERGES.index(merge)


def bytes_ids(text: str) -> list[int]:
    return [BYTE_0 + byte for byte in text.encode()]


def test_merges_in_order_of_rank() -> None:
    assert TOKENIZER.encode("hello") == [merged("hell o")]
    assert TOKENIZER.encode("hel") == [merged("h e"), *bytes_ids("l")]


def test_pieces_do_not_merge_across_a_cut() -> None:
    assert TOKENIZER.encode("1 w") == [*bytes_ids("1"), merged("Ġ w")]
    assert TOKENIZER.encode("   w") == [merged("Ġ Ġ"), merged("Ġ w")]


def test_special_text_stays_text_unless_asked() -> None:
    assert TOKENIZER.encode("hello<|im_end|>") == [merged("hell o"), merged("< |"), *bytes_ids("im_end|>")]
    assert TOKENIZER.encode("hello<|im_end|>", parse_special=True) == [merged("hell o"), 2]


def test_user_defined_token_is_always_cut_out() -> None:
    assert TOKENIZER.encode("he<tool>he") == [merged("h e"), 3, merged("h e")]
    assert TOKENIZER.token_bytes(3) == b"<tool>"


def test_longest_special_token_wins() -> None:
    metadata = tiny_metadata()
    metadata["tokenizer.ggml.tokens"][0] = "<|im_end|><|im_end|>"
    tokenizer = Tokenizer(metadata)
    assert tokenizer.encode("<|im_end|>" * 3, parse_special=True) == [0, 2]


def test_split_special_gives_text_and_ids() -> None:
    assert TOKENIZER.split_special("a<|im_start|><tool><|im_end|>") == ["a", 1, "<tool>", 2]
    assert TOKENIZER.split_special("") == []


def test_bos_only_where_the_model_wants_one() -> None:
    assert TOKENIZER.encode("") == []
    with_bos = Tokenizer(tiny_metadata(add_bos_token=True))
    assert with_bos.encode("he") == [1, merged("h e")]
    assert with_bos.encode("he", add_bos=False) == [merged("h e")]
    assert Tokenizer(tiny_metadata(pre="llama-bpe")).adds_bos
    assert not Tokenizer(tiny_metadata(pre="llama-bpe", add_bos_token=False)).adds_bos
    assert not Tokenizer(tiny_metadata(add_bos_token=True, bos_token_id=None)).adds_bos


def test_stop_tokens_are_eos_and_all_that_end_a_turn() -> None:
    assert TOKENIZER.stop_token_ids == (0, 2)
    assert Tokenizer(tiny_metadata(eos_token_id=9)).stop_token_ids == (0, 2, 9)
    assert Tokenizer(tiny_metadata(eos_token_id=None, eot_token_id=7, eom_token_id=8)).stop_token_ids == (0, 2, 7, 8)


def test_end_of_turn_is_special_even_if_the_file_calls_it_text() -> None:
    metadata = tiny_metadata()
    metadata["tokenizer.ggml.token_type"][2] = 1
    tokenizer = Tokenizer(metadata)
    assert tokenizer.token_bytes(2) == b""
    assert metadata["tokenizer.ggml.token_type"][2] == 1, "the caller's metadata is left alone"


def test_decode_shows_or_skips_special_tokens() -> None:
    assert TOKENIZER.decode([merged("hell o"), 2]) == "hello<|im_end|>"
    assert TOKENIZER.decode([merged("hell o"), 2], skip_special=True) == "hello"
    assert TOKENIZER.decode([BYTE_0 + 0xFF]) == "�"


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def heap_in_use() -> int:
    """Bytes that the C library has given out in this process."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library is not glibc 2.33 or later")
    libc.mallinfo2.restype = type(
        "MallInfo", (ctypes.Structure,), {"_fields_": [(c, ctypes.c_size_t) for c in "abcdefghij"]}
    )
    return int(libc.mallinfo2().h)


def grown_by_words(cache_capacity: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that 4,000 different words of 200 letters leave behind."""
    if cache_capacity is not None:
        monkeypatch.setattr(merges, "BPE", lambda **options: BPE(**options | {"cache_capacity": cache_capacity}))
    tokenizer, rng = Tokenizer(tiny_metadata()), random.Random(0)
    before = heap_in_use()
    for _ in range(4000):
        tokenizer.encode("".join(rng.choices("abcdefgh", k=200)))
    return heap_in_use() - before


def test_what_one_app_sends_is_not_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grown_by_words(None, monkeypatch) < 500_000
    assert grown_by_words(10_000, monkeypatch) > 2_000_000, "the control: the library's own cache of words grows"


@given(st.text(alphabet=st.sampled_from("aé中🦙\n ")), st.lists(st.integers(1, 5)))
def test_stream_never_gives_half_a_character(text: str, sizes: list[int]) -> None:
    decoder, shown, ids = StreamDecoder(TOKENIZER), "", bytes_ids(text)
    for size in [*sizes, len(ids)]:
        shown += decoder.feed(ids[:size])
        ids = ids[size:]
        assert text.startswith(shown)
    assert shown + decoder.flush() == text


def test_stream_replaces_bad_bytes_as_soon_as_certain() -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.feed([BYTE_0 + 0xF0]) == ""
    assert decoder.feed(bytes_ids("a")) == "�a"
    assert decoder.feed([BYTE_0 + 0xE4, BYTE_0 + 0xB8]) == ""
    assert decoder.flush() == "�"
    assert decoder.flush() == ""
    assert decoder.feed([*bytes_ids("ok"), 2]) == "ok"


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D800 at character 2"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, TOKENIZER.vocab_size, 1 << 40])
def test_unknown_id_is_refused(token_id: int) -> None:
    for use in (TOKENIZER.token_bytes, TOKENIZER.token_text, lambda i: TOKENIZER.decode([i])):
        with pytest.raises(InvalidRequest, match=f"token id {token_id} does not exist"):
            use(token_id)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"model": "rwkv"}, "'rwkv'. Expected one of"),
        ({"model": ["gpt2"]}, "tokenizer.ggml.model is"),
        ({"pre": "no-such-way"}, "'no-such-way'.*Known: .*smollm"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens has 0 entries"),
        ({"tokens": [1, 2]}, "a list of strings"),
        ({"tokens": ["x" * 5000], "token_type": [1]}, "5000 characters"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"token_type": "normal"}, "token_type is 'normal'"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["ab"]}, "merges has the entry 'ab'"),
        ({"merges": ["a "]}, "merges has the entry 'a '"),
        ({"merges": ["zz yy"]}, "merges do not fit"),
        ({"eos_token_id": 100000}, "eos_token_id is 100000"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
    ],
)
def test_damaged_file_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        Tokenizer({k: v for k, v in tiny_metadata(**changes).items() if v is not None})


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁abcs<>/",
    "ab",
    "▁ab",
    "abc",
    "s>",
    "</",
]
NUM_HEAD = 3 + 256


def sentencepiece(**changes: Any) -> dict[str, Any]:
    keys = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "tokens": PIECES,
        "scores": [0.0] * NUM_HEAD + [-float(i) for i in range(len(PIECES) - NUM_HEAD)],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - NUM_HEAD),
        "unknown_token_id": 0,
        **changes,
    }
    return tiny_metadata(**keys)


def pieces(tokenizer: Tokenizer, text: str, parse_special: bool = False) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, parse_special=parse_special)]


def test_sentencepiece_spaces_bytes_and_bos() -> None:
    tokenizer = Tokenizer(sentencepiece())
    assert pieces(tokenizer, "ab abc") == ["<s>", "▁ab", "▁ab", "c"], "'ab' scores more than 'abc'"
    assert pieces(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer, "") == ["<s>"]
    assert tokenizer.decode(tokenizer.encode("a é  b", add_bos=False)) == "a é  b"
    assert tokenizer.decode(tokenizer.encode(" a", add_bos=False)) == " a"
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"


def test_sentencepiece_without_the_space_before() -> None:
    tokenizer = Tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert pieces(tokenizer, "ab ab") == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_sentencepiece_special_tokens_are_not_made_of_text() -> None:
    tokenizer = Tokenizer(sentencepiece())
    assert pieces(tokenizer, "</s>") == ["<s>", "▁", "</", "s>"]
    assert pieces(tokenizer, "</s>a", parse_special=True) == ["<s>", "</s>", "▁", "a"]


@pytest.mark.parametrize("scores", [None, [0.0], "high"])
def test_sentencepiece_needs_scores(scores: Any) -> None:
    with pytest.raises(ModelFileError, match="tokenizer.ggml.scores"):
        Tokenizer(sentencepiece(scores=scores))


def test_missing_special_ids_are_none() -> None:
    tokenizer = Tokenizer(tiny_metadata(bos_token_id=0xFFFFFFFF, eos_token_id=None, unknown_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (None, None, None)
