"""Judge what a guest is given of packages: which files, in which form, and that programs and their interpreters import them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import members

from kernelguest import GuestError, initramfs, packages

VM = Path(__file__).parents[2] / "vm"
LIBRARY = f"usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"
FILES = {
    "__init__.py": "from .inner import word",
    "inner.py": "from pathlib import Path\nword = Path(__file__).with_name('data.txt').read_text()",
    "data.txt": "a word\n",
    "template.py": "def {{ name }}():",
    "tests/__init__.py": "",
    "inner.pyi": "word: str",
    "header.h": "",
    "__pycache__/inner.pyc": "",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Make a package with all kinds of files; return its folder."""
    folder = tmp_path / "things"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a program that imports nothing."""
    (tmp_path / "program.py").write_text("pass")
    return tmp_path / "program.py"


def test_tests_headers_and_stubs_are_left_out(package: Path, plain: Path) -> None:
    found = packages.files([package, plain])
    assert set(found) == {f"things/{name}" for name in ("__init__.py", "inner.py", "data.txt", "template.py")} | {
        "program.py"
    }
    assert all(path.is_file() for path in found.values())


def test_the_library_is_whole_without_its_tests_and_windows() -> None:
    names = set(packages.library())
    assert {"asyncio/__init__.py", "multiprocessing/spawn.py", "site.py", "this.py"} <= names
    assert not any(name.startswith(("test/", "tkinter/", "site-packages/", "idlelib/")) for name in names)
    modules = {path.name.partition(".")[0] for path in packages.extensions(initramfs._extensions())}
    assert "_ctypes" in modules | set(sys.builtin_module_names)
    assert not modules & {"_tkinter", "_ssl", "_testcapi"}


def test_a_package_goes_in_as_byte_code_and_data(package: Path, plain: Path, tmp_path: Path) -> None:
    archive = initramfs.build(plain, tmp_path / "cache", [package])
    found = members(archive.read_bytes())
    site = {
        path.removeprefix(f"{LIBRARY}/site-packages/"): entry
        for path, entry in found.items()
        if path.startswith(f"{LIBRARY}/site-packages/")
    }
    assert set(site) == {
        "things",
        *(f"things/{name}" for name in ("__init__.pyc", "inner.pyc", "data.txt", "template.py")),
    }
    assert site["things/data.txt"][1] == b"a word\n"
    assert site["things/template.py"][1] == FILES["template.py"].encode()
    assert f"{LIBRARY}/asyncio/__init__.pyc" in found
    for path in found:  # the kernel makes no directories by itself
        assert path.count("/") == 0 or path.rpartition("/")[0] in found, path


def test_a_compiled_package_brings_what_it_links_to_and_may_lack_what_it_can_do_without(
    plain: Path, tmp_path: Path
) -> None:
    """An extension module of the standard library serves as a package of one file; its library is found under its name."""
    extension = next(path for path in packages.extensions(initramfs._extensions()) if path.name.startswith("_ctypes."))
    found = members(initramfs.build(plain, tmp_path / "cache", [extension]).read_bytes())
    assert found[f"{LIBRARY}/site-packages/{extension.name}"][1] == initramfs.loaded_part(extension.read_bytes())
    for name in initramfs.shared_libraries([extension]):
        assert f"lib/{name}" in found


def test_a_missing_library_is_fatal_for_the_interpreter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ldd").write_text(
        "#!/bin/sh\necho '\tlibmissing.so => not found'\necho '\tlibc.so.6 => /lib/libc.so.6 (0x1)'\n"
    )
    (tmp_path / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert initramfs.shared_libraries([tmp_path], optional=True) == {"libc.so.6": Path("/lib/libc.so.6")}
    with pytest.raises(GuestError, match=r"libmissing\.so is needed by this Python"):
        initramfs.shared_libraries([tmp_path])


def test_an_archive_is_made_anew_when_a_package_changes_and_few_are_kept(
    package: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "library", dict)  # it takes most of the time
    cache = tmp_path / "cache"
    made = {initramfs.build(plain, cache), initramfs.build(plain, cache, [package])}
    assert initramfs.build(plain, cache, [package]) in made
    for word in ("one", "two", "three"):
        (package / "data.txt").write_text(word)
        path = initramfs.build(plain, cache, [package])
        assert path not in made
        made.add(path)
    left = set(cache.iterdir())
    assert len([found for found in left if found.name.startswith("packages-")]) == initramfs._KEPT_LARGE
    assert len(left) == initramfs._KEPT_LARGE + 1  # the small archive is of another kind


def test_a_package_that_is_not_there_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="nowhere does not exist; give the folder or the file"):
        initramfs.build(plain, tmp_path / "cache", [tmp_path / "nowhere"])


@pytest.mark.guest
def test_a_program_and_its_interpreters_import_a_package(
    guests: None, program: Callable[[str], Path], package: Path
) -> None:
    path = program("""
        import subprocess, sys
        import things
        print(things.word, end="")
        told = "import things, asyncio, multiprocessing.pool; print(things.word, end='')"
        print(subprocess.run([sys.executable, "-c", told], stdout=subprocess.PIPE, text=True, check=True).stdout, end="")
    """)
    done = subprocess.run(
        [sys.executable, "-m", "kernelguest", "run", str(path), "--package", str(package), "--bound", "120"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(VM)},
        check=False,
    )
    assert (done.stdout, done.returncode) == ("a word\n" * 2, 0), done.stderr
