"""A conversation to token ids, by the chat template that the model file carries.

    messages --check, join parts--> --escape--> --template--> text --cut at special tokens, restore--> ids

`escape.py` says why a message cannot smuggle in a special token and why ordinary ids do not change for it.
This module knows no HTTP.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from hob.errors import InvalidRequest, ModelFileError
from hob.models.chat_template import CHATML, ChatTemplate
from hob.models.escape import Escaper, Stand
from hob.models.tokenizer import Tokenizer
from hob.models.tool_text import fold_tools, knows_tools

log = logging.getLogger(__name__)

TEMPLATE_KEY = "tokenizer.chat_template"
MAX_MESSAGES = 4096
MAX_TEMPLATE_CHARS = 1 << 20
_MARK = "\U000f0000"
"""Stands for a message's text; of private use, so that no template has it."""
_ROLE = re.compile("[a-z][a-z_]{0,31}")

Message = dict[str, Any]
"""`role`, `content` (text or OpenAI content parts), and what else a template reads."""


def render_chat(
    template: str,
    messages: list[Message],
    *,
    add_generation_prompt: bool = True,
    tools: list[dict[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The text of a conversation, as Hugging Face's apply_chat_template gives it. Raises InvalidRequest."""
    variables = _variables(check_messages(messages), tools, add_generation_prompt, bos_token, eos_token)
    return ChatTemplate(template).render(variables)


def check_messages(messages: list[Message]) -> list[Message]:
    """Messages with content parts joined to text. Raises InvalidRequest naming the message and the field at fault."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages)} messages. Expected 1 to {MAX_MESSAGES}.", param="messages")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_template(metadata: Mapping[str, Any]) -> str:
    """The template in a file's metadata; without one ChatML, logged. Raises ModelFileError if it is no text."""
    source = metadata.get(TEMPLATE_KEY)
    if source is None:
        log.warning("the model file has no chat template (%s): ChatML is used", TEMPLATE_KEY)
        return CHATML
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
        what = f"{len(source)} characters long" if isinstance(source, str) else f"{source!r:.40}"
        raise ModelFileError(f"{TEMPLATE_KEY} is {what}. Expected text of at most {MAX_TEMPLATE_CHARS} characters.")
    return source


class ChatEncoder:
    """One model's template and tokenizer. Safe to use from several threads."""

    def __init__(self, template: str | None, tokenizer: Tokenizer) -> None:
        """`template`: Jinja2 source; None: ChatML.

        A template that does not parse is logged here and refused in `encode`: the model can still complete text.
        """
        self._tokenizer = tokenizer
        self._escaper = Escaper(tokenizer.token_text(i) for i in tokenizer.special_ids)
        self._template: ChatTemplate | None = None
        self._knows_tools = template is not None and knows_tools(template)
        self._fault = ""
        try:
            self._template = ChatTemplate(CHATML if template is None else template)
        except InvalidRequest as error:
            self._fault = error.message
            log.warning("%s", error.message)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatEncoder:
        """With the template of a GGUF file. Raises ModelFileError."""
        return cls(read_template(metadata), tokenizer)

    def encode(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation, ready for the assistant's turn unless `add_generation_prompt` is off.

        Raises InvalidRequest: the messages are malformed, or the template refuses them, runs away or does not parse.
        """
        if self._template is None:
            raise InvalidRequest(self._fault)
        if not self._knows_tools:
            messages, tools = fold_tools(check_messages(messages), tools), None
        tokenizer, fixed = self._tokenizer, self._fixed
        (escaped, escaped_tools), stand = self._escape(check_messages(messages), tools)
        text = self._render(self._template, escaped, escaped_tools, add_generation_prompt)
        ids: list[int] = []
        for part in tokenizer.split_special(text):
            if isinstance(part, int):
                ids.append(part)
            elif part in fixed:
                ids += fixed[part]
            else:
                ids += tokenizer.encode(stand.restore(part), add_bos=False)
        # Some templates write the BOS token themselves, some leave it to the tokenizer.
        if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _render(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        tokenizer = self._tokenizer
        bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
        eos = "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id)
        return template.render(_variables(messages, tools, add_generation_prompt, bos, eos))

    @cached_property
    def _fixed(self) -> dict[str, list[int]]:
        """Ids of the texts that the template puts around every message. Nothing that anyone wrote is remembered."""
        assert self._template is not None
        try:
            text = self._render(self._template, [{"role": "user", "content": _MARK}])
        except InvalidRequest:  # it wants more than that
            return {}
        parts = [part for part in self._tokenizer.split_special(text) if isinstance(part, str) and _MARK not in part]
        return {part: self._tokenizer.encode(part, add_bos=False) for part in parts}

    def _escape(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[list[Any], Stand]:
        """Messages and tools without special tokens in them. Roles stay: templates build tokens of them."""
        without_roles = [{key: value for key, value in message.items() if key != "role"} for message in messages]
        (escaped, escaped_tools), stand = self._escaper.escape([without_roles, tools])
        with_roles = [{"role": old["role"], **new} for old, new in zip(messages, escaped, strict=True)]
        return [with_roles, escaped_tools], stand


def _variables(
    messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool, bos: str, eos: str
) -> dict[str, Any]:
    """What Hugging Face's templates are given."""
    return {
        "messages": messages,
        "tools": tools or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos,
        "eos_token": eos,
    }


def _check_message(message: Message, where: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequest(
            f"field '{where}.role' is {role!r:.40}. Expected system, user, assistant or tool.", param=f"{where}.role"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message
    return {**message, "content": _text(content, f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A content's text; parts are joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"field '{where}' is {content!r:.40}. Expected text or a list of text parts.", param=where)
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise InvalidRequest(
            f"field '{where}.type' is {kind!r:.40}. Expected 'text': the model reads text only.", param=where
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"field '{where}.text' is {part.get('text')!r:.40}. Expected text.", param=f"{where}.text")
    text: str = part["text"]
    return text
