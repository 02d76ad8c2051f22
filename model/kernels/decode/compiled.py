"""How the loops of this package are compiled, and where the machine code is kept between processes.

numba keys its cache by the file of a function alone, but functions of other files are compiled into it. So all files of this package
together name the directory: code that changed anywhere is compiled anew, and what older code left is not found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config as numba_config
from numba import njit

_config: Any = numba_config
_PACKAGE = Path(__file__).parent


def _place() -> str | None:
    """Find a writable directory: where NUMBA_CACHE_DIR says, else beside this file, else in the user's cache; None without one."""
    sources = b"".join(path.read_bytes() for path in sorted(_PACKAGE.glob("*.py")))
    name = "decode-" + hashlib.blake2b(sources, digest_size=8).hexdigest()
    wanted = Path(_config.CACHE_DIR) if _config.CACHE_DIR else _PACKAGE / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4-post-training"
    for root in (wanted, user):
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root / name, os.W_OK):
            return str(root / name)
    return None


_PLACE = _place()


def compiled(*, exactly: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call, without Python's lock and without numba's run time.

    Nothing is allocated and no view of a row is counted, which took a seventh of a step. Where no directory is writable every process
    compiles for itself.

    Args:
        exactly: keep the order of sums and differences as written; otherwise they may be reordered into vectors. Infinities and NaNs
            keep their meaning either way.
    """
    fast = {"contract"} if exactly else {"reassoc", "contract", "nsz"}
    compiler = njit(nogil=True, error_model="numpy", cache=_PLACE is not None, fastmath=fast, _nrt=False)  # type: ignore[call-overload]

    def decorate(function: Callable[..., Any]) -> Any:
        before, _config.CACHE_DIR = _config.CACHE_DIR, _PLACE or _config.CACHE_DIR
        try:
            return compiler(function)
        finally:
            _config.CACHE_DIR = before

    return decorate
