"""Own how compiled functions are put together: every inner function once, optimised only inside the entries that use it.

Numba by itself links everything a function calls into that function's own module, optimises all of it and makes machine
code of it, for each function anew: the core's depth of calls made that 85 s where this way takes
15 s (2 cores, empty cache). Inner functions are never called from Python, so nothing of that work is ever
used. Here the module of an inner function is kept as it was lowered; an entry links all of them once and is optimised as a whole.

This reaches into Numba below its public names. If they are not what is expected here, `DEFERRED` is False and the core
is compiled Numba's own way: slower to compile, otherwise the same.
"""

from __future__ import annotations

import threading
from typing import Any

from numba import config
from numba.core import codegen, types
from numba.core.compiler import Compiler

_state = threading.local()
_Library: Any = getattr(codegen, "CPUCodeLibrary", None)
_Codegen: Any = getattr(codegen, "JITCPUCodegen", None)
_NEEDED = (
    "finalize",
    "_optimize_functions",
    "_optimize_final_module",
    "_finalize_dynamic_globals",
    "_raise_if_finalized",
    "_get_module_for_linking",
)
DEFERRED = bool(
    not getattr(config, "DISABLE_JIT", False)
    and _Library is not None
    and all(hasattr(_Library, name) for name in _NEEDED)
    and hasattr(_Codegen, "set_env")
    and hasattr(Compiler, "_compile_core")
)


class InnerCompiler(Compiler):
    """Numba's compiler, with the libraries it makes left unlinked and not yet machine code."""

    def _compile_core(self) -> Any:
        depth = getattr(_state, "depth", 0)
        _state.depth = depth + 1
        try:
            return super()._compile_core()  # type: ignore[no-untyped-call]
        finally:
            _state.depth = depth


def _with_all_below(library: Any) -> list[Any]:
    """Return the libraries that `library` links, and those that they would have linked, each once."""
    found: dict[int, Any] = {}
    waiting = list(library._linking_libraries)
    while waiting:
        one = waiting.pop(0)
        if id(one) not in found:
            found[id(one)] = one
            if getattr(one, "_pagefold_deferred", False):
                waiting.extend(one._linking_libraries)
    return list(found.values())


def _names_below(library: Any) -> set[str]:
    """Return the functions that deferred libraries bring into this one's module.

    They are made private to it, so that LLVM may drop what they are passed and do not use: a world is 84 machine words.
    """
    deferred = [one for one in library._linking_libraries if getattr(one, "_pagefold_deferred", False)]
    return {
        function.name for one in deferred for function in one._final_module.functions if not function.is_declaration
    }


def _install() -> None:
    """Teach Numba's code library the deferred way, for inner functions of this package only."""
    plain_finalize = _Library.finalize
    plain_optimize_functions = _Library._optimize_functions
    plain_optimize = _Library._optimize_final_module
    plain_set_env = _Codegen.set_env

    def finalize(self: Any) -> None:
        if getattr(_state, "depth", 0):
            self._raise_if_finalized()
            self._finalize_dynamic_globals()
            self._pagefold_deferred = True
            self._finalized = True
        else:
            if any(getattr(one, "_pagefold_deferred", False) for one in self._linking_libraries):
                self._linking_libraries = _with_all_below(self)
            plain_finalize(self)

    def optimize(self: Any) -> None:
        below = _names_below(self)
        for function in self._final_module.functions:
            if function.name in below and not function.is_declaration:
                function.linkage = "internal"
        plain_optimize(self)

    def set_env(self: Any, env_name: str, env: Any) -> None:
        # The environment of a deferred function has no address yet, and is only needed to raise exceptions.
        if getattr(_state, "depth", 0) == 0:
            plain_set_env(self, env_name, env)

    def optimize_functions(self: Any, module: Any) -> None:
        # An entry optimises all of it together; doing each function alone before saved nothing.
        if getattr(_state, "depth", 0):
            module.data_layout = self._codegen._data_layout
        else:
            plain_optimize_functions(self, module)

    _Library.finalize = finalize
    _Library._optimize_functions = optimize_functions
    _Library._optimize_final_module = optimize
    _Codegen.set_env = set_env


def widen(dispatcher: Any) -> None:
    """Let an inner function have one compiled form for all widths of integers: arguments are cast to int64 at the call.

    Fields of records are narrow, sums of them wide: without this most functions would be compiled two to eight times over.
    """
    plain = dispatcher.get_call_template

    def get_call_template(args: Any, kws: Any) -> Any:
        return plain(tuple(_wide(one) for one in args), kws)

    dispatcher.get_call_template = get_call_template


def _wide(one: Any) -> Any:
    """Return int64 for every integer type but uint64 (contents), and any other type as it is."""
    plain = types.unliteral(one)  # type: ignore[no-untyped-call]
    return types.int64 if isinstance(plain, types.Integer) and plain != types.uint64 else plain


if DEFERRED and not getattr(_Library, "_pagefold_installed", False):
    _install()
    _Library._pagefold_installed = True
