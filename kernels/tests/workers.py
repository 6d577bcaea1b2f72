"""Processes of tests whose Triton compiles: the interpreter is chosen when Triton is imported, and for good."""

import json
import os
import pathlib
import subprocess
import sys


def answer_of(worker: str):
    """The last line that a script of this folder prints, which is JSON, when it runs without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = pathlib.Path(__file__).with_name(worker)
    run = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
