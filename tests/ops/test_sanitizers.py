"""The C library under the address and undefined-behaviour sanitizers, driven from C."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
SOURCES = Path(__file__).parents[2] / "src" / "minrnn" / "ops" / "native"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("openmp", [False, True])
def test_no_bad_access_and_no_undefined_behaviour(tmp_path, openmp):
    program = tmp_path / "driver"
    flags = ["-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-omit-frame-pointer"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *(["-fopenmp"] if openmp else [])]
    sources = [HERE / "driver.c", *SOURCES.glob("*.c")]
    subprocess.run(["cc", *flags, "-I", SOURCES, *sources, "-o", program, "-lm"], check=True)
    # libgomp keeps the memory of its threads to the end, which is no leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": f"detect_leaks={int(not openmp)}"}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("calls\n")
