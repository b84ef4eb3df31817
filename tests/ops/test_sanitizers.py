"""The C library under the address and undefined-behaviour sanitizers, driven from C."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
SOURCES = Path(__file__).parents[2] / "src" / "minrnn" / "ops" / "native"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
def test_no_bad_access_and_no_undefined_behaviour(tmp_path):
    program = tmp_path / "driver"
    flags = ["-std=gnu11", "-O0", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-fopenmp"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [HERE / "driver.c", *SOURCES.glob("*.c")]
    subprocess.run(["cc", *flags, "-I", SOURCES, *sources, "-o", program, "-lm"], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("calls\n")
