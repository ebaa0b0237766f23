"""The documentation names what exists: links, files, tasks, commands, figures.

`make docs` checks links between the pages of the site; here is what it cannot see.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serve.cli.main import COMMANDS, RENAMED

ROOT = Path(__file__).parents[2]
TOP = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Pages about the present; decisions and measurements keep the names of their day.
CURRENT = [
    *TOP[:3],
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "your-own-model.md",
    *sorted((ROOT / "docs" / "architecture").glob("*.md")),
]
FOLDERS = ("serve", "handlers", "tools", "tests", "docs", "docker", "k8s")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Code spans and the commands of console blocks."""
    spans = re.findall(r"`([^`\n]+)`", prose(text))
    lines = [line[2:] for block in fenced(text, "console") for line in block.splitlines() if line[:2] == "$ "]
    return spans + lines


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=name_of)
def test_relative_links_lead_to_files_and_headings(page):
    text = page.read_text()
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_files_exist(page):
    for span in code(page.read_text()):
        for word in re.findall(r"[\w./-]+", span):
            if word.split("/")[0] in FOLDERS and "/" in word and not re.search(r"/[A-Z]{2,}\b", word):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_make_tasks_exist(page):
    tasks = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for span in code(page.read_text()):
        for words in re.findall(r"\bmake((?: [a-z][a-z0-9-]*)+)", span):
            assert set(words.split()) <= tasks, span


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_commands_exist(page):
    for span in code(page.read_text()):
        for name in re.findall(r"\b(?:mmdet3d-serve|python -m serve) ([a-z][a-z0-9-]*)", span):
            assert name in COMMANDS and name not in RENAMED, span
        for package, name in re.findall(r"python -m (tools(?:\.\w+)*)(?: ([a-z][a-z0-9-]*))?", span):
            assert importlib.util.find_spec(package), span
            if name:
                listed = importlib.import_module(f"{package}.__main__").COMMANDS
                assert name in listed, span


def test_the_chinese_readme_has_the_same_commands_links_and_figures():
    english, chinese = (path.read_text() for path in TOP[:2])
    for language in ("console", "json"):
        bare = [
            [re.sub(r"\s+#.*", "", block) for block in fenced(text, language)] for text in (english, chinese)
        ]
        assert bare[0] == bare[1]
    apart = {"README.md", "README.zh-CN.md"}
    assert set(links(english)) - apart == set(links(chinese)) - apart
    assert figures(english) == figures(chinese)


def test_the_chinese_page_of_the_life_has_the_same_commands_links_and_output():
    english, chinese = ((ROOT / "docs" / name).read_text() for name in ("lifecycle.md", "lifecycle.zh-CN.md"))
    for language in ("console", "text"):
        assert fenced(english, language) == fenced(chinese, language)
    apart = {"lifecycle.md", "lifecycle.zh-CN.md"}
    assert set(links(english)) - apart == set(links(chinese)) - apart


def figures(readme: str) -> list[str]:
    """Numbers in the first column of the table of figures, in order of size."""
    rows = re.findall(r"^\| (.*?) \| .*(?:`|same|同上) \|$", readme, re.MULTILINE)
    assert len(rows) == 3
    return sorted(re.findall(r"\d[\d.]*(?:e-\d+)?", " ".join(rows)))


def test_the_figures_of_the_readme_are_on_the_pages_it_names():
    pages = [ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks" / "serving.md"]
    measured = "\n".join(page.read_text() for page in pages)
    for figure in figures(TOP[0].read_text()):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured), figure


@pytest.mark.parametrize("page", TOP[:2], ids=name_of)
def test_a_readme_stays_short(page):
    assert len(page.read_bytes()) <= 6_000


def test_changelog_lines_stay_short():
    assert [line for line in TOP[3].read_text().splitlines() if len(line) > 100] == []


class _AnyTag(yaml.SafeLoader):
    """mkdocs.yml names Python functions by tags."""


_AnyTag.add_multi_constructor("", lambda loader, suffix, node: None)


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    listed = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _AnyTag)["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def test_the_workflow_calls_tasks_that_exist_and_fits_its_schema():
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    tasks = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    assert set(re.findall(r"run: make (.*)", workflow.read_text())) <= tasks
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    checked = subprocess.run([*command, str(workflow)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_every_module_is_on_an_architecture_page_or_in_a_folder_that_is():
    named = {
        word.rstrip("/")
        for page in (ROOT / "docs" / "architecture").glob("*.md")
        for span in code(page.read_text())
        for word in re.findall(r"[\w./-]+", span)
    }
    for path in (*(ROOT / "serve").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")):
        places = [path, *path.parents]
        described = any(name_of(place) in named for place in places if place.is_relative_to(ROOT))
        assert described or path.name in ("__init__.py", "__main__.py"), name_of(path)
