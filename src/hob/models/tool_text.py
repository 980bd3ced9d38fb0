"""Tools for models whose chat template knows none: what they may call, as text of the conversation.

    tools           a paragraph at the end of the system message, their JSON between <tools> and </tools>
    a call          <tool_call>[{"name": ..., "arguments": {...}}]</tool_call> in the assistant's message
    its result      <tool_response>...</tool_response> in the user's

These tags are what SmolLM2, Qwen and the Hermes models were taught. Templates that know tools write them themselves.
"""

from __future__ import annotations

import json
from typing import Any

_PROMPT = """You may call these functions:
<tools>{tools}</tools>
To call some, answer with a JSON list between tool_call tags and nothing else:
<tool_call>[{{"name": "function", "arguments": {{"argument": "value"}}}}]</tool_call>
If none helps, answer in words."""

Message = dict[str, Any]


def knows_tools(template: str) -> bool:
    """Whether a chat template says anything about tools."""
    return "tools" in template


def fold_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """Messages that say with text alone what the tools are, what was called and what came back."""
    folded = [_fold(message) for message in messages]
    if not tools:
        return folded
    described = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    prompt = _PROMPT.format(tools=described)
    if folded[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *folded]
    return [{**folded[0], "content": f"{folded[0]['content']}\n\n{prompt}"}, *folded[1:]]


def _fold(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
    text = message.get("content") or ""
    return {"role": message["role"], "content": f"{text}<tool_call>{calls}</tool_call>"}
