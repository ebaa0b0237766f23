"""Audit hook under which the model of an archive that is not trusted is built and run.

A config chooses among registered classes and sets their arguments. Some of these classes do more with an argument than
compute: they evaluate it, execute or unpickle the file it names, download it. Instead of a list of them, the rule is on
what happens: while a `BuildGuard` is entered, Python's audit events (PEP 578) of its thread are compared with what
building and running a network needs, and anything else raises. The events that are refused include:

    compile, exec           a text or a code object, except those of modules of the environment
    open                    files outside of the environment, all files of the archive, writing
    import                  of an extension module outside of the environment
    pickle.find_class       unpickling of anything but numbers and text
    socket.*, subprocess.*, os.*, ctypes.*, _thread.*, …   whatever is not known to be harmless

Modules of the environment may read files, load libraries and define classes while they are imported, and numba while it
compiles a kernel; the config has no say in that. Other threads are not watched, and none may be started. A refusal that
the network's own code swallows still fails the build.

An audit hook cannot be removed: outside of a guard it costs one look at an empty dictionary per event.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Self

from serve.errors import ArchiveError

__all__ = ["BuildGuard"]

# Events without an effect beyond the interpreter.
_HARMLESS = frozenset(
    {
        *("array.__new__", "builtins.id", "code.__new__", "function.__new__", "marshal.loads", "mmap.__new__"),
        *("object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "sys._getframemodulename"),
        *("sys._current_frames", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.unraisablehook"),
        *("glob.glob", "glob.glob/2", "os.listdir", "os.scandir", "os.walk", "os.fwalk", "pathlib.Path.glob"),
        *("pathlib.Path.rglob", "tempfile.mkstemp", "tempfile.mkdtemp", "time.sleep", "cpython._PySys_ClearAuditHooks"),
        *("ctypes.addressof", "ctypes.get_errno", "ctypes.set_errno", "sys.excepthook", "os.getxattr", "os.listxattr"),
    }
)  # fmt: skip
# What a module of the environment may do while it is imported, and numba while it compiles.
_ALLOWED_TO_MODULES = frozenset(
    {
        *("compile", "exec", "open", "import", "pickle.find_class", "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata"),
        *("ctypes.dlsym/handle", "ctypes.call_function", "ctypes.cdata/buffer", "ctypes.string_at"),
    }
)  # fmt: skip
_ALLOWED_TO_NUMBA = _ALLOWED_TO_MODULES | {
    *("os.mkdir", "os.rename", "os.remove", "os.utime", "os.chmod", "shutil.rmtree"),
}
_READABLE = (
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system",
    "/dev/null",
    "/dev/urandom",
)
_BOOTSTRAP = "<frozen importlib._bootstrap"
_MAX_SHOWN_CHARS = 120

_entered: dict[int, BuildGuard] = {}
_install_lock = threading.Lock()
_installed = False
_dont_write_bytecode = False  # as it was before the first guard


class BuildGuard:
    """Context manager: inside, this thread can do no more than building and running a network needs.

    It may be entered several times, one after the other or nested.

    Attributes:
        refusal: what was refused first, as a message; None if nothing was.
    """

    def __init__(self, root: Path | None, config: Mapping[str, Any], *, refuse: bool = True) -> None:
        """Guard the building of a model.

        Args:
            root: folder of its unpacked archive, none of whose files may be opened; None without one.
            config: is searched for the keys in messages.
            refuse: whether to raise; else only `refusal` is set.
        """
        self.refusal: str | None = None
        self._root = os.path.realpath(root) if root is not None else "\0"
        self._config = config
        self._refuse = refuse
        self._entry: FrameType | None = None
        self._depth = 0
        self._busy = False

    def __enter__(self) -> Self:
        """Begin to watch this thread."""
        _install()
        if self._depth == 0:
            if self._refuse:
                self.refusal = None
            self._entry = sys._getframe(1)
            _enter(self)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it.

        Raises:
            ArchiveError: something was refused inside, whether or not that was caught there.
        """
        self._depth -= 1
        if self._depth == 0:
            _leave()
            self._entry = None
        if self._refuse and self.refusal is not None:
            raise ArchiveError(self.refusal) from value

    def _check(self, event: str, details: tuple[Any, ...]) -> None:
        if self._busy or event in _HARMLESS:
            return
        self._busy = True  # looking up a path raises events, too
        try:
            if not self._allows(event, details):
                self.refusal = self.refusal or self._describe(event, details)
                if self._refuse:
                    raise ArchiveError(self.refusal)
        finally:
            self._busy = False

    def _allows(self, event: str, details: tuple[Any, ...]) -> bool:
        return self._allows_network(event, details) or self._inside(_KERNELS)

    def _allows_network(self, event: str, details: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = details
            if isinstance(path, int):
                return True  # a file that is open
            return self._may_open(path, mode, flags) or self._inside(_NUMBA)
        if event == "import":
            return details[1] is None or _is_environment(details[1])
        if event in ("compile", "exec"):
            return self._may_execute(event, details)
        if event in _ALLOWED_TO_MODULES and self._inside(_BOOTSTRAP):
            return True
        return (event in _ALLOWED_TO_NUMBA or event.startswith("ctypes.")) and self._inside(_NUMBA)

    def _may_open(self, path: Any, mode: Any, flags: Any) -> bool:
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        if real == os.devnull:
            return True
        writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        writes = writes or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
        if writes or _is_below(real, (self._root,)):
            return False
        known = _is_environment(real) or _is_below(real, _READABLE) or _is_loaded_source(real)
        return known or self._inside(_BOOTSTRAP)

    def _may_execute(self, event: str, details: tuple[Any, ...]) -> bool:
        code = details[0] if event == "exec" else None
        if isinstance(code, CodeType):
            file = code.co_filename
            if file.startswith("<frozen "):
                return True
            if os.path.isabs(file):
                return _is_environment(os.path.realpath(file))
        caller = next(self._frames(), None)
        if caller is not None:
            file = os.path.realpath(caller.f_code.co_filename)
            if file in _CODE_WRITERS or (
                event == "compile" and file == _AST and caller.f_code.co_name == "parse"
            ):
                return True
        return self._inside(_BOOTSTRAP) or self._inside(_NUMBA)

    def _frames(self) -> Iterator[FrameType]:
        """Frames from the event outwards, up to where the guard was entered."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._entry:
            if frame.f_globals is not globals():
                yield frame
            frame = frame.f_back

    def _inside(self, place: str | tuple[str, ...]) -> bool:
        """Whether code of a file, or of a folder that ends with a slash, is at work between the guard and the event."""
        return any(frame.f_code.co_filename.startswith(place) for frame in self._frames())

    def _describe(self, event: str, details: tuple[Any, ...]) -> str:
        shown = ", ".join(_shorten(detail) for detail in details if detail is not None)
        return (
            f"{self._key()} does more than a network may: it causes '{event}' ({shown}) while the archive is "
            "loaded, which is not trusted; set MMDET3D_SERVE_TRUST_ARCHIVE_CODE=1 if you trust its author"
        )

    def _key(self) -> str:
        """Path in the config of what is being built, and its type."""
        kinds: list[str] = []
        for frame in self._frames():
            if frame.f_code.co_name == "build_from_cfg":
                cfg = frame.f_locals.get("cfg")
                if isinstance(cfg, Mapping):
                    kinds.insert(0, str(cfg.get("type"))[:_MAX_SHOWN_CHARS])
        if not kinds:
            return "the config"
        found = _find(self._config, kinds)
        return f"{found} ({kinds[-1]})" if found else kinds[-1]


def _enter(guard: BuildGuard) -> None:
    """Watch this thread, and keep Python from writing the bytecode of modules that are imported meanwhile."""
    global _dont_write_bytecode
    with _install_lock:
        if not _entered:
            _dont_write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        _entered[threading.get_ident()] = guard


def _leave() -> None:
    with _install_lock:
        del _entered[threading.get_ident()]
        if not _entered:
            sys.dont_write_bytecode = _dont_write_bytecode


def _install() -> None:
    global _installed
    with _install_lock:
        if not _installed:
            sys.addaudithook(_hook)
            _audit_threads()
            _installed = True


def _audit_threads() -> None:
    """Raise the event of a starting thread, which Python does itself from 3.12 on."""
    for name in ("_start_new_thread", "_start_joinable_thread"):
        start = getattr(threading, name, None)
        if start is not None:
            setattr(threading, name, _audited(start))


def _audited(start: Callable[..., Any]) -> Callable[..., Any]:
    def start_thread(*arguments: Any, **named: Any) -> Any:
        _hook("_thread.start_new_thread", arguments[:1])
        return start(*arguments, **named)

    return start_thread


def _hook(event: str, details: tuple[Any, ...]) -> None:
    if not _entered:
        return
    guard = _entered.get(threading.get_ident())
    if guard is not None:
        guard._check(event, details)


def _environment() -> tuple[str, ...]:
    """Folders of the standard library, of installed packages, and of this project."""
    folders = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    folders += [str(_PROJECT / "serve"), str(_PROJECT / "handlers")]
    return tuple({os.path.realpath(folder) for folder in folders})


def _numba_folder() -> str:
    spec = importlib.util.find_spec("numba")
    assert spec is not None and spec.origin is not None, "the kernels need numba"
    return os.path.dirname(spec.origin) + os.sep


_PROJECT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = _environment()
_NUMBA = _numba_folder()
# They compile and cache kernels, and run them in threads; they take tensors, and no text of a config.
_KERNELS = tuple(str(Path(__file__).parents[1] / "ops" / name) + os.sep for name in ("cpu", "triton"))
# They define methods from names that they have checked.
_CODE_WRITERS = frozenset(
    os.path.realpath(os.path.join(sysconfig.get_path("stdlib"), name))
    for name in ("dataclasses.py", "collections/__init__.py")
)
# Its `parse` makes a syntax tree, which only another `compile` makes executable. Tracebacks read their lines with it.
_AST = os.path.realpath(os.path.join(sysconfig.get_path("stdlib"), "ast.py"))


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _is_environment(path: Any) -> bool:
    try:
        return _is_below(os.path.realpath(os.fsdecode(path)), _ENVIRONMENT)
    except (TypeError, ValueError):
        return False


def _is_loaded_source(path: str) -> bool:
    """Whether `path` is the source of a module that runs already: warnings and tracebacks read their lines."""
    return any(getattr(module, "__file__", None) == path for module in list(sys.modules.values()))


def _shorten(detail: Any) -> str:
    if isinstance(detail, str | bytes | os.PathLike | int | float | bool | tuple | list):
        return repr(detail)[:_MAX_SHOWN_CHARS]
    if isinstance(detail, CodeType):
        return f"code of {detail.co_filename}"[:_MAX_SHOWN_CHARS]
    return type(detail).__name__


def _find(part: Any, kinds: list[str], path: str = "") -> str | None:
    """Path of a dictionary in a config with the last of some nested types."""
    if isinstance(part, Mapping):
        if str(part.get("type")) == kinds[0]:
            if len(kinds) == 1:
                return path
            kinds = kinds[1:]
        children: Any = ((f"{path}.{key}" if path else str(key), value) for key, value in part.items())
    elif isinstance(part, list | tuple):
        children = ((f"{path}[{i}]", value) for i, value in enumerate(part))
    else:
        return None
    return next((found for where, value in children if (found := _find(value, kinds, where))), None)
