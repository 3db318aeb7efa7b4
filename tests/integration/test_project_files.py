"""Version, citation and issue forms agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import loraplus_hydra

ROOT = Path(__file__).resolve().parents[2]
PAPER = "2402.12354"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(
        r"^## (\S+), (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert project["version"] == loraplus_hydra.__version__ == citation["version"] == newest[1]
    assert citation["date-released"] == newest[2]
    assert citation["license"] == project["license"]


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Hayou", "Ghosh", "Yu"]
    assert paper["url"].endswith(PAPER)
    assert PAPER in (ROOT / "README.md").read_text(encoding="utf-8")


def test_issue_forms_ask_for_something() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "question"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.stem == "config":
            continue
        fields = [field for field in content["body"] if field["type"] != "markdown"]
        ids = [field["id"] for field in fields]
        assert len(ids) == len(set(ids))
        assert any(field["validations"]["required"] for field in fields if "validations" in field)
