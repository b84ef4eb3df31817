"""What all tests share: the one table of tolerances, memory that is never zero by luck, a share of the cores."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

# Where tests run in several processes, each has its share of the cores, and so have the commands that it starts:
# threads without a core spin.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

QUIET = Console(quiet=True)

# Against a float64 result from the same rounded inputs: (rtol, atol). No test has tolerances of its own.
TOL = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
    torch.complex128: {"rtol": 1e-10, "atol": 1e-10},
    torch.complex64: {"rtol": 1e-4, "atol": 1e-5},
}


def assert_close(actual, expected, dtype: torch.dtype) -> None:
    """Equal within the tolerance of `dtype`; compared in the wider type of the two."""
    expected = expected.to(torch.promote_types(actual.dtype, expected.dtype))
    torch.testing.assert_close(actual.to(expected.dtype), expected, **TOL[dtype])


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """A fixed seed; and `torch.empty` full of NaN, so that nothing passes on uninitialised memory."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def one_thread():
    """For many small steps: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compilable(monkeypatch):
    """Without the checks of shapes that the tests put around what defines a scan: torch.compile cannot trace them."""
    from minrnn.ops import gates, parallel, reference

    scans = (reference, "scan"), (parallel, "scan"), (parallel, "padded_steps")
    for module, name in (*scans, (gates, "coefficients"), (gates, "activate")):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


def backends_under_test() -> list[str]:
    """The backends to test, from MINRNN_TEST_BACKENDS (default: all of the CPU); naming an absent one is an error."""
    from minrnn.ops import why_not

    names = os.environ.get("MINRNN_TEST_BACKENDS", "native,parallel").split(",")
    for name in names:
        reason = why_not(name, torch.zeros(1))
        if reason:
            raise pytest.UsageError(f"MINRNN_TEST_BACKENDS names {name!r}, but {reason}")
    return names


def lstm_has_bfloat16() -> bool:
    """Whether torch's LSTM runs in bfloat16 here: oneDNN has no such kernel for x86 processors without AVX-512."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _mend_interpreter() -> None:
    """Triton's interpreter keeps scalars as arrays of one number, which NumPy since 2.4 does not take for an index."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()


@contextmanager
def process_group(size: int) -> Iterator[None]:
    """A process group of which this process is the first; the others, if there are any, never answer."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
