"""OpenAI's four forms of a prompt or input: a text, a list of texts, token ids, a list of lists of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hob.api.body import show
from hob.errors import InvalidRequest

MAX_INPUTS = 2048


def token_lists(
    value: str | list[Any], encode: Callable[[str], list[int]], *, vocab_size: int, param: str
) -> list[list[int]]:
    """Token ids of each input. Raises InvalidRequest naming the element at fault."""
    if isinstance(value, str):
        return [_encoded(value, encode, param)]
    if not value:
        raise InvalidRequest(f"field '{param}' is empty. Expected at least one text or token id.", param=param)
    if len(value) > MAX_INPUTS and not _is_id(value[0]):
        raise InvalidRequest(f"field '{param}' has {len(value):,} inputs. Expected at most {MAX_INPUTS}.", param=param)
    if _is_id(value[0]):
        return [_checked(value, vocab_size, param)]
    return [_one(item, encode, vocab_size, f"{param}[{i}]") for i, item in enumerate(value)]


def _one(item: Any, encode: Callable[[str], list[int]], vocab_size: int, param: str) -> list[int]:
    if isinstance(item, str):
        return _encoded(item, encode, param)
    if isinstance(item, list) and item:
        return _checked(item, vocab_size, param)
    raise InvalidRequest(f"field '{param}' is {show(item)}. Expected a text or a list of token ids.", param=param)


def _encoded(text: str, encode: Callable[[str], list[int]], param: str) -> list[int]:
    token_ids = encode(text)
    if not token_ids:
        raise InvalidRequest(f"field '{param}' is an empty text. Expected at least one token.", param=param)
    return token_ids


def _checked(token_ids: list[Any], vocab_size: int, param: str) -> list[int]:
    for i, token_id in enumerate(token_ids):
        if not _is_id(token_id) or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"field '{param}[{i}]' is {show(token_id)}. Expected a token id from 0 to {vocab_size - 1}.",
                param=f"{param}[{i}]",
            )
    return token_ids


def _is_id(value: Any) -> bool:
    return type(value) is int
