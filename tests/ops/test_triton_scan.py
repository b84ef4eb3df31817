"""The GPU kernels of the scans in Triton's interpreter, on CPU tensors, against the step loop; and the host's part."""

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

import minrnn
from conftest import assert_close
from minrnn import _warmup
from minrnn.ops import last_backend, linear_scan, mingru_scan, minlstm_scan, why_not
from minrnn.ops.triton import interpreted
from parity import check_lengths, check_resets, gradients

if not interpreted():
    pytest.skip("the kernels run without a GPU where TRITON_INTERPRET=1", allow_module_level=True)

from minrnn.ops.triton import scan as host

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATED = [
    (mingru_scan, 2, {}),
    (mingru_scan, 2, {"activation": "identity"}),
    (mingru_scan, 2, {"activation": "tanh"}),
    (minlstm_scan, 3, {}),
    (minlstm_scan, 3, {"normalize": False, "activation": "tanh"}),
]
IDS = ["-".join([scan.__name__, *map(str, options.values())]) for scan, _, options in GATED]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of one tile, each with a program of its own."""
    monkeypatch.setattr(host, "_CHUNK", 1)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 1 << 20)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32)) * scale).to(dtype).requires_grad_()


def agree(run, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`run` on the kernels in `dtype`, and by the step loop in float64: values and all gradients."""
    own = run(backend="triton", **tensors)
    assert last_backend() == "triton"
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = {
        name: x.detach().to(wide).requires_grad_() if x.is_floating_point() or x.is_complex() else x
        for name, x in tensors.items()
    }
    wanted = run(backend="reference", **exact)
    own, wanted = (x if isinstance(x, tuple) else (x,) for x in (own, wanted))
    assert own[0].dtype == dtype
    for a, b in zip(own, wanted, strict=True):
        assert_close(a, b, dtype)
    if own[0].numel() or len(own) > 1:
        names = [name for name, x in tensors.items() if x.requires_grad]
        mine = gradients(own[0], own[1:], [tensors[name] for name in names])
        theirs = gradients(wanted[0], wanted[1:], [exact[name] for name in names])
        for name, a, b in zip(names, mine, theirs, strict=True):
            try:
                assert_close(a, b, dtype)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from error


def context(batch: int, time: int, hidden: int, dtype: torch.dtype, *, gated: bool = True) -> dict[str, Tensor]:
    keep = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    found = {"initial": random(batch, hidden, dtype=keep), "reset": torch.rand(batch, time) < 0.1}
    if gated:
        found["restart"] = random(hidden, dtype=keep)
        found["lengths"] = torch.tensor([time, 0, time * 2 // 3, 1, time])[:batch].clamp(max=time)
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(("scan", "blocks", "options"), GATED, ids=IDS)
def test_gated_scan(scan, blocks, options, dtype, reverse):
    for time, hidden in ((0, 3), (1, 1), (65, 5)) if dtype == torch.float32 else ((33, 3),):
        tensors = {"projection": random(3, time, blocks * hidden, dtype=dtype), **context(3, time, hidden, dtype)}
        agree(lambda **kw: scan(**kw, **options, reverse=reverse), tensors, dtype)


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64, torch.complex128], ids=str)
def test_linear_scan(dtype):
    for (time, hidden), reverse in itertools.product(((0, 3), (65, 5)), (False, True)):
        coeffs = random(3, time, hidden, dtype=dtype, scale=0.5).detach()
        tensors = {
            "coeffs": (coeffs if dtype.is_complex else coeffs.sigmoid()).requires_grad_(),
            "values": random(3, time, hidden, dtype=dtype),
            **context(3, time, hidden, dtype, gated=False),
        }
        agree(partial(linear_scan, reverse=reverse), tensors, dtype)


@pytest.mark.parametrize("case", ["plain", "resets", "lengths", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time(short_chunks, case, reverse):
    time = 257 if case == "all" else 130
    whole = context(3, time, 3, torch.float64)
    given = {"initial": whole["initial"]}
    if case in ("resets", "all"):
        given |= {"reset": torch.rand(3, time) < 0.02, "restart": whole["restart"]}
    if case in ("lengths", "all"):
        given["lengths"] = torch.tensor([time, 0, 70])
    tensors = {"projection": random(3, time, 6, dtype=torch.float64), **given}
    agree(lambda **kw: mingru_scan(**kw, reverse=reverse), tensors, torch.float64)


def test_chunks_of_a_complex_scan(short_chunks):
    tensors = {
        "coeffs": random(2, 130, 3, dtype=torch.complex64, scale=0.5),
        "values": random(2, 130, 3, dtype=torch.complex64),
        **context(2, 130, 3, torch.complex64, gated=False),
    }
    agree(linear_scan, tensors, torch.complex64)


@pytest.mark.parametrize("resets", [False, True])
def test_programs_for_chunks_change_no_bit(monkeypatch, resets):
    """Nor does what else is in the batch: how many programs there are follows from it, and nothing else does."""
    given = context(3, 200, 5, torch.float32)
    given["reset"] = torch.rand(3, 200) < 0.02
    if not resets:
        del given["reset"], given["restart"]
    projection, found = random(3, 200, 10, dtype=torch.float32), []
    monkeypatch.setattr(host, "_CHUNK", 64)
    for programs, batch in ((1, 3), (1 << 20, 3), (8, 3), (1 << 20, 1)):
        monkeypatch.setattr(host, "multiprocessors", lambda device, programs=programs: programs)
        some = {name: x if name == "restart" else x[:batch] for name, x in given.items()}
        h, last = mingru_scan(projection[:batch], **some, backend="triton")
        wanted = [projection, given["initial"]]
        grads = torch.autograd.grad([h[0].square().sum(), last[0].sum()], wanted)
        found.append([x[0] for x in (h, last, *grads)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", ["time", "sliced", "channels", "expanded", "shifted"])
def test_layouts(layout):
    """Any strides; what has contiguous channels is read where it is."""
    batch, time, hidden = 3, 20, 6
    wide = 2 * hidden
    projection = {
        "time": lambda: torch.randn(time, batch, wide).transpose(0, 1),
        "sliced": lambda: torch.randn(batch, 2 * time, wide + 3)[:, ::2, 3:],
        "channels": lambda: torch.randn(wide, batch, time).permute(1, 2, 0),
        "expanded": lambda: torch.randn(1, time, wide).expand(batch, time, wide),
        "shifted": lambda: torch.randn(batch * time * wide + 1)[1:].view(batch, time, wide),
    }[layout]()
    given = context(batch, time, hidden, torch.float32)
    given["reset"] = given["reset"].t().contiguous().t()
    agree(mingru_scan, {"projection": projection.requires_grad_(), **given}, torch.float32)
    if layout == "time":
        assert mingru_scan(projection, backend="triton")[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("hidden", [1, 8, 17, 32, 70])
def test_widths(hidden):
    """Whole and broken blocks of channels."""
    given = context(2, 9, hidden, torch.float32)
    agree(minlstm_scan, {"projection": random(2, 9, 3 * hidden, dtype=torch.float32), **given}, torch.float32)


@pytest.mark.parametrize("shape", [(1,), (5,), (7, 1), (3, 1, 1), (3, 7, 1), (1, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_coefficients_broadcast(shape, dtype):
    tensors = {
        "coeffs": random(*shape, dtype=dtype, scale=0.4),
        "values": random(3, 7, 5, dtype=dtype),
        **context(3, 7, 5, dtype, gated=False),
    }
    agree(linear_scan, tensors, dtype)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 5, 0), (3, 0, 4), (0, 0, 0)])
def test_empty(shape):
    batch, time, hidden = shape
    h, last = mingru_scan(torch.zeros(batch, time, 2 * hidden, requires_grad=True), backend="triton")
    assert h.shape == shape
    assert last.shape == (batch, hidden)
    h.sum().backward()


def test_a_nan_ends_at_a_reset_and_stays_in_its_channel(monkeypatch):
    for chunk in (1 << 10, 1):
        monkeypatch.setattr(host, "_CHUNK", chunk)
        monkeypatch.setattr(host, "multiprocessors", lambda device: 1 << 20)
        projection = torch.randn(2, 130, 6)
        spoiled = projection.clone()
        spoiled[0, 3, 1] = float("nan")
        spoiled[1, 3, 4] = float("nan")
        reset = torch.zeros(2, 130, dtype=torch.bool)
        reset[:, 100] = True
        spoiled.requires_grad_()
        h, _ = mingru_scan(spoiled, reset=reset, backend="triton")
        bad = torch.zeros(2, 130, 3, dtype=torch.bool)
        bad[:, 3:100, 1] = True
        assert torch.equal(h.isnan(), bad), chunk
        (grad,) = torch.autograd.grad(h[:, 100:].sum(), spoiled)
        assert not grad[:, 100:].isnan().any()
        assert not grad[..., [0, 2, 3, 5]].isnan().any()


def test_parity():
    for scan, blocks, options in GATED[::3]:

        def run(x, state, scan=scan, options=options, **kw):
            return scan(x, state, backend="triton", **options, **kw)

        x, state = random(5, 20, blocks * 4, dtype=torch.float64), random(5, 4, dtype=torch.float64)
        check_resets(run, x)
        check_lengths(run, x, state)
        check_lengths(lambda *a, run=run, **kw: run(*a, **kw, reverse=True), x, None)


@pytest.mark.parametrize("gates", [1e4, -1e4])
@pytest.mark.parametrize(("scan", "blocks", "options"), GATED, ids=IDS)
def test_saturated_gates_stay_finite(scan, blocks, options, gates):
    projection = torch.randn(2, 20, blocks * 3)
    projection[..., : (blocks - 1) * 3] = gates * torch.rand_like(projection[..., : (blocks - 1) * 3]).round()
    for dtype in (torch.float32, torch.float16):
        agree(lambda **kw: scan(**kw, **options), {"projection": projection.to(dtype).requires_grad_()}, dtype)


def test_an_infinite_gate_is_an_open_or_a_shut_one():
    infinite = torch.randn(1, 4, 9)
    infinite[0, :, 0], infinite[0, :, 1], infinite[0, :, 4] = torch.inf, -torch.inf, torch.inf
    wanted = minlstm_scan(infinite.clamp(-1e4, 1e4), backend="reference")[0]
    assert_close(minlstm_scan(infinite, backend="triton")[0], wanted, torch.float32)


def test_one_of_the_two_gradients():
    for which in (0, 1):
        projection = random(3, 9, 8, dtype=torch.float64)
        (own,) = torch.autograd.grad(mingru_scan(projection, backend="triton")[which].sum(), projection)
        (wanted,) = torch.autograd.grad(mingru_scan(projection, backend="reference")[which].sum(), projection)
        assert_close(own, wanted, torch.float64)


def test_small_numbers_keep_their_digits():
    """tanh and a nearly shut gate, relative to themselves."""
    for gate, activation in ((0.0, "tanh"), (-60.0, "identity")):
        projection = torch.full((1, 1, 16), gate)
        projection[..., 8:] = torch.logspace(-6, 0, 8)
        own = mingru_scan(projection, activation=activation, backend="triton")[0]
        wanted = mingru_scan(projection.double(), activation=activation, backend="reference")[0]
        torch.testing.assert_close(own.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_backward(dtype):
    """The projection and h: 3 numbers for each of h."""
    kept = {}
    projection = random(4, 64, 32, dtype=dtype)

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h, _ = mingru_scan(projection, backend="triton")
    assert sum(kept.values()) == 3 * h.numel() * dtype.itemsize


def test_second_derivatives_and_functions():
    projection = random(1, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda p: mingru_scan(p, backend="triton")[0], projection)
    tangent = torch.randn_like(projection)
    for backend in ("triton", "reference"):
        run = lambda p, backend=backend: mingru_scan(p, backend=backend)[0]  # noqa: E731
        found = torch.func.jvp(run, (projection.detach(),), (tangent,))
        if backend == "triton":
            own = found
    assert_close(own[1], found[1], torch.float64)


def test_under_torch_compile():
    projection = random(2, 9, 8, dtype=torch.float32)
    run = torch.compile(lambda p: mingru_scan(p, backend="triton")[0].sin(), fullgraph=True, backend="aot_eager")
    out = run(projection)
    (grad,) = torch.autograd.grad(out.sum(), projection)
    plain = mingru_scan(projection, backend="reference")[0].sin()
    assert_close(out, plain, torch.float32)
    assert_close(grad, torch.autograd.grad(plain.sum(), projection)[0], torch.float32)


def test_offsets_beyond_32_bits():
    """A batch stride beyond 2^31 numbers, over memory that is never touched in between."""
    torch.use_deterministic_algorithms(False)  # it has torch fill new memory
    apart = (1 << 31) + 64
    memory = torch.empty(apart + 4096, dtype=torch.bfloat16)
    projection = memory.as_strided((2, 16, 16), (apart, 16, 1))
    projection.copy_(torch.randn(2, 16, 16))
    own = mingru_scan(projection, backend="triton")[0]
    assert_close(own, mingru_scan(projection.double(), backend="reference")[0], torch.bfloat16)


def test_where_it_serves(monkeypatch):
    assert why_not("triton", torch.zeros(1)) is None
    assert "serves NVIDIA GPUs" in why_not("triton", torch.zeros(1, device="meta"))
    monkeypatch.setenv("MINRNN_BACKEND", "triton")
    mingru_scan(torch.zeros(1, 3, 4))
    assert last_backend() == "triton"
    monkeypatch.delenv("MINRNN_BACKEND")
    mingru_scan(torch.zeros(1, 3, 4))
    assert last_backend() != "triton"  # never for a CPU tensor by itself
    with pytest.raises(ValueError, match="it has no GPU kernels"):
        from minrnn.ops import backends

        backends.choose("triton", torch.zeros(1), "short_conv", gpu=False)


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    script = """
import torch
from minrnn.ops import mingru_scan
try:
    mingru_scan(torch.zeros(1, 3, 4), backend="triton")
except ValueError as error:
    assert "serves NVIDIA GPUs" in str(error) and "got a tensor on cpu" in str(error), error
else:
    raise SystemExit("served")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TRITON_INTERPRET": ""})


def test_warmup_runs_every_kernel_of_a_module(monkeypatch):
    """And leaves parameters and generators alone."""
    monkeypatch.setenv("MINRNN_BACKEND", "triton")
    monkeypatch.setattr(_warmup, "_LENGTH", 70)
    monkeypatch.setattr(host, "_CHUNK", 1)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 1 << 20)
    ran, launch = set(), host.launch

    def record(kernel, *args, **arguments):
        ran.add((kernel.fn.__name__, arguments.get("GATES"), arguments.get("RESET"), arguments.get("TOTALS")))
        launch(kernel, *args, **arguments)

    monkeypatch.setattr(host, "launch", record)
    layers = torch.nn.ModuleList(
        [
            *(minrnn.MinGRU(4, 4, 2), minrnn.MinGRUCell(4, 4)),
            *(minrnn.MinLSTM(4, 3, learn_initial_state=True), minrnn.MinLSTM(4, 3, normalize=False)),
        ]
    )
    before = torch.get_rng_state()
    with torch.inference_mode():
        lines = minrnn.warmup(layers, torch.bfloat16, reset=True)
    assert torch.equal(before, torch.get_rng_state())
    assert len(lines) == 4
    assert all("torch.bfloat16" in line for line in lines)
    assert all(p.grad is None for p in layers.parameters())
    for gates, reset in (("mingru", 1), ("minlstm", 2), ("minlstm_unnormalized", 1)):
        for totals in (False, True):
            assert ("forward_kernel", gates, 1, totals) in ran
            assert ("backward_kernel", gates, reset, totals) in ran
    assert ("sum_kernel", None, None, None) in ran


def test_warmup_knows_mamba(monkeypatch):
    from minrnn.mixers import make_mixer

    monkeypatch.setenv("MINRNN_BACKEND", "triton")
    monkeypatch.setattr(_warmup, "_LENGTH", 5)
    mamba = make_mixer("mamba", 4, {}).bfloat16()
    assert minrnn.warmup(mamba, reset=True) == ["S6, 8 wide, torch.bfloat16, on cpu"]
    assert minrnn.ops.last_backend() == "triton" and all(p.grad is None for p in mamba.parameters())


def test_warmup_is_for_autocast_too(monkeypatch):
    """Where a norm gives S6 float32, and linear maps what they make of it in bfloat16."""
    from minrnn.mixers.inner import make_inner
    from minrnn.ops.triton import selective

    ran, launch = set(), selective.launch

    def record(kernel, programs, device, *args, **arguments):
        given = [*args, *arguments.values()]
        ran.add((kernel.fn.__name__, *(x.dtype for x in given if isinstance(x, Tensor))))
        launch(kernel, programs, device, *args, **arguments)

    monkeypatch.setattr(selective, "launch", record)
    monkeypatch.setenv("MINRNN_BACKEND", "triton")
    monkeypatch.setattr(_warmup, "_LENGTH", 5)
    s6 = make_inner("s6", 4, {})
    minrnn.warmup(s6, torch.bfloat16)
    warm = ran.copy()
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = s6(torch.randn(1, 5, 4, requires_grad=True))
    y.sum().backward()
    assert ran and ran <= warm
