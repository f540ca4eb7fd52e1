"""Judge what a guest boots from: the archive's format, what is put in it, and that it is made once."""

from __future__ import annotations

import ctypes
import gzip
import lzma
import marshal
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from archives import members

from kernelguest import cache, cpio, initramfs, vmlinux

ELF = b"\x7fELF" + bytes(60) + struct.pack("<I4s", 18, b"Xen\0") + bytes(range(256)) * 16


def test_an_archive_reads_back_as_it_was_written() -> None:
    entries = [
        cpio.directory("empty"),
        *(cpio.regular(f"a/b/file{length}", bytes(range(length))) for length in range(9)),
        cpio.regular("run", b"\x7fELF\0", executable=True),
        cpio.symlink("lib64", "lib"),
        cpio.Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    ]
    found = members(cpio.archive(cpio.with_parents(entries)))
    for entry in entries:
        assert found[entry.path] == (entry.mode, entry.data, entry.device)
    assert list(found)[:4] == ["empty", "a", "a/b", "a/b/file0"]
    assert stat.S_ISDIR(found["a/b"][0]) and stat.S_ISDIR(found["dev"][0])


def test_no_entry_is_an_archive_too() -> None:
    assert members(cpio.archive([])) == {}


@pytest.mark.parametrize("path", ["/absolute", "ünicode"])
def test_a_path_that_the_format_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be a path"):
        cpio.archive([cpio.regular(path, b"")])


def test_a_program_brings_what_it_imports_and_not_the_whole_library(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import json\ndef late():\n    import ctypes.util, struct\n")
    found = members(initramfs.build(program, tmp_path / "cache").read_bytes())
    library = f"usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"
    names = {path.removeprefix(f"{library}/") for path in found}
    assert {
        "json/__init__.pyc",
        "json/decoder.pyc",
        "encodings/utf_8.pyc",
        "os.pyc",
        "ctypes/util.pyc",
        "struct.pyc",
    } <= names
    assert not names & {"unittest/__init__.pyc", "asyncio/__init__.pyc", "tkinter/__init__.pyc", "pydoc.pyc"}
    assert found["program.py"][1] == program.read_bytes()
    assert marshal.loads(found["program.pyc"][1][16:]).co_filename == "/program.py"
    for path, (mode, _, _) in found.items():  # the kernel makes no directories by itself
        assert path.count("/") == 0 or path.rpartition("/")[0] in found, path
        assert stat.S_IFMT(mode) in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR)


def test_an_archive_is_made_once_and_anew_when_the_program_changes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os")
    first = initramfs.build(program, tmp_path / "cache")
    made = first.stat().st_ino
    assert initramfs.build(program, tmp_path / "cache") == first and first.stat().st_ino == made
    program.write_text("import os, struct")
    assert initramfs.build(program, tmp_path / "cache") != first


def test_a_module_beside_the_program_is_part_of_it(tmp_path: Path) -> None:
    """Also one that only another such module imports; a change in it makes another archive."""
    for name, text in {"program": "import near", "near": "import far", "far": "import struct", "other": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    first = initramfs.build(tmp_path / "program.py", tmp_path / "cache")
    stems = {Path(path).stem for path in members(first.read_bytes())}
    assert {"near", "far", "struct"} <= stems and "other" not in stems
    (tmp_path / "other.py").write_text("import near")
    assert initramfs.build(tmp_path / "program.py", tmp_path / "cache") == first
    (tmp_path / "far.py").write_text("import struct, array")
    assert initramfs.build(tmp_path / "program.py", tmp_path / "cache") != first


def test_the_cache_keeps_those_used_last(tmp_path: Path) -> None:
    for number in range(4):
        path = cache.stored(tmp_path, "thing", str(number), 2, lambda: b"x")
        os.utime(path, (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing-2", "thing-3"]
    with pytest.raises(ZeroDivisionError):
        cache.stored(tmp_path, "thing", "4", 2, lambda: b"%d" % (1 // 0))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shared_object_cut_to_its_loaded_part_still_loads(tmp_path: Path) -> None:
    for name, library in initramfs.shared_libraries([Path(sys.executable).resolve()]).items():
        whole = library.read_bytes()
        cut = initramfs.loaded_part(whole)
        assert len(cut) <= len(whole)
        assert initramfs.loaded_part(cut) == cut
        (tmp_path / name).write_bytes(cut)
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-c", "import math, ctypes; print(math.sqrt(4))"]
    done = subprocess.run(command, env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.stdout == "2.0\n", done.stderr
    assert initramfs.loaded_part(b"#!/bin/sh\n") == b"#!/bin/sh\n"


def image(payload: bytes) -> bytes:
    """Return a bzImage of one setup sector, with the payload a few bytes into its protected-mode part."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 12, len(payload))
    return bytes(setup) + bytes(12) + payload + bytes(100)


def zstd(data: bytes) -> bytes:
    """Compress with the library that the package decompresses with."""
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        pytest.skip("libzstd is not installed")
    out = ctypes.create_string_buffer(len(data) + 1024)
    library.ZSTD_compress.restype = ctypes.c_size_t
    size = library.ZSTD_compress(out, ctypes.c_size_t(len(out)), data, ctypes.c_size_t(len(data)), 3)
    return out.raw[:size]


@pytest.mark.parametrize("compression", ["zstd", "xz", "gzip"])
def test_a_kernel_is_unpacked_once(compression: str, tmp_path: Path) -> None:
    size = len(ELF).to_bytes(4, "little")
    payload = {
        "zstd": lambda: zstd(ELF) + size,
        "xz": lambda: lzma.compress(ELF) + size,
        "gzip": lambda: gzip.compress(ELF),
    }
    path = tmp_path / "vmlinuz"
    path.write_bytes(image(payload[compression]()))
    found = vmlinux.startable(path, tmp_path)
    assert found != path and found.read_bytes() == ELF
    assert vmlinux.startable(path, tmp_path) == found


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ELF,
        image(b"\x02!L\x18" + bytes(50)),  # lz4
        image(b"\x28\xb5\x2f\xfd" + bytes(50)),
        image(b"\xfd7zXZ\0" + bytes(50)),
        image(b"\x1f\x8b" + bytes(50)),
        image(gzip.compress(b"\x7fELF without the note")),
    ],
)
def test_a_kernel_that_cannot_be_unpacked_is_booted_as_it_is(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    assert vmlinux.startable(path, tmp_path) == path
