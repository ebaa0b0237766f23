"""Several processes for training and testing: torchrun on one or more machines, or Slurm.

Each process runs ``mmdet3d-serve train`` or ``test`` with ``--launcher pytorch`` (or ``slurm``), as upstream's
``dist_train.sh`` and ``slurm_train.sh`` run theirs. Without CUDA the processes talk by gloo.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from serve.errors import SettingsError, UpstreamError
from serve.settings.environment import child_environment, die_with_parent, launcher_variables
from serve.upstream.former_flags import Translation

__all__ = ["run_processes", "run_script", "slurm_command", "torchrun_command"]

_PORT = "29500"  # torch's and upstream's default
_STOP_S = 60.0  # torchrun gives its processes half of it
_OWN = {
    "--nnodes": 1,
    "--node-rank": 1,
    "--master-addr": 1,
    "--master-port": 1,
    "--gpus": 1,
    "--gpu-ids": None,
}


def torchrun_command(
    tool: str,
    arguments: Sequence[str],
    *,
    processes: int,
    nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "",
    master_port: str = "",
) -> list[str]:
    """Command line that starts `processes` processes on this machine, one of `nodes`."""
    where = (
        [
            *(f"--nnodes={nodes}", f"--node-rank={node_rank}"),
            *(f"--master-addr={master_addr or '127.0.0.1'}", f"--master-port={master_port or _PORT}"),
        ]
        if nodes > 1 or master_port
        else ["--standalone"]  # a free port, so that two runs on one machine do not meet
    )
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *where),
        *("-m", "serve", tool, *arguments, "--launcher", "pytorch"),
    ]


def run_processes(tool: str, argv: Sequence[str], now: Translation, own: argparse.Namespace) -> int:
    """Run a program in several processes; returns the exit code of torchrun.

    Args:
        tool: ``train`` or ``test``.
        argv: arguments as given; what they say about processes is taken out.
        now: the same, translated.
        own: flags about nodes.
    """
    command = torchrun_command(
        tool,
        _without_processes(argv),
        processes=now.processes,
        nodes=own.nnodes,
        node_rank=own.node_rank or 0,
        master_addr=own.master_addr,
        master_port=own.master_port or now.port,
    )
    environment = {"OMP_NUM_THREADS": "1", **child_environment()}
    if now.gpu_ids:
        environment["CUDA_VISIBLE_DEVICES"] = now.gpu_ids
    code = _run(command, environment)
    if code:
        raise UpstreamError(f"{now.processes} processes of '{tool}' ended with exit code {code}; see above")
    return 0


def run_script(name: str, argv: Sequence[str]) -> int:
    """Do what ``tools/NAME.sh`` of upstream does; the same arguments and variables.

    Raises:
        SettingsError: arguments are missing, or there is no Slurm.
    """
    tool = name.rpartition("_")[2]
    variables = launcher_variables()
    if name.startswith("slurm"):
        command = slurm_command(tool, argv, variables)
        if shutil.which("srun") is None:
            raise SettingsError(
                f"there is no srun on this machine; on a node of a Slurm cluster run: {shlex.join(command)}"
            )
        return _run(command, child_environment())
    wanted = ("CONFIG", "GPUS") if tool == "train" else ("CONFIG", "CHECKPOINT", "GPUS")
    if len(argv) < len(wanted) or not argv[len(wanted) - 1].isdigit():
        raise SettingsError(f"{name} needs {' '.join(wanted)}, then options of '{tool}'")
    from serve.upstream.tools import run

    *files, processes = argv[: len(wanted)]
    nodes = ["--nnodes", variables.get("NNODES", "1"), "--node-rank", variables.get("NODE_RANK", "0")]
    for flag, variable in (("--master-addr", "MASTER_ADDR"), ("--master-port", "PORT")):
        if variable in variables:
            nodes += [flag, variables[variable]]
    return run(tool, [*files, *argv[len(wanted) :], "--gpus", processes, *nodes])


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run torchrun or srun; it is ended with this process, and it ends the processes that it started."""
    with subprocess.Popen(command, env=environment, preexec_fn=die_with_parent) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def slurm_command(tool: str, argv: Sequence[str], variables: dict[str, str]) -> list[str]:
    """Command line of srun that upstream's ``slurm_train.sh`` or ``slurm_test.sh`` would run.

    Args:
        tool: ``train`` or ``test``.
        argv: PARTITION JOB_NAME CONFIG WORK_DIR (train) or PARTITION JOB_NAME CONFIG CHECKPOINT (test), then options.
        variables: GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS, as upstream's scripts read them.

    Raises:
        SettingsError: arguments are missing.
    """
    if len(argv) < 4:
        last = "WORK_DIR" if tool == "train" else "CHECKPOINT"
        raise SettingsError(f"slurm_{tool} needs PARTITION JOB_NAME CONFIG {last}, then options of '{tool}'")
    partition, job, config, fourth, *rest = argv
    files = [config, "--work-dir", fourth] if tool == "train" else [config, fourth]
    tasks, per_node = variables.get("GPUS", "8"), variables.get("GPUS_PER_NODE", "8")
    return [
        *("srun", "-p", partition, f"--job-name={job}", f"--gres=gpu:{per_node}", f"--ntasks={tasks}"),
        *(f"--ntasks-per-node={per_node}", f"--cpus-per-task={variables.get('CPUS_PER_TASK', '5')}"),
        *("--kill-on-bad-exit=1", *shlex.split(variables.get("SRUN_ARGS", ""))),
        *(sys.executable, "-u", "-m", "serve", tool, *files, *rest, "--launcher", "slurm"),
    ]


def _without_processes(argv: Sequence[str]) -> list[str]:
    """Drop the flags that say how many processes run where."""
    kept: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in _OWN:
            kept.append(word)
            continue
        count = _OWN[name]
        while not equals and words and not words[0].startswith("-") and (count is None or count > 0):
            words.pop(0)
            count = None if count is None else count - 1
    return kept
