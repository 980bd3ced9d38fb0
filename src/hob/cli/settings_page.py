"""docs/settings.md, made from config.py: names, defaults, and the sentence under each field."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, fields

from hob import config

HEAD = """# Settings

Made by `hob config --markdown` from src/hob/config.py; a test keeps them equal. A flag beats an environment variable
beats `hob.toml` (`$XDG_CONFIG_HOME/hob/hob.toml`, or the file that `HOB_CONFIG` names) beats the default.
`hob config` prints each value with its origin.
"""


def settings_page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    texts = _field_texts()
    for section in fields(config.Config):
        component = type(getattr(config.Config(), section.name))
        parts.append(f"\n## [{section.name}]\n\n{inspect.getdoc(component)}\n")
        parts.append("| setting | environment | default | meaning |\n|---|---|---|---|")
        for setting in fields(component):
            default = "(see text)" if setting.default is MISSING else _shown(setting.default)
            if setting.name == "home":
                default = "`$XDG_DATA_HOME/hob`, `~/.local/share/hob`"
            text = texts.get((component.__name__, setting.name), "")
            parts.append(f"| `{setting.name}` | `HOB_{setting.name.upper()}` | {default} | {text} |")
    return "\n".join(parts) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _field_texts() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring under the field."""
    found = {}
    for cls in ast.parse(inspect.getsource(config)).body:
        if isinstance(cls, ast.ClassDef):
            for field, text in zip(cls.body, cls.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    assert isinstance(text.value, ast.Constant)
                    found[cls.name, field.target.id] = " ".join(str(text.value.value).split()).replace("|", "\\|")
    return found
