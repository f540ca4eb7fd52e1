# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-not-found"
"""Own the first moments of a Python process below `pagefold run`, which puts this folder in front of PYTHONPATH.

Any interpreter may come by, also one too old for pagefold: this is written for all, says at most one line, and never ends a process.
Must not know: anything of pagefold but where it lies and `startup.begin`.
"""

import sys

_HERE = __file__.rpartition("/")[0]
_OLDEST = (3, 11)


class _Lender:
    """Lends a worker whose interpreter has no pagefold this one, and nothing else that lies beside it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "pagefold":
            return None
        from importlib.util import spec_from_file_location

        folder = _HERE.rpartition("/live/")[0]
        return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])


def _begin():
    if sys.version_info < _OLDEST:
        return
    try:
        sys.meta_path.append(_Lender)
        from pagefold.live import startup

        startup.begin()
    except Exception as error:
        text = " ".join(str(error).split())
        sys.stderr.write("pagefold: not started in this process: " + (text or type(error).__name__) + "\n")


def _chain():
    """Run the sitecustomize that would have run without us, in our place and under its name; its errors are its own."""
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401  (not this one: that is out of reach now)
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


_begin()
_chain()
