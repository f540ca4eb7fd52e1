"""Judge the protocol's two descriptions: csrc and Python say the same of every field, number and status."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from tests.live.children import in_child

from pagefold.live import agent, messages

CSRC = Path(__file__).parents[2] / "csrc"


def layout() -> str:
    return agent.library().layout()


@pytest.fixture(scope="module")
def in_c() -> dict[str, tuple[int, dict[str, int]]]:
    """Size and offsets of every struct, as the compiler laid it out. Asked in a child: this process shall have no agent."""
    found = {}
    for line in in_child(layout).splitlines():
        name, size, *fields = line.split()
        found[name] = int(size), {field: int(offset) for field, offset in (pair.split(":") for pair in fields)}
    return found


def in_numpy(kind: np.dtype[np.void]) -> tuple[int, dict[str, int]]:
    assert kind.fields is not None
    return kind.itemsize, {name: about[1] for name, about in kind.fields.items()}


def in_ctypes(kind: type[ctypes.Structure]) -> tuple[int, dict[str, int]]:
    return ctypes.sizeof(kind), {field[0]: getattr(kind, field[0]).offset for field in kind._fields_}


EXPECTED = {
    "header": in_numpy(messages.header),
    "run": in_numpy(messages.run),
    **{messages.NAMES[kind]: in_numpy(dtype) for kind, dtype in messages.LAYOUT.items()},
    "state": in_ctypes(agent.State),
    "report": in_ctypes(agent.Report),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_field_lies_where_c_has_it(name: str, in_c: dict[str, tuple[int, dict[str, int]]]) -> None:
    assert in_c[name] == EXPECTED[name]


def test_no_struct_is_left_out(in_c: dict[str, tuple[int, dict[str, int]]]) -> None:
    assert set(in_c) == set(EXPECTED)
    declared = re.findall(
        r"^struct pf_(\w+) \{", (CSRC / "messages.h").read_text() + (CSRC / "agent.h").read_text(), re.M
    )
    assert set(in_c) == set(declared)


def constants() -> dict[str, int]:
    """Return the numbers of agent.h and messages.h by name without PF_."""
    text = (CSRC / "agent.h").read_text() + (CSRC / "messages.h").read_text()
    found = re.findall(r"^#define PF_(\w+) (0x[0-9a-f]+|\d+)u?\b", text, re.M)
    found += re.findall(r"^ {4}PF_(\w+) = (\d+)[,\s]", text, re.M)
    return {name: int(value, 0) for name, value in found}


@pytest.mark.parametrize(
    "name", ["MAGIC", "VERSION", "PAGE", "RUN_PAGES", "BATCH_RUNS", "BATCH_PAGES", "STATUSES", "TEXT", "PRIVATE"]
)
def test_limits_are_the_same(name: str) -> None:
    assert getattr(messages, name) == constants()[name]
    if hasattr(agent, name):
        assert getattr(agent, name) == constants()[name]


def test_types_are_the_same() -> None:
    for name in (
        "HELLO",
        "ADVISE",
        "UNADVISE",
        "OUTCOME",
        "SYNC",
        "WELCOME",
        "EXTENT",
        "WINDOWS",
        "RELEASE",
        "SYNCED",
        "CONTROL",
    ):
        assert getattr(messages, name) == constants()[name]


def test_statuses_are_the_same() -> None:
    text = (CSRC / "agent.h").read_text()
    body = text[text.index("enum pf_status") : text.index("PF_STATUSES =")]
    in_header = {name.lower(): int(value) for name, value in re.findall(r"PF_(\w+) = (\d+)", body)}
    assert in_header == {name: code for code, name in enumerate(messages.STATUS_NAMES) if name}
    assert agent.STATUS_NAMES == messages.STATUS_NAMES
    for name, code in in_header.items():
        assert getattr(messages, name.upper()) == code


def test_the_library_exports_what_agent_h_declares_and_nothing_else() -> None:
    """A program may have functions of its own with any of our names."""
    declared = set(re.findall(r"\b(pf_\w+)\(", (CSRC / "agent.h").read_text().split("visibility push")[1]))
    assert exported(Path(agent.__file__).with_name("_agent.so")) == declared


def exported(path: Path) -> set[str]:
    """Return the names that a library exports, by its ELF dynamic symbol table."""
    raw = path.read_bytes()
    offset, size, count = (int.from_bytes(raw[at : at + width], "little") for at, width in ((40, 8), (58, 2), (60, 2)))
    sections = [raw[offset + i * size :][:size] for i in range(count)]
    number = lambda section, at, width: int.from_bytes(section[at : at + width], "little")  # noqa: E731
    (symbols,) = (s for s in sections if number(s, 4, 4) == 11)  # SHT_DYNSYM
    names = sections[number(symbols, 40, 4)]
    text = raw[number(names, 24, 8) :]
    found = set()
    for at in range(number(symbols, 24, 8), number(symbols, 24, 8) + number(symbols, 32, 8), 24):
        where = int.from_bytes(raw[at : at + 4], "little")
        defined = int.from_bytes(raw[at + 6 : at + 8], "little") != 0
        if defined and raw[at + 4] >> 4 in (1, 2):
            found.add(text[where : text.index(b"\0", where)].decode())
    return found
