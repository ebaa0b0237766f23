"""The conversion proves an archive in a process that has only what a server has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serve import ops
from serve.convert import Conversion, convert, resolve_config
from serve.convert.random_weights import write_random_checkpoint
from serve.errors import ArchiveError, SelfTestError, SetupError
from tests.convert.test_config import LAZY, PLAIN

ops.install()

pytestmark = [pytest.mark.slow, pytest.mark.fresh_proof]

SMALL = f"""{PLAIN}
model['bbox_head']['norm_cfg'] = None
model['test_cfg'] = dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
"""
OWN_BACKBONE = """
import json
from pathlib import Path
from mmdet.models import ResNet
from mmdet.registry import MODELS
import {neighbour}

SETTINGS = json.loads(Path({settings}).read_text())

@MODELS.register_module()
class {name}(ResNet):
    def forward(self, x):
        return super().forward(x * SETTINGS["scale"])
"""
BESIDE = "__file__).with_name('settings.json'"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "plain.py").write_text(SMALL)
    resolved = resolve_config(folder / "plain.py").config
    write_random_checkpoint(resolved, ("cat", "dog"), folder / "plain.pth")
    return folder / "plain.pth"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on this process's module search path, with a neighbour and a data file; forgotten afterwards."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "settings.json").write_text('{"scale": 1.0}')
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def conversion(folder: Path, config: str, weights: Path) -> Conversion:
    (folder / "config.py").write_text(config)
    return Conversion(folder / "config.py", weights, folder / "store", "mine")


def naming(module: str, name: str) -> str:
    imports = f"custom_imports = dict(imports=['{module}'], allow_failed_imports=False)\n"
    return f"{SMALL}\n{imports}model['backbone']['type'] = '{name}'\n"


def test_a_module_with_its_neighbour_and_data_file_is_proved_without_its_folder(code, tmp_path, weights):
    (code / "near_one.py").write_text("")
    source = OWN_BACKBONE.format(neighbour="near_one", settings=BESIDE, name="ProofNetOne")
    (code / "own_one.py").write_text(source)
    made = convert(conversion(tmp_path, naming("own_one", "ProofNetOne"), weights))
    packed = {name for name in made.metadata.files if name.startswith("code/")}
    assert packed == {"code/own_one.py", "code/near_one.py", "code/settings.json"}
    assert made.needs_trust
    assert made.cost.seconds > 0 and made.cost.memory_bytes > 100 << 20 and made.cost.device == "cpu"


def test_a_lazy_config_with_an_unregistered_class_of_its_own_is_proved(code, tmp_path, weights):
    (code / "own_lazy").mkdir()
    (code / "own_lazy" / "__init__.py").write_text("from .net import LazyNet\n")
    (code / "own_lazy" / "net.py").write_text(
        "from mmdet.models import ResNet\n\nclass LazyNet(ResNet):\n    pass\n"
    )
    config = "from own_lazy import LazyNet\n" + LAZY.replace("type=ResNet", "type=LazyNet")
    config = config.replace("norm_cfg=dict(type=GroupNorm, num_groups=2)", "norm_cfg=None")
    asked = replace(conversion(tmp_path, config, weights), allow_partial=True)
    made = convert(asked)
    assert {"code/own_lazy/__init__.py", "code/own_lazy/net.py"} <= set(made.metadata.files)


@pytest.mark.parametrize(
    ("which", "settings", "named"),
    [
        ("two", "'settings.json'", "settings.json"),  # of the working folder
        ("three", "'{code}/settings.json'", "settings.json"),  # of this machine
        ("four", "__file__).parent.joinpath('../shared/settings.json'", "settings.json"),
    ],
)
def test_a_file_that_a_server_lacks_is_named(code, tmp_path, weights, monkeypatch, which, settings, named):
    monkeypatch.chdir(code)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "settings.json").write_text('{"scale": 1.0}')
    source = OWN_BACKBONE.format(
        neighbour="json", settings=settings.format(code=code), name=f"ProofNet{which}"
    )
    (code / f"own_{which}").mkdir()
    (code / f"own_{which}" / "__init__.py").write_text(source)
    if which == "four":
        (code / "shared").symlink_to(tmp_path / "shared")
    with pytest.raises(ArchiveError, match=named):
        convert(conversion(tmp_path, naming(f"own_{which}", f"ProofNet{which}"), weights))
    assert not list((tmp_path / "store").iterdir())


def test_a_module_that_a_server_lacks_is_named(code, tmp_path, weights):
    """It is imported by a computed name, which no reader of the source finds."""
    (code / "hidden_one.py").write_text("")
    source = OWN_BACKBONE.format(neighbour="json", settings=BESIDE, name="ProofNetFive")
    (code / "own_five.py").write_text(
        f"import importlib\nimportlib.import_module('hidden' + '_one')\n{source}"
    )
    with pytest.raises(ArchiveError, match="'hidden_one'"):
        convert(conversion(tmp_path, naming("own_five", "ProofNetFive"), weights))


def test_code_that_ends_the_process_fails_the_proof(code, tmp_path, weights):
    source = OWN_BACKBONE.format(neighbour="os, sys", settings=BESIDE, name="ProofNetSix")
    (code / "own_six.py").write_text(
        f"{source}\nif 'serve.worker.proof' in sys.orig_argv:\n    os._exit(7)\n"
    )
    with pytest.raises(SelfTestError, match="status 7"):
        convert(conversion(tmp_path, naming("own_six", "ProofNetSix"), weights))


def test_a_frame_that_comes_out_otherwise_fails_the_proof(tmp_path, demo_archive, monkeypatch):
    """The recorded answer is changed between the conversion's own run and the proof."""
    from serve.convert import conversion as module
    from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG

    record = module._record_golden

    def falsify(*args):
        metadata, answer, notes = record(*args)
        answer["scores_3d"] = [score * 0.9 for score in answer["scores_3d"]]
        return metadata, answer, notes

    monkeypatch.setattr(module, "_record_golden", falsify)
    with pytest.raises(SetupError):
        convert(Conversion(DEMO_CONFIG, DEMO_CHECKPOINT, tmp_path / "store", "second"))
    assert not list((tmp_path / "store").iterdir())


def test_the_number_of_parameters_is_that_of_the_checkpoint(code, tmp_path, weights):
    made = convert(conversion(tmp_path, SMALL, weights))
    saved = torch.load(weights, weights_only=True)["state_dict"]
    counted = sum(
        t.numel() for name, t in saved.items() if "running_" not in name and "num_batches" not in name
    )
    assert made.parameters == counted and not made.needs_trust
