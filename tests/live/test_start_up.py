"""Judge what a process pays for pagefold before it uses it, and the start of workers below `pagefold run`: nothing may ever end one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.live.own_process import BOUND, ROOT, python

SITE = ROOT / "src" / "pagefold" / "live" / "site"
MOST_BYTES = 15 << 20
HEAVY = {"numpy", "numba", "xxhash", "typer", "rich", "llvmlite", "pandas", "pyarrow", "torch"}
LIGHT_STILL = {"multiprocessing", "asyncio", "subprocess", "logging", "inspect", "dataclasses", "ssl", "http.client"}

MEASURE = """
import sys
def resident():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Rss:")) << 10
before, modules = resident(), set(sys.modules)
{act}
cost = resident() - before, sorted(set(sys.modules) - modules)
import json
print(json.dumps(cost))
"""


def measure(act: str, **environment: str) -> tuple[int, set[str]]:
    """Return the bytes and the modules that something costs a fresh interpreter."""
    done = python("-c", MEASURE.format(act=act), **environment)
    assert done.returncode == 0, done.stderr
    size, modules = json.loads(done.stdout.splitlines()[-1])
    return size, set(modules)


# --- what it costs ------------------------------------------------------------------------------------------------------


def test_the_import_alone_loads_nothing() -> None:
    size, modules = measure("import pagefold")
    assert {name for name in modules if name.startswith("pagefold")} == {"pagefold"}
    assert not modules & (HEAVY | LIGHT_STILL | {"ctypes", "socket", "json", "threading"})
    assert size < MOST_BYTES / 3


@pytest.mark.parametrize(
    "use",
    [
        "pagefold.merge(bytearray(1 << 20)).release()",
        "pagefold.unadvise(pagefold.advise(bytearray(1 << 20)))",
        "pagefold.stats()",
        "pagefold.enable()",
    ],
)
def test_a_worker_that_uses_it_stays_small(use: str) -> None:
    size, modules = measure(f"import pagefold; {use}")
    assert not modules & (HEAVY | LIGHT_STILL)
    assert "pagefold.live.client" in modules
    assert size < MOST_BYTES


def test_a_fork_loads_the_agent_and_no_more() -> None:
    """So that parent and children share what they know of each other's pages."""
    size, modules = measure("import os, pagefold\nchild = os.fork()\nif child == 0: os._exit(0)\nos.waitpid(child, 0)")
    assert "pagefold.live.client" in modules
    assert not modules & (HEAVY | LIGHT_STILL)
    assert size < MOST_BYTES


def test_without_the_agent_a_fork_is_a_fork_and_a_call_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "pagefold"
    shutil.copytree(ROOT / "src" / "pagefold", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import os, pagefold\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        f"assert pagefold.__file__.startswith({str(tmp_path)!r})\n"
        "try: pagefold.merge\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("NotHere pagefold's agent cannot be loaded")


def test_every_public_name_is_there() -> None:
    code = "import pagefold; print([name for name in pagefold.__all__ if not hasattr(pagefold, name)])"
    assert python("-c", code).stdout.strip() == "[]"
    code = "from pagefold import *; print(merge, advise, unadvise, enable, stats, settled, Report, Handle)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


# --- workers below `pagefold run` ---------------------------------------------------------------------------------------


def worker(code: str, *folders: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [SITE, *folders]))
    return python("-c", code, **{"PYTHONPATH": path, "PAGEFOLD_ENABLE": "1"} | environment)


SERVED = "import numpy as np; print([np.empty(1 << 16, np.uint8).ctypes.data % 4096 for _ in range(3)] == [0, 0, 0])"


def test_a_worker_is_enabled_when_it_loads_numpy() -> None:
    assert worker(SERVED).stdout.strip() == "True"
    assert worker(SERVED, PAGEFOLD_ENABLE="0").stdout.strip() == "False"
    assert worker(SERVED, PAGEFOLD_ENABLE="").stdout.strip() == "False"
    done = worker("import sys; print(sorted({'numpy', 'ctypes', 'pagefold.live.client'} & set(sys.modules)))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_start_of_a_worker_without_numpy_is_cheap() -> None:
    code = "import sys; print(len(sys.modules))"
    plain, ours = int(python("-c", code).stdout), int(worker(code).stdout)
    assert ours - plain < 40
    assert not worker("import sys; print(sys.path)").stdout.count(str(SITE))


def test_numpy_is_enabled_however_it_is_loaded() -> None:
    for load in ("from numpy import array", "import numpy.linalg", "__import__('numpy')", "import pandas"):
        assert worker(f"{load}; {SERVED}").stdout.strip() == "True", load
    in_thread = (
        f"import threading; t = threading.Thread(target=lambda: __import__('numpy')); t.start(); t.join(); {SERVED}"
    )
    assert worker(in_thread).stdout.strip() == "True"
    looked_for_first = f"import importlib.util; assert importlib.util.find_spec('numpy'); {SERVED}"
    assert worker(looked_for_first).stdout.strip() == "True"


def test_a_numpy_that_cannot_be_loaded_is_tried_again(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken')")
    code = (
        "import sys\n"
        "try: import numpy\n"
        "except ImportError as error: print(error)\n"
        f"sys.path.remove({str(broken.parent)!r})\n" + SERVED
    )
    done = worker(code, tmp_path / "broken")
    assert done.stdout.split() == ["broken", "True"], done.stderr


def test_a_numpy_of_another_kind_ends_no_worker(tmp_path: Path) -> None:
    """A package of that name that is no NumPy: one line, and the program goes on."""
    (tmp_path / "numpy.py").write_text("ndarray = list")
    done = worker("import numpy; print(numpy.ndarray)", tmp_path)
    assert done.stdout.strip() == "<class 'list'>"
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("pagefold: not enabled in process ")


def test_the_next_sitecustomize_runs_as_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.came = __file__; kept = 5")
    done = worker("import sys, sitecustomize; print(sys.came, sitecustomize.kept, sitecustomize.__file__)", tmp_path)
    theirs = str(tmp_path / "sitecustomize.py")
    assert done.stdout.split() == [theirs, "5", theirs]
    assert worker(SERVED, tmp_path).stdout.strip() == "True"


def test_errors_of_the_next_sitecustomize_are_its_own(tmp_path: Path) -> None:
    for text in ("1 / 0", "import not_there_at_all", "raise SystemExit(3)"):
        (tmp_path / "sitecustomize.py").write_text(text)
        alone = python("-c", "print(1)", PYTHONPATH=str(tmp_path))
        below = worker("print(1)", tmp_path)
        assert (below.returncode, below.stdout) == (alone.returncode, alone.stdout), text
        assert below.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_without_another_sitecustomize_ours_is_it() -> None:
    done = worker("import sitecustomize; print(sitecustomize.__file__)")
    assert done.stdout.strip() == str(SITE / "sitecustomize.py")


def interpreters() -> dict[str, str]:
    """Return the interpreters of this machine by version, as far as they are found by name."""
    found: dict[str, str] = {}
    for name in ("python2", "python2.7", "python3", *(f"python3.{minor}" for minor in range(5, 16)), sys.executable):
        path = shutil.which(name)
        code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
        done = subprocess.run([path, "-S", "-c", code], capture_output=True, text=True, check=False) if path else None
        if path and done and done.returncode == 0:
            found.setdefault(done.stdout.strip(), path)
    return found


def test_any_interpreter_may_come_by(tmp_path: Path) -> None:
    """Also one that is too old for pagefold, or has none: the first goes on in silence, the second is lent ours and nothing else."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.came = 1")
    code = (
        "import sys\n"
        "try:\n    import pagefold\n    print(pagefold.__file__)\n"
        "except ImportError:\n    print('none')\n"
        "try:\n    import typer\n    print('more')\n"
        "except ImportError:\n    print('nothing else')\n"
        "assert sys.came == 1"
    )
    lent = 0
    for version, path in interpreters().items():
        done = subprocess.run(
            [path, "-c", code],
            env={"PYTHONPATH": f"{SITE}{os.pathsep}{tmp_path}", "PAGEFOLD_ENABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=BOUND,
        )
        assert (done.returncode, done.stderr) == (0, ""), version
        pagefold, more = done.stdout.splitlines()
        if tuple(map(int, version.split("."))) < (3, 11):
            assert pagefold == "none", version
        elif more == "nothing else":
            assert pagefold == str(ROOT / "src" / "pagefold" / "__init__.py"), version
            lent += 1
    if not lent:
        pytest.skip("every interpreter here that pagefold can run in has it installed")


def test_a_pagefold_of_their_own_comes_first(tmp_path: Path) -> None:
    (tmp_path / "pagefold").mkdir()
    (tmp_path / "pagefold" / "__init__.py").write_text("own = 5")
    done = worker("import pagefold; print(pagefold.own)", tmp_path)
    assert done.stdout.strip() == "5"
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("pagefold: not started in this process: ")


@pytest.mark.parametrize("flag", ["-I", "-E", "-S", "-s", "-OO", "-B", "-v"])
def test_flags_of_the_interpreter(flag: str) -> None:
    done = python(flag, "-c", "print(1)", PYTHONPATH=str(SITE), PAGEFOLD_ENABLE="1")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert flag == "-v" or not done.stderr
