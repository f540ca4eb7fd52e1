"""Own the guest's first and only file system: the interpreter that runs us, what it links to, and the modules two programs need.

Small is fast: a slow processor copies every byte twice (10 MB: 0.1 s). So only modules that init and the program can reach, as byte code
(to compile in the guest takes longer than its boot), and shared objects cut after the last byte that is loaded, which drops debug
information. A program that names packages gets those and the standard library whole. Archives are kept in the cache under a hash of all
they are made from.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import marshal
import modulefinder
import os
import stat
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from kernelguest import cpio, packages
from kernelguest.cache import stored
from kernelguest.errors import GuestError

_INIT = Path(__file__).with_name("init.py")
_KEPT = 16  # archives in the cache; an old one is one build away
_KEPT_LARGE = 2  # of those with packages: 80 MB with NumPy alone
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = f"usr/bin/{_VERSION}"
INIT = "init.pyc"
PROGRAM = "program.pyc"
_STDLIB = f"usr/{sys.platlibdir}/{_VERSION}"
_SITE = f"{_STDLIB}/site-packages"
_START = ("encodings", "encodings.aliases", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "os")
# 5 MB of OpenSSL for what hashlib does without it; a program that wants it imports it.
_HEAVY = ("_hashlib",)


def build(program: Path, cache: Path, also: Sequence[Path] = ()) -> Path:
    """Return an archive in which `program` runs and can import the packages `also`, from the cache if it is there.

    GuestError if the program does not compile or a package is not there.
    """
    program = program.resolve()
    packages.check(also)
    key = _key(program, also)
    kind, kept = ("packages", _KEPT_LARGE) if also else ("initramfs", _KEPT)
    return stored(cache, kind, key, kept, lambda: cpio.archive(cpio.with_parents(_entries(program, also))))


def _key(program: Path, also: Sequence[Path]) -> str:
    """Hash what an archive is made from; the interpreter and packages by their files' sizes and times: to read them takes too long."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (Path(__file__), _INIT, Path(cpio.__file__), Path(packages.__file__)):
        digest.update(path.read_bytes())
    for path in (_interpreter(), Path(os.__file__), _extensions(), *packages.files(also).values()):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    for path in _own_modules(program):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _own_modules(program: Path) -> list[Path]:
    """Return a program and the modules beside it that it imports, and so on."""
    found, new = [], [program]
    while new:
        path = new.pop()
        found.append(path)
        beside = [program.parent / f"{name}.py" for name in sorted(_imported(path))]
        new += [other for other in beside if other.is_file() and other not in (*found, *new)]
    return found


def _interpreter() -> Path:
    """Return the interpreter's real file; in a virtual environment that of the Python it was made from."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


def _extensions() -> Path:
    """Return the folder of the interpreter's extension modules; a virtual environment has none."""
    return Path(sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})) / "lib-dynload"


def _entries(program: Path, also: Sequence[Path]) -> Iterable[cpio.Entry]:
    scripts = {PROGRAM: _compile(program, "/program.py"), INIT: _compile(_INIT, "/init.py")}
    modules = _modules(program)
    extensions = [path for path in modules.values() if isinstance(path, Path)]
    installed = _installed(also)
    yield from (cpio.directory(name) for name in ("dev", "proc", "sys", "tmp"))
    yield cpio.Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield cpio.symlink("lib64", "lib")
    yield cpio.regular(PYTHON, loaded_part(_interpreter().read_bytes()), executable=True)
    linked = [path for path in installed.values() if ".so" in path.suffixes]
    libraries = shared_libraries(linked, optional=True) if linked else {}
    for name, library in (libraries | shared_libraries([_interpreter(), *extensions])).items():
        yield cpio.regular(f"lib/{name}", loaded_part(library.read_bytes()), executable=True)
    yield cpio.directory(f"{_STDLIB}/lib-dynload")
    for name, module in modules.items():
        if isinstance(module, Path):
            yield cpio.regular(f"{_STDLIB}/lib-dynload/{module.name}", loaded_part(module.read_bytes()))
        else:
            yield cpio.regular(f"{_STDLIB}/{name}", _pyc(module))
    for name, file in installed.items():
        yield _placed(name, file)
    for path, code in scripts.items():
        yield cpio.regular(path, _pyc(code))
    yield cpio.regular("program.py", program.read_bytes())  # for the lines in a traceback


def _installed(also: Sequence[Path]) -> dict[str, Path]:
    """Return by its path in the guest each file that comes with packages: theirs, and the whole standard library's."""
    if not also:
        return {}
    extensions = {f"{_STDLIB}/lib-dynload/{path.name}": path for path in packages.extensions(_extensions())}
    library = {f"{_STDLIB}/{name}": path for name, path in packages.library().items()}
    return extensions | library | {f"{_SITE}/{name}": path for name, path in packages.files(also).items()}


def _placed(name: str, path: Path) -> cpio.Entry:
    """Return the entry for a file of a package: byte code of a module, what is loaded of a shared object, all of anything else."""
    data = path.read_bytes()
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError, ValueError):  # a template, or for another Python: no module to us
            return cpio.regular(f"{name}c", _pyc(compile(data, f"/{name}", "exec", dont_inherit=True)))
    return cpio.regular(name, loaded_part(data), executable=os.access(path, os.X_OK))


def _compile(path: Path, name: str) -> CodeType:
    return compile(_source(path), name, "exec", dont_inherit=True)


def _source(path: Path) -> bytes:
    """Return a program's text; GuestError if it cannot be read or does not compile."""
    try:
        source = path.read_bytes()
        ast.parse(source)
    except OSError as error:
        raise GuestError(f"the program {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise GuestError(f"the program does not compile: {where}: {getattr(error, 'msg', error)}") from None
    return source


def _pyc(code: CodeType) -> bytes:
    """Return a .pyc that is imported without its source; the time and size in its header are then not looked at."""
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


class _Finder(modulefinder.ModuleFinder):
    """Follow imports inside functions only from the program and from the packages that it names itself.

    Half of the standard library is reached from functions that no guest calls (pickle to doctest to pdb to asyncio). One that is called
    after all fails with the module's name; a program then imports it by name.
    """

    def __init__(self, named: set[str], beside: Path, stdlib: str) -> None:
        super().__init__(
            path=[str(beside), stdlib, str(_extensions())],
            excludes=[name for name in _HEAVY if name not in named],
            replace_paths=[(stdlib, f"/{_STDLIB}"), (str(beside), f"/{_STDLIB}")],
        )
        self._named = named

    def scan_code(self, co: CodeType, m: Any) -> None:
        """Scan a module's code, or a class's, which run at import; a function's if it is one of those."""
        if not co.co_flags & inspect.CO_OPTIMIZED or m.__name__.partition(".")[0] in self._named:
            super().scan_code(co, m)


def _modules(program: Path) -> dict[str, CodeType | Path]:
    """Return what must be there: byte code by its path in the library, and extension modules by their file."""
    named = {"__main__"}.union(*map(_imported, _own_modules(program)))
    finder = _Finder(named, program.parent, sysconfig.get_path("stdlib"))
    for script in (_INIT, program):
        finder.run_script(str(script))
    for name in _START:
        finder.import_hook(name)
    found: dict[str, CodeType | Path] = {}
    modules: dict[str, Any] = finder.modules
    for name, module in sorted(modules.items()):
        if name == "__main__" or not module.__file__:
            continue
        if module.__code__ is None:
            found[name] = Path(module.__file__)
        else:
            stem = name.replace(".", "/")
            found[f"{stem}/__init__.pyc" if module.__path__ else f"{stem}.pyc"] = module.__code__
    return found


def _imported(path: Path) -> set[str]:
    """Return the packages and top-level modules that a program names in its imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(_source(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def shared_libraries(files: Iterable[Path], optional: bool = False) -> dict[str, Path]:
    """Return all that these load, by the name under which it is looked up, with the loader itself.

    GuestError if one is not found, unless that is optional: packages bring modules for libraries that few have.
    """
    listing = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    found: dict[str, Path] = {}
    for line in listing.splitlines():
        words = line.split()
        if words[1:2] == ["=>"] and words[2].startswith("/"):
            found[words[0]] = Path(words[2])
        elif words and words[0].startswith("/") and not words[0].endswith(":"):
            found[Path(words[0]).name] = Path(words[0])
        elif words[1:] == ["=>", "not", "found"] and not optional:
            raise GuestError(f"{words[0]} is needed by this Python and not found; repair the Python installation")
    return found


def loaded_part(data: bytes) -> bytes:
    """Return an ELF file up to the last byte of a program header, without its table of sections; anything else as it is.

    The loader reads program headers alone. What follows is for debuggers: of a pyenv libpython four fifths.
    """
    if data[:5] != b"\x7fELF\x02":
        return data
    offset, size, count = (*struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54))
    headers = (struct.unpack_from("<QQQQ", data, offset + size * index + 8) for index in range(count))
    end = max(file_offset + file_size for file_offset, _, _, file_size in headers)
    cut = bytearray(data[: max(end, offset + size * count)])
    struct.pack_into("<Q", cut, 40, 0)  # e_shoff
    struct.pack_into("<HH", cut, 60, 0, 0)  # e_shnum, e_shstrndx
    return bytes(cut)
