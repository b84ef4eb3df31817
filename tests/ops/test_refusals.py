"""What the public scans refuse, and what they say; which backend runs, and why another cannot."""

import os
import signal
import subprocess
import sys
import sysconfig
import warnings
from types import SimpleNamespace

import pytest
import torch

import minrnn
from minrnn.ops import backends, describe, last_backend, linear_scan, mingru_scan, minlstm_scan, triton, why_not

P = torch.zeros(2, 16, 8)
CASES = [
    (lambda: linear_scan(torch.ones(2, 16, 8), torch.ones(2, 16)), ValueError, "linear_scan: values must be (B, T, H)"),
    (
        lambda: linear_scan(torch.ones(2, 15, 8), torch.ones(2, 16, 8)),
        ValueError,
        "linear_scan: coeffs must be broadcastable to (B, T, H) = (2, 16, 8), got (2, 15, 8)",
    ),
    (lambda: linear_scan(torch.ones(1, 2, 16, 8), torch.ones(2, 16, 8)), ValueError, "got (1, 2, 16, 8)"),
    (lambda: linear_scan([1.0], P), TypeError, "linear_scan: coeffs must be a torch.Tensor, got list"),
    (
        lambda: linear_scan(P.double(), P),
        TypeError,
        "coeffs must have the dtype of values, torch.float32, got torch.float64",
    ),
    (
        lambda: linear_scan(P.long(), P.long()),
        TypeError,
        "values must be float32, float64, bfloat16 or float16, complex64",
    ),
    (
        lambda: mingru_scan(P.cfloat()),
        TypeError,
        "mingru_scan: projection must be float32, float64, bfloat16 or float16, got",
    ),
    (lambda: mingru_scan(P[..., :7]), ValueError, "mingru_scan: projection must be (B, T, 2H)"),
    (lambda: minlstm_scan(P), ValueError, "minlstm_scan: projection must be (B, T, 3H)"),
    (lambda: mingru_scan(P[0]), ValueError, "got (16, 8)"),
    (lambda: mingru_scan(P, torch.zeros(2, 8)), ValueError, "initial must be (B, H) = (2, 4), got (2, 8)"),
    (lambda: mingru_scan(P, torch.zeros(2, 4).double()), TypeError, "initial must be torch.float32 or torch.float32"),
    (
        lambda: mingru_scan(P.bfloat16(), torch.zeros(2, 4).half()),
        TypeError,
        "initial must be torch.float32 or torch.bfloat16",
    ),
    (
        lambda: mingru_scan(P, torch.zeros(2, 4, device="meta")),
        ValueError,
        "initial must be on cpu as the input is, got meta",
    ),
    (lambda: mingru_scan(P, reset=torch.zeros(2, 16)), TypeError, "reset must be torch.bool, got torch.float32"),
    (
        lambda: mingru_scan(P, reset=torch.zeros(16, 2).bool()),
        ValueError,
        "reset must be (B, T) = (2, 16), got (16, 2)",
    ),
    (lambda: mingru_scan(P, restart=torch.zeros(5)), ValueError, "restart must be (H,) = (4,), got (5,)"),
    (lambda: mingru_scan(P, lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths must be int64, got torch.float32"),
    (lambda: mingru_scan(P, lengths=torch.tensor([1])), ValueError, "lengths must be (B,) = (2,), got (1,)"),
    (
        lambda: mingru_scan(P, lengths=torch.tensor([17, 2])),
        ValueError,
        "mingru_scan: lengths must be between 0 and T = 16, got [17, 2]",
    ),
    (lambda: mingru_scan(P, lengths=torch.tensor([3, -1])), ValueError, "got [3, -1]"),
    (
        lambda: mingru_scan(P, activation="relu"),
        ValueError,
        "activation must be one of ('g', 'identity', 'tanh'), got 'relu'",
    ),
    (lambda: mingru_scan(P, backend="cuda"), ValueError, "backend must be one of"),
    (
        lambda: mingru_scan(P.to("meta"), backend="native"),
        ValueError,
        "backend 'native' was asked for, but the native backend serves CPU tensors, got one on meta",
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_refusals(case):
    call, kind, words = CASES[case]
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


def test_the_backend_follows_the_tensor_unless_forced(monkeypatch):
    assert why_not("native", P) is None
    mingru_scan(P)
    assert last_backend() == "native"
    assert mingru_scan(P.to("meta"))[0].shape == (2, 16, 4)
    assert last_backend() == "parallel"
    monkeypatch.setenv("MINRNN_BACKEND", "parallel")
    mingru_scan(P)
    assert last_backend() == "parallel"
    mingru_scan(P, backend="reference")
    assert last_backend() == "reference"
    assert describe() == {"parallel": "in use for every tensor: forced by MINRNN_BACKEND"}
    monkeypatch.delenv("MINRNN_BACKEND")
    assert set(describe()) == {"native", "triton", "parallel", "reference"}


def test_without_the_library_one_warning_and_the_parallel_backend(tmp_path):
    """As after an install on a machine without a compiler: a copy of the package without its C library."""
    script = """
import warnings, torch, minrnn.ops.native as native
native._load.cache_clear()
native.minrnn.ops.__path__ = []
from minrnn.ops import last_backend, mingru_scan
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        mingru_scan(torch.zeros(1, 3, 4))
assert last_backend() == "parallel"
assert len(caught) == 1 and "no C library was built" in str(caught[0].message), caught
try:
    mingru_scan(torch.zeros(1, 3, 4), backend="native")
except ValueError as error:
    assert "no C library was built" in str(error)
else:
    raise SystemExit("a forced backend that cannot serve went through")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "MINRNN_BACKEND": ""})


def test_a_forked_process_runs_on_one_thread():
    """OpenMP's threads do not survive a fork; the child must not wait for them, as torch's own operations would."""
    torch.set_num_threads(2)
    x = torch.randn(4, 4000, 64)
    torch.use_deterministic_algorithms(False)  # it has torch fill new memory, in parallel
    wanted = mingru_scan(x)[0].numpy().tobytes()  # starts the pool in the parent
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.write(write, b"same" if mingru_scan(x)[0].numpy().tobytes() == wanted else b"else")
        os._exit(0)
    os.close(write)
    assert os.read(read, 4) == b"same"
    os.waitpid(child, 0)


def test_on_the_cpu_there_is_nothing_to_compile():
    module = torch.nn.Sequential(minrnn.MinGRU(4, 4), torch.nn.Linear(4, 4))
    assert minrnn.warmup(module, torch.bfloat16, reset=True) == []
    with pytest.raises(TypeError, match=r"warmup: module must be an nn.Module, got int"):
        minrnn.warmup(3)


def test_a_gpu_without_triton_gets_one_warning_and_the_parallel_backend(monkeypatch):
    """A stand-in for a CUDA tensor: what is said and chosen must not need a GPU."""
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(backends, "_warned", {"what another device lacks"})
    monkeypatch.setattr(triton, "unavailable", lambda device: "Triton is not installed (pip install triton)")
    with pytest.warns(RuntimeWarning, match="than its GPU kernels, because Triton is not installed"):
        assert backends.choose(None, tensor, "mingru_scan") == "parallel"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, tensor, "mingru_scan") == "parallel"
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="because it is a test"):
        torch.compile(lambda x: (backends._warn_once("because it is a test"), x + 1), fullgraph=True, backend="eager")(
            P
        )
    with pytest.raises(ValueError, match="backend 'triton' was asked for, but Triton is not installed"):
        backends.choose("triton", tensor, "mingru_scan")
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    assert backends.choose(None, tensor, "mingru_scan") == "triton"
    assert backends.choose(None, tensor, "short_conv", gpu=False) == "parallel"


def test_what_triton_lacks_is_said(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setenv("CC", "cc")
    versions = {
        "3.6.0+git1": "a GPU of compute capability 8.0, this has 7.5",
        "2.1.0": "2.1.0 is too old: 3.6 or newer",
    }
    for version, words in versions.items():
        for cached in (triton._no_triton, triton._no_compiler, triton._too_old):
            cached.cache_clear()
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        assert words in triton.unavailable(gpu)
    with monkeypatch.context() as without:
        without.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
        triton._no_compiler.cache_clear()
        without.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
        triton._no_triton.cache_clear()
        assert triton.unavailable(gpu).startswith("Triton finds no Python.h in /nowhere (install Python's headers")
    triton._no_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton.unavailable(gpu) == "Triton is not installed (pip install triton)"
    for cached in (triton._no_triton, triton._no_compiler, triton._too_old):
        cached.cache_clear()


def test_a_triton_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("import libtriton_of_another_machine")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    triton._no_triton.cache_clear()
    assert triton._no_triton() == "Triton does not load (No module named 'libtriton_of_another_machine')"
    triton._no_triton.cache_clear()
