"""Finding upstream's programs, starting several processes, and packages that are not installed."""

from __future__ import annotations

import sys
import types

import pytest

from serve.errors import MissingPackage, SettingsError
from serve.upstream import corrections
from serve.upstream.launch import slurm_command, torchrun_command
from serve.upstream.missing_packages import explain_missing_package, stand_in
from serve.upstream.tool_list import all_tools, find_tool, tools_folder


def test_every_listed_program_is_in_a_wheel_and_no_program_is_forgotten():
    listed = {tool.name for tool in all_tools()}
    helpers = {
        "create_gt_database",
        "semantickitti_converter",
        "kitti_converter",
        "waymo_converter",
        "lyft_converter",
    }
    helpers |= {"indoor_converter", "nuscenes_converter"}
    there = set()
    for package in ("mmdet", "mmdet3d"):
        for path in tools_folder(package).rglob("*.py"):
            name = path.relative_to(tools_folder(package)).with_suffix("").as_posix()
            if (
                "deployment/" not in name
                and path.stem not in helpers
                and not path.stem.endswith("data_utils")
            ):
                there.add(name)
    assert listed == there


@pytest.mark.parametrize(
    ("given", "package", "name"),
    [
        ("get_flops", None, "analysis_tools/get_flops"),
        ("tools/analysis_tools/get_flops.py", None, "analysis_tools/get_flops"),
        ("./tools/misc/print_config.py", None, "misc/print_config"),
        ("/home/me/mmdetection/tools/train.py", None, "train"),
        ("tools/detectron2pytorch.py", None, "model_converters/detectron2pytorch"),
        ("browse_dataset", "mmdet", "analysis_tools/browse_dataset"),
        ("browse_dataset", "mmdet3d", "misc/browse_dataset"),
        ("mot/browse_dataset", None, "analysis_tools/mot/browse_dataset"),
    ],
)
def test_programs_are_found_by_the_names_that_pages_print(given, package, name):
    assert find_tool(given, package).name == name


def test_an_unknown_program_is_an_error_that_names_similar_ones():
    with pytest.raises(SettingsError, match="get_flops"):
        find_tool("get_flop")


def test_srun_gets_what_upstreams_script_gives_it():
    command = slurm_command(
        "train", ["dev", "job", "c.py", "w", "--amp"], {"GPUS": "16", "SRUN_ARGS": "--quiet -x n1"}
    )
    assert command[:3] == ["srun", "-p", "dev"]
    assert {"--ntasks=16", "--ntasks-per-node=8", "--gres=gpu:8", "--quiet", "-x"} <= set(command)
    assert command[-8:] == ["serve", "train", "c.py", "--work-dir", "w", "--amp", "--launcher", "slurm"]


def test_one_machine_takes_a_free_port_and_several_meet_at_one():
    assert "--standalone" in torchrun_command("train", ["c.py"], processes=2)
    several = torchrun_command("train", ["c.py"], processes=2, nodes=2, node_rank=1, master_addr="host")
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=host", "--master-port=29500"} <= set(several)


def test_a_missing_package_can_be_imported_and_is_an_error_on_use():
    with stand_in(("no_such_kit",)):
        from no_such_kit.deep.inside import Box, view

    names: list[Box] = []  # usable in annotations
    with pytest.raises(MissingPackage, match="setup-train"):
        Box(1, 2)
    with pytest.raises(MissingPackage):
        view.shape  # noqa: B018
    assert names == []
    assert not [name for name in sys.modules if name.startswith("no_such_kit")]
    with pytest.raises(ImportError):
        import no_such_kit  # noqa: F401


def test_an_installed_package_is_not_replaced():
    with stand_in(("json",)):
        import json

    assert json.loads("[1]") == [1]


def test_waymos_packages_are_explained_by_the_python_that_they_need():
    assert "3.10" in explain_missing_package("waymo_open_dataset.dataset_pb2")


def test_threads_of_the_download_raise_the_first_failure():
    from multiprocessing.pool import ThreadPool

    from serve.errors import DownloadError

    def fail(number: int) -> None:
        raise OSError(f"no file {number}")

    program = types.ModuleType("program")

    def start() -> None:
        with program.ThreadPool(2) as pool:
            pool.imap(fail, [1, 2])
            pool.close()
            pool.join()

    program.__dict__.update(ThreadPool=ThreadPool, parse_args=lambda: None, main=start)
    start()  # upstream's: the failure is lost
    corrections.correct_download(program)
    with pytest.raises(DownloadError):
        program.main()
