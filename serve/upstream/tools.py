"""Run upstream's programs from the installed wheels in this process, with the corrections of `serve.upstream.patches`.

Arguments are upstream's own. Besides, a config may be a name of the zoo, a URI or an old config
(`serve.upstream.config_argument`), flags of 2.x are translated (`serve.upstream.former_flags`), and data sets and
checkpoints are checked before anything is written (`serve.upstream.checked_runner`).
"""

from __future__ import annotations

import argparse
import importlib
import pickle
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from serve.errors import CheckpointError, DataSetError, MissingPackage, ServeError, UpstreamError
from serve.settings.environment import has_display, variable_set
from serve.upstream import corrections, patches
from serve.upstream.data_files import written_whole
from serve.upstream.former_flags import Translation, translate
from serve.upstream.missing_packages import explain_missing_package
from serve.upstream.parsed_arguments import completed_arguments
from serve.upstream.tool_list import Tool, find_tool, package_of_arguments, tools_folder

__all__ = ["run"]

# Programs of this project in place of upstream's, by short name: module with main(arguments, program).
_OWN: dict[str, str] = {
    "analyze_logs": "serve.upstream.log_analysis",
    "get_flops": "serve.upstream.complexity",
    "publish_model": "serve.upstream.publish",
}
# Corrections of a program's own functions, by its short name: called with the loaded module.
_CORRECTED: dict[str, Callable[[ModuleType], None]] = {
    "download_dataset": corrections.correct_download,
    "images2coco": corrections.correct_images2coco,
}
_OUTPUT_FLAGS = ("--out-dir", "-o", "--save-dir")
# How upstream's converters say that a file or folder is not there.
_ABSENT = re.compile(r"not exist|not found|No images found", re.IGNORECASE)
_RUNNERS = ("train", "test", "test_tracking")
_LAUNCHERS = ("dist_train", "dist_test", "slurm_train", "slurm_test")


def run(name: str, argv: Sequence[str], *, package: str | None = None) -> int:
    """Run one of upstream's programs; returns its exit code.

    Args:
        name: as `serve.upstream.tool_list.find_tool` takes it, ``mmdet3d::NAME`` for that package's, or
            ``dist_train``, ``dist_test``, ``slurm_train``, ``slurm_test``.
        argv: upstream's arguments.
        package: ``mmdet`` or ``mmdet3d``; None for that of the config among the arguments, else the one that has the
            program, else mmdet.

    Raises:
        ServeError: a sentence on what is wrong with the arguments, the data or the environment.
    """
    scope, _, bare = name.rpartition("::")
    bare = bare.rpartition("/")[2].removesuffix(".sh")
    if bare in _LAUNCHERS:
        from serve.upstream import launch

        return launch.run_script(bare, argv)
    package = package or scope or package_of_arguments(argv)
    tool = find_tool(name.rpartition("::")[2], package)
    chosen = _choose_package(tool, package, named=bool(scope))
    own, arguments = _own_flags(tool.short_name, argv)
    now = translate(tool.short_name, chosen, arguments)
    for note in now.notes:
        print(f"note: {note}", file=sys.stderr)
    if "--show" in now.arguments and not has_display():
        print(
            "note: '--show' opens windows, and there is no display; --show-dir FOLDER writes the pictures",
            file=sys.stderr,
        )
    if now.processes > 1 or own.nnodes > 1:
        from serve.upstream import launch

        return launch.run_processes(tool.short_name, argv, now, own)
    patches.apply()
    with ExitStack() as stack:
        if now.gpu_ids:
            stack.enter_context(variable_set("CUDA_VISIBLE_DEVICES", now.gpu_ids))
        stack.enter_context(_import_from_here())
        stack.enter_context(written_whole())
        stack.enter_context(_empty_folders_removed(now.arguments))
        if tool.short_name in _OWN:
            program = importlib.import_module(_OWN[tool.short_name])
            if program.takes(chosen, now.arguments):
                with completed_arguments(training=False), _explained(tool.short_name):
                    return int(program.main(now.arguments, f"mmdet3d-serve tools {tool.short_name}"))
        return _run_file(tool, chosen, now, own, stack)


def _choose_package(tool: Tool, package: str | None, *, named: bool) -> str:
    if package in tool.packages:
        return package
    if named:
        raise UpstreamError(f"{package} has no tool '{tool.name}'; {' and '.join(tool.packages)} has")
    return tool.packages[0]


def _own_flags(tool: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take this project's flags out of the arguments of training and testing programs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if tool in _RUNNERS:
        parser.add_argument("--trust-checkpoint", action="store_true")
        parser.add_argument("--allow-partial", action="store_true")
        parser.add_argument("--nnodes", type=int)
        parser.add_argument("--node-rank", type=int)
        parser.add_argument("--master-addr")
        parser.add_argument("--master-port")
    parser.set_defaults(
        trust_checkpoint=False, allow_partial=False, node_rank=0, master_addr="", master_port=""
    )
    own, rest = parser.parse_known_args(list(argv))
    own.nnodes = getattr(own, "nnodes", None) or 1
    return own, rest


def _run_file(tool: Tool, package: str, now: Translation, own: argparse.Namespace, stack: ExitStack) -> int:
    path = tool.path(package)
    stack.enter_context(_arguments([f"mmdet3d-serve {_title(tool)}", *now.arguments]))
    stack.enter_context(completed_arguments(training=tool.short_name == "train"))
    stack.enter_context(_tools_of(package))
    if tool.short_name in _RUNNERS:
        from serve.upstream.checked_runner import checked_runner

        stack.enter_context(
            checked_runner(
                training=tool.short_name == "train",
                out=now.out,
                allow_partial=own.allow_partial,
                trust=own.trust_checkpoint,
            )
        )
    with _explained(f"{package}'s {tool.name}", converts=tool.short_name not in _RUNNERS):
        correct = _CORRECTED.get(tool.short_name)
        if correct is None:
            runpy.run_path(str(path), run_name="__main__")
        else:
            program = _load(path)
            correct(program)
            program.main()
    return 0


def _title(tool: Tool) -> str:
    return tool.short_name if tool.name in ("train", "test") else f"tools {tool.short_name}"


def _load(path: Path) -> ModuleType:
    """Import a program without running it; its functions can be corrected, and pickled for other processes."""
    spec = importlib.util.spec_from_file_location(f"upstream_tool_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    former, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = former


@contextmanager
def _import_from_here() -> Iterator[None]:
    """Let ``custom_imports`` of configs find modules in the working folder, as a checkout of upstream does."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


@contextmanager
def _tools_of(package: str) -> Iterator[None]:
    """Let upstream's programs import each other as ``tools.…``, whatever else has that name."""
    former = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "tools"}
    for name in former:
        del sys.modules[name]
    mine = ModuleType("tools")
    mine.__path__ = [str(tools_folder(package))]
    sys.modules["tools"] = mine
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
            del sys.modules[name]
        sys.modules.update(former)


@contextmanager
def _explained(program: str, *, converts: bool = True) -> Iterator[None]:
    """Turn the exceptions of a program into sentences; a traceback precedes those of unknown types.

    Args:
        program: its name.
        converts: whether it reads data without the checks of `serve.upstream.checked_runner`.
    """
    try:
        yield
    except ServeError:
        raise
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    except ModuleNotFoundError as error:
        raise MissingPackage(explain_missing_package(error.name or str(error))) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a checkpoint carries types that no checkpoint needs and that could run code ({_first_line(error)}); if "
            "you trust its author, pass --trust-checkpoint"
        ) from error
    except FileNotFoundError as error:
        raise DataSetError(
            f"{error.filename or _first_line(error)} does not exist; check the path"
        ) from error
    except (AssertionError, ValueError) as error:
        if not (converts and _ABSENT.search(str(error))):
            _stop(program, error)
        raise DataSetError(f"{program}: {_first_line(error)}; check the path and the layout") from error
    except OSError:  # a full disk, a file that may not be read: a sentence of its own
        raise
    except Exception as error:
        _stop(program, error)


def _stop(program: str, error: Exception) -> NoReturn:
    traceback.print_exception(error)
    raise UpstreamError(f"{program} stopped: {type(error).__name__}: {_first_line(error)}") from error


@contextmanager
def _empty_folders_removed(arguments: Sequence[str]) -> Iterator[None]:
    """Remove the output folder again if an error ends the block before anything is in it."""
    named = [Path(after) for flag, after in pairwise(arguments) if flag in _OUTPUT_FLAGS]
    made = [path for path in named if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
