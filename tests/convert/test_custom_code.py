"""The user's own modules: which files are packed, and which notes name those that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import ops
from serve.convert.custom_code import add_named_modules, collect_custom_code
from serve.errors import ArchiveError

ops.install()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the module search path, whose modules are forgotten afterwards."""
    folder = tmp_path / "code_of_mine"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def packed(*modules: str) -> list[str]:
    return sorted(collect_custom_code({"custom_imports": {"imports": list(modules)}}).files)


def test_a_package_is_packed_with_its_data_and_without_caches(code):
    write(
        code,
        {
            "own/__init__.py": "",
            "own/sub/settings.json": "{}",
            "own/__pycache__/x.pyc": "",
            "own/.git/HEAD": "",
        },
    )
    assert packed("own") == ["own/__init__.py", "own/sub/settings.json"]


def test_a_package_called_build_is_packed_and_a_folder_of_that_name_is_not(code):
    write(code, {"whole/__init__.py": "", "whole/build/__init__.py": "", "whole/dist/wheel.txt": ""})
    assert packed("whole") == ["whole/__init__.py", "whole/build/__init__.py"]


def test_neighbours_that_a_module_imports_are_packed(code):
    write(
        code,
        {
            "own.py": "import json, near\nfrom far.inner import thing\nimport_module = print\nimport_module('late')\n",
            "near.py": "import nearer\n",
            "nearer.py": "",
            "late.py": "",
            "far/__init__.py": "",
            "far/inner.py": "from . import side\nthing = 1\n",
            "far/side.py": "",
            "unrelated.py": "",
        },
    )
    wanted = ["far/__init__.py", "far/inner.py", "far/side.py", "late.py", "near.py", "nearer.py", "own.py"]
    assert packed("own") == wanted


def test_a_folder_without_init_gives_only_the_packages_that_are_used(code):
    write(
        code,
        {
            "projects/A/net/__init__.py": "from projects.B import common\n",
            "projects/A/net/layers.py": "from ...C import more\n",
            "projects/B/common.py": "",
            "projects/C/more.py": "",
            "projects/D/net/__init__.py": "",
        },
    )
    wanted = ["A/net/__init__.py", "A/net/layers.py", "B/common.py", "C/more.py"]
    assert packed("projects.A.net") == [f"projects/{name}" for name in wanted]


def test_files_beside_a_module_are_packed_if_its_source_names_them(code):
    source = (
        "OPEN = ['settings.json', 'tables', 'words_*.txt', '../outside.json', '/etc/hosts', '.', '*', '']\n"
    )
    write(
        code,
        {
            "own.py": source,
            "own.yaml": "",
            "settings.json": "{}",
            "tables/a.csv": "",
            "words_en.txt": "",
            "private.txt": "",
            "../outside.json": "{}",
        },
    )
    assert packed("own") == ["own.py", "own.yaml", "settings.json", "tables/a.csv", "words_en.txt"]


def test_installed_packages_are_not_packed(code):
    write(code, {"own.py": "import numpy, mmdet.models, torch.nn, serve.ops, os.path\n"})
    assert packed("own") == ["own.py"]


def test_compiled_and_large_files_are_named_and_not_packed(code, monkeypatch):
    monkeypatch.setattr("serve.convert.custom_code.MAX_DATA_FILE_BYTES", 10)
    write(code, {"own/__init__.py": "", "own/_fast.so": "", "own/table.bin": "x" * 11})
    found = collect_custom_code({"custom_imports": {"imports": ["own"]}})
    assert list(found.files) == ["own/__init__.py"]
    assert "own/_fast.so" in found.notes[0] and "own/table.bin" in found.notes[1]


def test_too_much_code_is_refused_by_its_largest_file(code, monkeypatch):
    monkeypatch.setattr("serve.convert.custom_code.MAX_CODE_BYTES", 10)
    write(code, {"own/__init__.py": "", "own/table.csv": "x" * 11})
    with pytest.raises(ArchiveError, match=r"own/table\.csv"):
        packed("own")


def test_two_files_of_one_place_are_refused(code, tmp_path, monkeypatch):
    other = tmp_path / "other"
    monkeypatch.syspath_prepend(other)
    write(code, {"one.py": "import two\nNAME = 'settings.json'\n", "settings.json": "1"})
    write(other, {"two.py": "NAME = 'settings.json'\n", "settings.json": "2"})
    with pytest.raises(ArchiveError, match=r"code/settings\.json"):
        packed("one")


def test_a_missing_module_is_named():
    with pytest.raises(ArchiveError, match="no_such_module"):
        packed("no_such_module")


def test_modules_of_classes_named_by_path_are_added_to_the_imports(code):
    write(code, {"own/__init__.py": "", "own/nets.py": "class Net: ...\n"})
    config: dict[str, Any] = {
        "model": {
            "type": "mmdet.FCOS",
            "backbone": {"type": "own.nets.Net"},
            "norm": {"type": "torch.nn.ReLU"},
        }
    }
    add_named_modules(config)
    assert config["custom_imports"]["imports"] == ["own.nets"]
    config["model"]["backbone"]["type"] = "gone.Net"
    with pytest.raises(ArchiveError, match="'gone'"):
        add_named_modules(config)
