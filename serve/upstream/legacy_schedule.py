"""Optimizers, schedules and hooks of configs of mmdet 2.x and mmdet3d 0.x in mmengine's form.

Names and meanings after mmengine's guides for the migration from mmcv 1.x (runner, hooks, parameter schedulers). Each
member that is converted gives a note with today's form; one that has no form today is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ArchiveError

__all__ = ["Schedule", "modern_schedule"]

_LOGGERS = {
    "TextLoggerHook": None,
    "TensorboardLoggerHook": "TensorboardVisBackend",
    "WandbLoggerHook": "WandbVisBackend",
    "MMDetWandbHook": "WandbVisBackend",
    "MlflowLoggerHook": "MLflowVisBackend",
}
_CHECKPOINT = ("interval", "max_keep_ckpts", "out_dir", "by_epoch", "save_optimizer", "save_last")
_FP16_OPTIMIZERS = ("Fp16OptimizerHook", "GradientCumulativeFp16OptimizerHook")
_OPTIMIZERS = ("OptimizerHook", "GradientCumulativeOptimizerHook", *_FP16_OPTIMIZERS)
_POLICIES = ("fixed", "step", "exp", "poly", "CosineAnnealing", "cyclic", "YOLOX")
_WARMUP = ("warmup", "warmup_iters", "warmup_ratio", "warmup_by_epoch")


@dataclass
class Schedule:
    """Members of a config in today's form, and a note on each that was converted."""

    members: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, former: str, now: str) -> None:
        """Record that a member has another form today."""
        self.notes.append(f"'{former}' is now: {now}")


def modern_schedule(full: Mapping[str, Any], *, prefix: str) -> Schedule:
    """Convert everything about training but the model and the data.

    Args:
        full: the resolved config of 2.x or 0.x, of plain dictionaries.
        prefix: prefix of the figures of its metric today, such as ``coco``, for ``save_best``.

    Raises:
        ArchiveError: a member has no form today; the message names it.
    """
    made = Schedule()
    length, by_epoch = _loop(full, made)
    _optimizer(full, made)
    _learning_rate(full, made, length, by_epoch=by_epoch)
    _hooks(full, made, prefix, by_epoch=by_epoch)
    _environment(full, made)
    return made


def _refuse(member: str, value: Any, known: Sequence[str]) -> ArchiveError:
    return ArchiveError(
        f"{member} = {value!r} of mmdet 2.x / mmdet3d 0.x has no form of today that this project knows; known are "
        f"{', '.join(known)}. Write the training on top of today's config"
    )


def _loop(full: Mapping[str, Any], made: Schedule) -> tuple[int, bool]:
    """Convert ``runner``, ``total_epochs`` and the interval of ``evaluation``; returns the length, and its unit."""
    runner = dict(full.get("runner") or {})
    if full.get("total_epochs") is not None:
        runner.setdefault("max_epochs", full["total_epochs"])
    kind = str(runner.get("type", "EpochBasedRunner"))
    if kind not in ("EpochBasedRunner", "IterBasedRunner"):
        raise _refuse("runner.type", kind, ("EpochBasedRunner", "IterBasedRunner"))
    by_epoch = kind == "EpochBasedRunner"
    unit = "max_epochs" if by_epoch else "max_iters"
    if not isinstance(runner.get(unit), int):
        raise ArchiveError(
            f"the config has no runner.{unit} (or total_epochs): nothing says how long to train"
        )
    evaluation = full.get("evaluation") or {}
    loop: dict[str, Any] = {
        "type": "EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop",
        unit: runner[unit],
        "val_interval": int(evaluation.get("interval", 1)),
    }
    if evaluation.get("start") is not None:
        loop["val_begin"] = evaluation["start"]
    made.members |= {"train_cfg": loop, "val_cfg": {"type": "ValLoop"}}
    made.note("runner" if full.get("runner") else "total_epochs", f"train_cfg.{unit}={runner[unit]}")
    if evaluation:
        made.note("evaluation.interval", f"train_cfg.val_interval={loop['val_interval']}")
    if any(phase[0] != "train" for phase in full.get("workflow") or ()):
        made.note("workflow", "nothing; losses of validation data are not computed")
    return int(runner[unit]), by_epoch


def _optimizer(full: Mapping[str, Any], made: Schedule) -> None:
    if not isinstance(full.get("optimizer"), Mapping):
        raise ArchiveError("the config has no optimizer: nothing says how to train")
    optimizer = dict(full["optimizer"])
    wrapper: dict[str, Any] = {"type": "OptimWrapper"}
    for name in ("paramwise_cfg", "constructor"):
        if name in optimizer:
            wrapper[name] = optimizer.pop(name)
    if wrapper.get("constructor") == "DefaultOptimizerConstructor":
        wrapper["constructor"] = "DefaultOptimWrapperConstructor"
    wrapper["optimizer"] = optimizer
    made.note("optimizer", f"optim_wrapper.optimizer={optimizer}")
    hook = full.get("optimizer_config") or {}
    kind = str(hook.get("type", "OptimizerHook"))
    if kind not in _OPTIMIZERS:
        raise _refuse("optimizer_config.type", kind, _OPTIMIZERS)
    if hook.get("grad_clip"):
        wrapper["clip_grad"] = dict(hook["grad_clip"])
        made.note("optimizer_config.grad_clip", f"optim_wrapper.clip_grad={wrapper['clip_grad']}")
    if hook.get("cumulative_iters"):
        wrapper["accumulative_counts"] = hook["cumulative_iters"]
        made.note("optimizer_config.cumulative_iters", "optim_wrapper.accumulative_counts")
    half = full.get("fp16")
    if half is not None or kind in _FP16_OPTIMIZERS:
        scale = (half or hook).get("loss_scale", "dynamic")
        wrapper |= {"type": "AmpOptimWrapper", "loss_scale": scale}
        made.note("fp16", f"optim_wrapper.type=AmpOptimWrapper optim_wrapper.loss_scale={scale}")
    made.members["optim_wrapper"] = wrapper


def _learning_rate(full: Mapping[str, Any], made: Schedule, length: int, *, by_epoch: bool) -> None:
    config = dict(full.get("lr_config") or {"policy": "fixed"})
    policy = str(config.pop("policy", "fixed")).lower().removesuffix("lrupdaterhook")
    warmup = {name: config.pop(name) for name in _WARMUP if name in config}
    by_epoch = bool(config.pop("by_epoch", by_epoch))
    schedulers = [] if policy == "yolox" else _warmup(warmup)  # which warms up in its own way
    begin = int(warmup["warmup_iters"]) if schedulers and not by_epoch else 0
    span = {"begin": begin, "end": length, "by_epoch": by_epoch}
    rate = float(full["optimizer"].get("lr", 0.0))
    match policy:
        case "fixed":
            pass
        case "step" if isinstance(config.get("step"), int):
            schedulers.append(
                {"type": "StepLR", "step_size": config["step"], "gamma": config.get("gamma", 0.1), **span}
            )
        case "step":
            steps = list(config.get("step", ()))
            schedulers.append(
                {"type": "MultiStepLR", "milestones": steps, "gamma": config.get("gamma", 0.1), **span}
            )
        case "exp":
            schedulers.append({"type": "ExponentialLR", "gamma": config["gamma"], **span})
        case "poly":
            power, least = config.get("power", 1.0), config.get("min_lr", 0.0)
            schedulers.append({"type": "PolyLR", "power": power, "eta_min": least, **span})
        case "cosineannealing":
            schedulers.append(
                {
                    "type": "CosineAnnealingLR",
                    "T_max": length - begin,
                    **_least(config),
                    **span,
                    **({"convert_to_iter_based": True} if by_epoch else {}),
                }
            )
        case "cyclic":
            schedulers += _cycle("CosineAnnealingLR", config, rate, length, (10, 1e-4), by_epoch=by_epoch)
        case "yolox":
            schedulers = _yolox(config, warmup, rate, length)
        case _:
            raise _refuse(
                "lr_config.policy",
                policy,
                ("fixed", "step", "exp", "poly", "CosineAnnealing", "cyclic", "YOLOX"),
            )
    momentum = dict(full.get("momentum_config") or {})
    if momentum:
        if str(momentum.get("policy", "")).lower() != "cyclic":
            raise _refuse("momentum_config.policy", momentum.get("policy"), ("cyclic",))
        optimizer = full["optimizer"]
        initial = float(optimizer.get("momentum", (optimizer.get("betas") or (0.9,))[0]))
        usual = (0.85 / 0.95, 1.0)
        schedulers += _cycle("CosineAnnealingMomentum", momentum, initial, length, usual, by_epoch=by_epoch)
        made.note("momentum_config", "param_scheduler with CosineAnnealingMomentum")
    made.members["param_scheduler"] = schedulers
    kinds = ", ".join(each["type"] for each in schedulers) or "[]"
    made.note("lr_config", f"param_scheduler with {kinds}")


def _warmup(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not given.get("warmup"):
        return []
    if "warmup_iters" not in given:
        raise ArchiveError("lr_config has a warmup without warmup_iters; add it")
    ratio = given.get("warmup_ratio", 0.1)
    unit = bool(given.get("warmup_by_epoch", False))
    span = {"by_epoch": unit, "begin": 0, "end": given["warmup_iters"]}
    match given["warmup"]:
        case "linear":
            return [{"type": "LinearLR", "start_factor": ratio, **span}]
        case "constant":
            return [{"type": "ConstantLR", "factor": ratio, **span}]
        case other:
            raise _refuse("lr_config.warmup", other, ("linear", "constant"))


def _least(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("min_lr_ratio") is not None:
        return {"eta_min_ratio": config["min_lr_ratio"]}
    return {"eta_min": config.get("min_lr", 0.0)}


def _cycle(
    kind: str,
    config: Mapping[str, Any],
    base: float,
    length: int,
    usual: tuple[float, float],
    *,
    by_epoch: bool,
) -> list[dict[str, Any]]:
    """Two halves of one cycle, as mmdet3d's ``cyclic-40e`` has them; ratios are of the initial value."""
    if config.get("cyclic_times", 1) != 1:
        raise _refuse("cyclic_times", config["cyclic_times"], ("1",))
    up = round(length * float(config.get("step_ratio_up", 0.4)))
    ratios = tuple(config.get("target_ratio", usual))
    if len(ratios) != 2:
        raise _refuse("target_ratio", ratios, ("two numbers",))
    halves = []
    for (begin, end), ratio in zip(((0, up), (up, length)), ratios, strict=True):
        halves.append(
            {
                "type": kind,
                "T_max": end - begin,
                "eta_min": base * ratio,
                "begin": begin,
                "end": end,
                "by_epoch": by_epoch,
                **({"convert_to_iter_based": True} if by_epoch else {}),
            }
        )
    return halves


def _yolox(
    config: Mapping[str, Any], warmup: Mapping[str, Any], rate: float, length: int
) -> list[dict[str, Any]]:
    """Quadratic warm-up, cosine, and a constant rate at the end, as mmdet's YOLOX configs of today have them."""
    last, first = int(config.get("num_last_epochs", 15)), int(warmup.get("warmup_iters", 5))
    iters = {"convert_to_iter_based": True}
    return [
        {"type": "mmdet.QuadraticWarmupLR", "by_epoch": True, "begin": 0, "end": first, **iters},
        {
            "type": "CosineAnnealingLR",
            "eta_min": rate * float(config.get("min_lr_ratio", 0.05)),
            "begin": first,
            "T_max": length - last - first,
            "end": length - last,
            "by_epoch": True,
            **iters,
        },
        {"type": "ConstantLR", "by_epoch": True, "factor": 1, "begin": length - last, "end": length},
    ]


def _hooks(full: Mapping[str, Any], made: Schedule, prefix: str, *, by_epoch: bool) -> None:
    hooks: dict[str, Any] = {}
    checkpoint = {
        name: value for name, value in (full.get("checkpoint_config") or {}).items() if name in _CHECKPOINT
    }
    evaluation = full.get("evaluation") or {}
    hook = {"type": "CheckpointHook", "interval": 1, "by_epoch": by_epoch, **checkpoint}
    if full.get("checkpoint_config"):
        made.note("checkpoint_config", f"default_hooks.checkpoint={checkpoint}")
    best = evaluation.get("save_best")
    if best is not None:
        named = best if best == "auto" or "/" in str(best) or not prefix else f"{prefix}/{_figure(str(best))}"
        hook |= {"save_best": named, **({"rule": evaluation["rule"]} if evaluation.get("rule") else {})}
        made.note("evaluation.save_best", f"default_hooks.checkpoint.save_best={named}")
    if evaluation.get("out_dir"):
        hook.setdefault("out_dir", evaluation["out_dir"])
        made.note("evaluation.out_dir", f"default_hooks.checkpoint.out_dir={hook['out_dir']}")
    hooks["checkpoint"] = hook
    logs = full.get("log_config") or {}
    logger: dict[str, Any] = {"type": "LoggerHook", "interval": int(logs.get("interval", 50))}
    backends = [{"type": "LocalVisBackend"}]
    for one in logs.get("hooks") or ():
        kind = str(one.get("type"))
        if kind not in _LOGGERS:
            raise _refuse("log_config.hooks", kind, tuple(_LOGGERS))
        if _LOGGERS[kind] is None:
            logger |= {name: one[name] for name in ("out_dir", "keep_local") if name in one}
        else:
            extra = {"init_kwargs": one["init_kwargs"]} if one.get("init_kwargs") else {}
            backends.append({"type": str(_LOGGERS[kind]), **extra})
    hooks["logger"] = logger
    if logs:
        made.note("log_config", f"default_hooks.logger={logger}" + (", vis_backends" if backends[1:] else ""))
    made.members |= {"default_hooks": hooks, "vis_backends": backends}
    custom = [_custom_hook(dict(one)) for one in full.get("custom_hooks") or ()]
    made.members["custom_hooks"] = [one for one in custom if one is not None]


def _figure(name: str) -> str:
    """Today's name of a figure that 2.x called ``bbox`` or ``bbox_mAP``."""
    return f"{name}_mAP" if name in ("bbox", "segm") else name


def _custom_hook(hook: dict[str, Any]) -> dict[str, Any] | None:
    """Convert a hook of the user's; None for one that today's runner has no need of."""
    import mmdet.engine.hooks  # noqa: F401  (fills the registry)
    from mmdet.registry import HOOKS

    kind = str(hook.get("type"))
    if kind == "SetEpochInfoHook" or kind == "NumClassCheckHook":
        return None  # both are covered: the loop sets epochs, and classes are checked before the training
    if kind in ("ExpMomentumEMAHook", "LinearMomentumEMAHook"):
        made = {"type": "EMAHook", "update_buffers": True, "priority": hook.get("priority", 49)}
        if kind == "ExpMomentumEMAHook":
            made["ema_type"] = "mmdet.ExpMomentumEMA"
        return {**made, **({"momentum": hook["momentum"]} if "momentum" in hook else {})}
    hook.pop("resume_from", None)
    if HOOKS.get(kind) is None:
        raise ArchiveError(
            f"custom_hooks has {kind}, which mmdet 2.x had and mmdet 3 has not; leave it out, or write one of today's"
        )
    return hook


def _environment(full: Mapping[str, Any], made: Schedule) -> None:
    environment: dict[str, Any] = {
        "cudnn_benchmark": bool(full.get("cudnn_benchmark", False)),
        "mp_cfg": {
            "mp_start_method": full.get("mp_start_method", "fork"),
            "opencv_num_threads": full.get("opencv_num_threads", 0),
        },
        "dist_cfg": {"backend": "nccl", **(full.get("dist_params") or {})},  # its port is Slurm's
    }
    made.members["env_cfg"] = environment
    if full.get("seed") is not None:
        made.members["randomness"] = {"seed": full["seed"], "deterministic": bool(full.get("deterministic"))}
        made.note("seed", f"randomness.seed={full['seed']}")
    if full.get("resume_from"):
        made.members |= {"load_from": full["resume_from"], "resume": True}
        made.note("resume_from", f"resume=True load_from={full['resume_from']}")
