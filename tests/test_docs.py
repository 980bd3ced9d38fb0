"""The documents say what the program does: commands, settings, endpoints, files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from hob.api.app import GETS, POSTS
from hob.cli.main import app
from hob.cli.settings_page import settings_page
from hob.config import Config
from hob.service.policy import read_policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = {str(command.name) for command in app.registered_commands} | {
    str(group.typer_instance.info.name) for group in app.registered_groups if group.typer_instance
}


def test_the_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"\bhob ([a-z]+)\b", re.sub(r"git clone.*", "", README)))
    assert named - {"and"} == COMMANDS


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_settings_page_is_what_the_program_prints() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == settings_page(), "run: hob config --markdown > docs/settings.md"


def test_the_settings_page_explains_every_setting() -> None:
    page = settings_page()
    for section in fields(Config):
        for setting in fields(getattr(Config(), section.name)):
            row = next(line for line in page.splitlines() if line.startswith(f"| `{setting.name}` |"))
            assert len(row.split("|")[4].strip()) > 10, f"'{setting.name}' needs a sentence in config.py"


@pytest.mark.parametrize("path", sorted([*GETS, *POSTS]))
def test_the_readme_names_every_endpoint(path: str) -> None:
    assert f"`{path}`" in README


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def test_every_test_that_the_security_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_the_policy_pages_example_is_right(tmp_path: Path) -> None:
    example = (ROOT / "docs" / "policy.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "policy.toml").write_text(example)
    assert len(read_policy(tmp_path / "policy.toml").app) == 2


def test_the_architecture_has_eight_steps_and_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    steps = re.findall(r"^(\d)\. \*\*", text, re.MULTILINE)
    assert steps == list("12345678")
    for package in (path.parent.name for path in (ROOT / "src" / "hob").glob("*/__init__.py")):
        assert f"{package}/" in text, package


def test_the_batch_example_has_ten_lines() -> None:
    lines = (ROOT / "examples" / "batch.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
