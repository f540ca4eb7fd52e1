"""Own how tests read an archive back."""

from __future__ import annotations


def members(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Read an archive as the kernel does: mode, contents and device by path."""
    found, offset = {}, 0
    while True:
        assert data[offset : offset + 6] == b"070701" and offset % 4 == 0
        fields = [int(data[offset + 6 + 8 * index : offset + 14 + 8 * index], 16) for index in range(13)]
        _, mode, _, _, _, _, size, _, _, major, minor, name_size, _ = fields
        name = data[offset + 110 : offset + 110 + name_size]
        assert name[-1:] == b"\0"
        start = (offset + 110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert start == len(data)
            return found
        found[name[:-1].decode()] = (mode, data[start : start + size], (major, minor))
        offset = (start + size + 3) // 4 * 4
