"""Compile kernels for Hopper with several Tritons, each from a folder of its own, and print what each made of them.

    python compile_matrix.py build/triton-3.6.0 build/triton-3.9.0 [--names gluon_sm90 triton_splitkv prefill]

`make compile-matrix` installs the Tritons. Engines pin theirs, and the same source must do for all. Needs no GPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rich.console import Console
from rich.table import Table

WORKER = pathlib.Path(__file__).with_name("compile_worker.py")


def compile_with(folder: pathlib.Path, names: list[str]) -> list[dict]:
    """The rows of the worker, run with the Triton in `folder`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as cache:
        env |= {"PYTHONPATH": f"{folder}:{WORKER.parents[1]}", "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, str(WORKER), "cuda", "90", *names], env=env, capture_output=True, text=True
        )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        error = done.stderr.partition("nanobind: leaked")[0][-2000:]  # Triton 3.9 always ends with that
        fault = f"kernels, got exit status {done.returncode} from the worker\n{error}"
        rows.append({"function": "none", "variant": str(names), "dtype": "", "faults": [fault]})
    return [{"triton": folder.name.removeprefix("triton-"), **row} for row in rows]


def table_of(rows: list[dict]) -> Table:
    table = Table(title="Compiled for sm_90a")
    for name in ("Triton", "kernel", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "shared bytes", "spilled bytes", "serialised", "HGMMA"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["triton"],
            row["function"].strip("_"),
            f"{row['variant']} {row['dtype'].removeprefix('torch.')}",
            *(str(row.get(name, "-")) for name in ("registers", "shared", "spilled")),
            "yes" if row.get("serialised") else "no",
            str(row.get("instructions", {}).get("HGMMA", "-")),
            style="red" if row["faults"] else None,
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="each with a Triton of its own")
    parser.add_argument(
        "--names",
        nargs="+",
        default=["gluon_sm90", "gluon_sm90_ragged"],
        help="operations or kernels",
    )
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.folders]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(partial(compile_with, names=options.names), folders) for row in rows]
    refused = [row for row in rows if "refused" in row]  # float32 for the Hopper kernel, say
    rows = [row for row in rows if "refused" not in row]
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(rows))
    for row in refused:
        print(f"Triton {row['triton']}: {row['kernel']}, {row['variant']}: refused, {'; '.join(row['refused'])}")
    wrong = [row for row in rows if row["faults"]]
    for row in wrong:
        print(f"Triton {row['triton']}: {row['function']}, {row['variant']}: wanted {'; '.join(row['faults'])}")
    print(f"{len(wrong)} of {len(rows)} compiled kernels are not as they should be.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
