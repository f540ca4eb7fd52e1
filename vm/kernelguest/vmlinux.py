"""Own the way from a compressed kernel image to the ELF file inside it, which QEMU can start directly (the PVH entry).

Why: the image's own decompressor, and the firmware that loads it, cost more than 1 s of an emulated boot of 4.6 s; unpacked once on the
host they cost nothing. What cannot be unpacked is booted as it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import struct
import zlib
from pathlib import Path

from kernelguest.cache import stored

_KEPT = 2  # unpacked kernels in the cache: 60 MB each
_PVH_NOTE = struct.pack("<I4s", 18, b"Xen\0")  # XEN_ELFNOTE_PHYS32_ENTRY and its owner, as they lie in an ELF note


def startable(image: Path, cache: Path) -> Path:
    """Return the kernel inside `image`, unpacked into the cache, or `image` itself if it cannot be unpacked."""
    data = image.read_bytes()
    try:
        return stored(
            cache, "vmlinux", hashlib.blake2b(data, digest_size=12).hexdigest(), _KEPT, lambda: unpacked(data)
        )
    except ValueError:
        return image


def unpacked(image: bytes) -> bytes:
    """Return the ELF file inside a bzImage (Documentation/arch/x86/boot.rst). ValueError if there is none that QEMU can start."""
    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    try:
        kernel = _decompressed(image[start + offset : start + offset + length])
    except (OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"not to be decompressed here: {error}") from error
    if kernel[:4] != b"\x7fELF" or _PVH_NOTE not in kernel:
        raise ValueError("a kernel built without PVH")
    return kernel


def _decompressed(payload: bytes) -> bytes:
    """Decompress by the magic number; the kernel's build appends the size of what comes out, except to gzip, which has it anyway."""
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        return _zstd(payload[:-4], int.from_bytes(payload[-4:], "little"))
    if payload[:6] == b"\xfd7zXZ\0":
        return lzma.decompress(payload[:-4])
    if payload[:2] == b"\x1f\x8b":
        return zlib.decompress(payload, wbits=31)
    raise ValueError("another compression")


def _zstd(data: bytes, size: int) -> bytes:
    """Decompress with the library that QEMU itself links to; OSError if it is not there, ValueError if the data is wrong."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(size)
    if library.ZSTD_decompress(out, size, data, len(data)) != size:
        raise ValueError("not what the image's header promises")
    return out.raw
