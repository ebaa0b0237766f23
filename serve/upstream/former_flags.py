"""Flags of mmdet 2.x and mmdet3d 0.x in today's form.

Upstream moved most flags of its programs into the config: ``--eval bbox segm`` is
``--cfg-options test_evaluator.metric="[bbox,segm]"`` today. Former flags are translated by the table `FLAGS`; a line
names the new form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from serve.errors import SettingsError

__all__ = ["FLAGS", "Translation", "translate"]

# Keys of configs that moved: of --options, --cfg-options and --eval-options.
_KEYS = {
    "data.samples_per_gpu": "train_dataloader.batch_size",
    "data.workers_per_gpu": "train_dataloader.num_workers",
    "data.train_dataloader.samples_per_gpu": "train_dataloader.batch_size",
    "data.test.samples_per_gpu": "test_dataloader.batch_size",
    "data.test_dataloader.samples_per_gpu": "test_dataloader.batch_size",
    "data.val.samples_per_gpu": "val_dataloader.batch_size",
    "data.val_dataloader.samples_per_gpu": "val_dataloader.batch_size",
    **{
        f"data.{split}.{old}": f"{split}_dataloader.dataset.{new}"
        for split in ("train", "val", "test")
        for old, new in (
            ("ann_file", "ann_file"),
            ("img_prefix", "data_prefix.img"),
            ("data_root", "data_root"),
            ("classes", "metainfo.classes"),
            ("pipeline", "pipeline"),
        )
    },
    "evaluation.interval": "train_cfg.val_interval",
    "evaluation.save_best": "default_hooks.checkpoint.save_best",
    "evaluation.metric": "val_evaluator.metric",
    "checkpoint_config.interval": "default_hooks.checkpoint.interval",
    "checkpoint_config.max_keep_ckpts": "default_hooks.checkpoint.max_keep_ckpts",
    "checkpoint_config.out_dir": "default_hooks.checkpoint.out_dir",
    "log_config.interval": "default_hooks.logger.interval",
    "runner.max_epochs": "train_cfg.max_epochs",
    "runner.max_iters": "train_cfg.max_iters",
    "total_epochs": "train_cfg.max_epochs",
    "optimizer_config.grad_clip": "optim_wrapper.clip_grad",
    "dist_params.backend": "env_cfg.dist_cfg.backend",
    "cudnn_benchmark": "env_cfg.cudnn_benchmark",
    "mp_start_method": "env_cfg.mp_cfg.mp_start_method",
    "opencv_num_threads": "env_cfg.mp_cfg.opencv_num_threads",
    "seed": "randomness.seed",
    "deterministic": "randomness.deterministic",
    "optimizer.constructor": "optim_wrapper.constructor",
    "optimizer_config.cumulative_iters": "optim_wrapper.accumulative_counts",
    "evaluation.start": "train_cfg.val_begin",
    "evaluation.out_dir": "default_hooks.checkpoint.out_dir",
    "evaluation.rule": "default_hooks.checkpoint.rule",
    "checkpoint_config.by_epoch": "default_hooks.checkpoint.by_epoch",
    "checkpoint_config.save_optimizer": "default_hooks.checkpoint.save_optimizer",
    "checkpoint_config.save_last": "default_hooks.checkpoint.save_last",
}
# The first that fits applies.
_KEY_PREFIXES = {
    "optimizer.paramwise_cfg.": "optim_wrapper.paramwise_cfg.",
    "optimizer.": "optim_wrapper.optimizer.",
    "optimizer_config.grad_clip.": "optim_wrapper.clip_grad.",
}
# Members that are several today, by key; `{}` is the value.
_SEVERAL = {
    "resume_from": ("load_from={}", "resume=True"),
    "fp16.loss_scale": ("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale={}"),
}
# Members of 2.x that today's runner does not read, and where theirs are today.
_UNREAD = {
    "checkpoint_config": "default_hooks.checkpoint",
    "data": "train_dataloader, val_dataloader and test_dataloader",
    "dist_params": "env_cfg.dist_cfg",
    "evaluation": "val_evaluator",
    "fp16": "--amp, or optim_wrapper.type=AmpOptimWrapper",
    "log_config": "default_hooks.logger and vis_backends",
    "lr_config": "the list param_scheduler (for steps: --cfg-options param_scheduler.1.milestones=[8,11], 1 being "
    "the place of MultiStepLR in it)",
    "momentum_config": "the list param_scheduler",
    "optimizer_config": "optim_wrapper",
    "resume_from": "load_from and resume",
    "runner": "train_cfg",
    "workflow": "nothing: losses of validation data are not computed, and figures of it are val_evaluator's",
}
_RUNNERS = ("train", "test", "test_tracking")
# Arguments of dataset.evaluate() and format_results(), now of the metric.
_METRIC_KEYS = {"jsonfile_prefix": "outfile_prefix", "txtfile_prefix": "outfile_prefix"}
_NO_VALIDATION = ("val_cfg=None", "val_dataloader=None", "val_evaluator=None")


@dataclass
class Translation:
    """Arguments in today's form, while they are being translated.

    Attributes:
        tool: name of the program.
        package: ``mmdet`` or ``mmdet3d``.
        arguments: today's arguments.
        options: for ``--cfg-options``.
        processes: of ``--gpus N``; 1 is this process.
        gpu_ids: GPUs of ``--gpu-ids``, for CUDA_VISIBLE_DEVICES; empty for all.
        port: of the process group, if ``dist_params.port`` names one.
        out: result file of ``--out``, if the program has no such flag.
        notes: one line for each former flag.
    """

    tool: str
    package: str
    arguments: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    processes: int = 1
    gpu_ids: str = ""
    port: str = ""
    out: str = ""
    notes: list[str] = field(default_factory=list)

    def replace(self, former: str, now: Iterable[str] = (), *options: str, note: str = "") -> None:
        """Add what stands for a former flag, and say so."""
        words = list(now)
        self.arguments += words
        self.options += options
        shown = [*words, *(["--cfg-options", *map(_quoted, options)] if options else [])]
        self.notes.append(f"'{former}' is now: {note or ' '.join(shown)}")


def _quoted(option: str) -> str:
    return f'"{option}"' if any(sign in option for sign in "[],()' ") else option


Rule = Callable[[Translation, str, list[str]], None]


@dataclass(frozen=True)
class Flag:
    """A former flag.

    Attributes:
        tools: programs that had it.
        values: how many values follow: a number, ``*`` for all up to the next flag.
        rule: called with the translation, the flag as written, and its values.
    """

    tools: tuple[str, ...]
    values: int | str
    rule: Rule


def _metric(now: Translation, flag: str, values: list[str]) -> None:
    # Today's configs of Cityscapes have that metric as an evaluator of its own.
    kept = [value for value in values if value != "cityscapes"]
    listed = kept[0] if len(kept) == 1 else f"[{','.join(kept)}]"
    options = [f"test_evaluator.metric={listed}"] if kept else []
    now.replace(
        f"{flag} {' '.join(values)}", (), *options, note="" if kept else "in the config's test_evaluator"
    )


def _metric_options(now: Translation, flag: str, values: list[str]) -> None:
    options = []
    for value in values:
        # The seeds' pages also write the bare prefix: --options ${JSONFILE_PREFIX}.
        key, equals, text = value.partition("=")
        if not equals:
            key, text = "outfile_prefix", value
        if "." in key:
            options += _todays(f"{key}={text}", now.tool)
        else:
            options.append(f"test_evaluator.{_METRIC_KEYS.get(key, key)}={text}")
    now.replace(f"{flag} {' '.join(values)}", (), *options)


def _todays(option: str, tool: str) -> list[str]:
    """Today's options for ``key=value``.

    Raises:
        SettingsError: the runner of today does not read the key, and there is no option for it.
    """
    key, equals, value = option.partition("=")
    if key in _SEVERAL and value not in ("", "None"):
        return [each.replace("{}", value) for each in _SEVERAL[key]]
    if key in _KEYS:
        return [f"{_KEYS[key]}{equals}{value}"]
    for former, now in _KEY_PREFIXES.items():
        if key.startswith(former):
            return [f"{now}{key.removeprefix(former)}{equals}{value}"]
    if key == "resume_from":
        return ["load_from=None", "resume=False"]
    member = key.partition(".")[0]
    if member in _UNREAD and tool in _RUNNERS:
        raise SettingsError(
            f"{option} is of mmdet 2.x / mmdet3d 0.x, and today's runner does not read it; today's is {_UNREAD[member]}"
        )
    return [option]


def _options(now: Translation, flag: str, values: list[str]) -> None:
    kept = []
    for value in values:
        if value.startswith("dist_params.port="):
            now.port = value.partition("=")[2]
        else:
            kept.append(value)
    todays = {value: _todays(value, now.tool) for value in kept}
    options = [option for each in todays.values() for option in each]
    if flag == "--cfg-options":
        now.options += options
        now.notes += [
            f"'{former}' is now: --cfg-options {' '.join(map(_quoted, each))}"
            for former, each in todays.items()
            if each != [former]
        ]
    elif options:
        now.replace(f"{flag} {' '.join(kept)}", (), *options)


def _batch(now: Translation, flag: str, values: list[str]) -> None:
    split = "train" if now.tool == "train" else "test"
    now.replace(f"{flag} {values[0]}", (), f"{split}_dataloader.batch_size={values[0]}")


def _gpus(now: Translation, flag: str, values: list[str]) -> None:
    if not values[0].isdigit() or int(values[0]) < 1:
        raise SettingsError(f"{flag} takes a number of processes of at least 1, got {values[0]!r}")
    now.processes = int(values[0])


def _gpu_ids(now: Translation, flag: str, values: list[str]) -> None:
    now.gpu_ids = ",".join(values)
    now.replace(f"{flag} {' '.join(values)}", note=f"CUDA_VISIBLE_DEVICES={now.gpu_ids}")


def _out(now: Translation, flag: str, values: list[str]) -> None:
    if not values[0].endswith((".pkl", ".pickle")):
        raise SettingsError(f"{flag} takes a .pkl file, got {values[0]}")
    if now.package == "mmdet3d":  # whose program has no such flag
        now.out = values[0]
    else:
        now.arguments += [flag, values[0]]


def _draw_threshold(now: Translation, flag: str, values: list[str]) -> None:
    if now.package == "mmdet3d":
        now.replace(f"{flag} {values[0]}", ("--score-thr", values[0]))
    else:
        now.replace(f"{flag} {values[0]}", (), f"default_hooks.visualization.score_thr={values[0]}")


def _becomes(*arguments: str, options: Sequence[str] = (), note: str = "") -> Rule:
    """Rule that replaces a flag by fixed words; ``{}`` in them is its value."""

    def rule(now: Translation, flag: str, values: list[str]) -> None:
        value = values[0] if values else ""
        now.replace(
            " ".join([flag, *values]),
            [word.replace("{}", value) for word in arguments],
            *(option.replace("{}", value) for option in options),
            note=note,
        )

    return rule


_BOTH = ("train", "test")
FLAGS: dict[str, Flag] = {
    "--cfg-options": Flag(("*",), "*", _options),
    "--eval": Flag(("test",), "*", _metric),
    "--eval-options": Flag(("test",), "*", _metric_options),
    "--format-only": Flag(("test",), 0, _becomes(options=("test_evaluator.format_only=True",))),
    "-format-only": Flag(("test",), 0, _becomes(options=("test_evaluator.format_only=True",))),
    "--out": Flag(("test",), 1, _out),
    "--show-score-thr": Flag(("test",), 1, _draw_threshold),
    "--fuse-conv-bn": Flag(("test",), 0, _becomes(note="nothing; `mmdet3d-serve archive` fuses norms")),
    "--gpu-collect": Flag(("test",), 0, _becomes(options=("test_evaluator.collect_device=gpu",))),
    "--tmpdir": Flag(("test",), 1, _becomes(note="nothing; results are collected in memory")),
    "--resume-from": Flag(("train",), 1, _becomes("--resume", "{}")),
    "--load-from": Flag(("train",), 1, _becomes(options=("load_from={}",))),
    "--auto-resume": Flag(("train",), 0, _becomes("--resume")),
    "--autoscale-lr": Flag(("train",), 0, _becomes("--auto-scale-lr")),
    "--no-validate": Flag(("train",), 0, _becomes(options=_NO_VALIDATION)),
    "--seed": Flag(("train",), 1, _becomes(options=("randomness.seed={}",))),
    "--deterministic": Flag(("train",), 0, _becomes(options=("randomness.deterministic=True",))),
    "--diff-seed": Flag(("train",), 0, _becomes(options=("randomness.diff_rank_seed=True",))),
    "--gpus": Flag(_BOTH, 1, _gpus),
    "--gpu-id": Flag(_BOTH, 1, _gpu_ids),
    "--gpu-ids": Flag(_BOTH, "*", _gpu_ids),
    "--samples-per-gpu": Flag(_BOTH, 1, _batch),
}
"""Flags that upstream's programs of today do not have, or of which the keys moved."""


def translate(tool: str, package: str, arguments: Sequence[str]) -> Translation:
    """Bring the arguments of a program to today's form.

    Args:
        tool: ``train``, ``test`` or another program's short name.
        package: ``mmdet`` or ``mmdet3d``.
        arguments: as given.

    Raises:
        SettingsError: a former flag lacks its value, or a member of the config is read no more.
    """
    now = Translation(tool, package)
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, attached = word.partition("=") if word.startswith("-") else (word, "", "")
        found = _rule(name, tool, package)
        if found is None:
            now.arguments.append(word)
            continue
        values = [attached] if equals else _take(words, found.values)
        if found.values == 1 and len(values) != 1:
            raise SettingsError(f"{name} needs a value")
        found.rule(now, name, values)
    if now.port:
        _add_port(now)
    if now.options:
        now.arguments += ["--cfg-options", *now.options]
    return now


def _add_port(now: Translation) -> None:
    """Pass the port of the process group on: torchrun takes a flag, mmengine reads Slurm's from the config."""
    words = " ".join(now.arguments)
    if "--launcher slurm" in words or "--launcher=slurm" in words:
        option = f"env_cfg.dist_cfg.port={now.port}"
        now.options.append(option)
        form = f"--cfg-options {option}"
    else:
        form = f"--master-port {now.port}"
    now.notes.append(f"'dist_params.port={now.port}' is now: {form}")


def _rule(name: str, tool: str, package: str) -> Flag | None:
    if name == "--options":
        # Of the metric in test.py, of the config elsewhere.
        if tool == "print_config" and package == "mmdet3d":
            return None
        return Flag((tool,), "*", _metric_options if tool == "test" else _options)
    found = FLAGS.get(name)
    if found is None:
        return None
    return found if tool in found.tools or "*" in found.tools else None


def _take(words: list[str], count: int | str) -> list[str]:
    """Take the values of a flag from the front of `words`."""
    taken: list[str] = []
    while words and not words[0].startswith("--") and (count == "*" or len(taken) < int(count)):
        taken.append(words.pop(0))
    return taken
