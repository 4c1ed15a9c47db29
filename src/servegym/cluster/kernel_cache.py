"""Where compiled kernels are kept on disk, also where the package's own folder is read-only.

Numba refuses to import a module whose kernels it can keep nowhere, and ignores a cache that it
cannot write. Both happen in a container with a read-only root: there the kernels that the image
was built with are read, and what is missing is kept in a temporary folder, or not at all.
"""

from __future__ import annotations

import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    NullCache,
    _CacheLocator,
    _SourceFileBackedLocatorMixin,
)
from numba.misc.appdirs import AppDirs

_config: Any = numba.config
#: What reading half a file raises. It is no reason to stop: the kernel is compiled anew.
_TORN = (EOFError, pickle.UnpicklingError, ValueError, AttributeError, ImportError)


def places(source: Path) -> tuple[list[Path], Path | None]:
    """Say where kernels of a source file are looked for, and where new ones are kept.

    Numba's order: NUMBA_CACHE_DIR, `__pycache__` beside the source, the user's cache; then a
    temporary folder. The first that can be written ends the list; those before it are read.

    Args:
        source: A Python file.

    Returns:
        Folders to read, and the one to write, None if there is none.
    """
    below = _CacheLocator.get_suitable_cache_subpath(str(source))
    known = [source.parent / "__pycache__", Path(_user_folder()) / below]
    if _config.CACHE_DIR:
        known.insert(0, Path(_config.CACHE_DIR) / below)
    for number, folder in enumerate(known):
        if is_writable(folder):
            return known[: number + 1], folder
    temporary = private_folder(tempfile.gettempdir)
    if temporary is None or not is_writable(temporary / below):
        return known, None
    return [*known, temporary / below], temporary / below


def _user_folder() -> str:
    folder: str = AppDirs(appname="numba", appauthor=False).user_cache_dir
    return folder


@cache
def is_writable(folder: Path) -> bool:
    """Try to write into a folder, which is made if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def private_folder(temporary: Callable[[], str]) -> Path | None:
    """Return a folder for temporary files that nobody else can write: what is in it is run."""
    try:
        user = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(temporary()) / f"servegym-kernels-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    safe = os.name == "nt" or (found.st_uid == user and not found.st_mode & 0o022)
    return folder if safe and stat.S_ISDIR(found.st_mode) else None


class _Locator(_SourceFileBackedLocatorMixin, _CacheLocator):
    """Names the files of a kernel as Numba does; where they are is `KernelCache`'s."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file = py_file
        self._lineno = py_func.__code__.co_firstlineno

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str:
        return str(Path(self._py_file).parent / "__pycache__")


class _Implementation(CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_Locator]  # noqa: RUF012


class KernelCache(FunctionCache):
    """Numba's cache of one function, over all the places that it may be in.

    Args:
        py_func: The function.
        source: Its file.
        not_kept: Called with the reason when what was compiled cannot be written.
    """

    _impl_class = _Implementation

    def __init__(self, py_func: Any, source: Path, not_kept: Callable[[str], None]) -> None:
        super().__init__(py_func)  # type: ignore[no-untyped-call]
        self._not_kept = not_kept
        readable, self._target = places(source)
        base, stamp = self._impl.filename_base, self._impl.locator.get_source_stamp()
        self._files = [IndexDataCacheFile(str(folder), base, stamp) for folder in readable]
        self._cache_path = str(self._target) if self._target else ""

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        if not self._enabled:
            return None
        key = self._index_key(sig, target_context.codegen())  # type: ignore[no-untyped-call]
        for file in self._files:
            try:
                data = file.load(key)
                if data is not None:
                    return self._impl.rebuild(target_context, data)
            except (OSError, *_TORN):
                continue
        return None

    def _save_overload(self, sig: Any, data: Any) -> None:
        if not self._enabled or not self._impl.check_cachable(data):
            return
        if self._target is None:
            self._not_kept("no folder for them can be written")
            return
        key = self._index_key(sig, data.codegen)  # type: ignore[no-untyped-call]
        content = self._impl.reduce(data)
        file = self._files[-1]
        try:
            try:
                file.save(key, content)
            except _TORN:
                file.flush()
                file.save(key, content)
        except OSError as error:
            self._not_kept(f"{self._target}: {error.strerror}")


def cache_of(py_func: Any, not_kept: Callable[[str], None]) -> FunctionCache | NullCache:
    """Return the cache of a function; one that was typed at a prompt may have none."""
    source = Path(py_func.__code__.co_filename)
    if source.is_file() and not getattr(_config, "CACHE_LOCATOR_CLASSES", ""):
        return KernelCache(py_func, source.absolute(), not_kept)
    try:
        return FunctionCache(py_func)
    except RuntimeError:  # Numba knows no place for it
        return NullCache()
