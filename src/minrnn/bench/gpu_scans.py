"""Our scans beside public ones on a GPU: parts of benchmarks/gpu.py."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn.bench import measure, systems, table
from minrnn.bench.gpu import Run
from minrnn.bench.measure import Summary, Times
from minrnn.bench.table import Skipped
from minrnn.ops import linear_scan, selective_scan


@dataclass(frozen=True)
class Contender:
    """A scan and what it is called with: leaves, all of which have gradients."""

    scan: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]

    def forward(self) -> None:
        with torch.no_grad():
            self.scan(*self.leaves)

    def training(self, gradients: measure.Gradients) -> None:
        result = self.scan(*self.leaves)
        torch.autograd.grad(result, self.leaves, gradients.like(result))


def side_by_side(run: Run, contenders: dict[str, Contender], where: str) -> dict[str, Times]:
    """Times of scans, forward and forward + backward; one that cannot do it is left out."""
    able, gradients = {}, measure.Gradients()
    for name, contender in contenders.items():
        try:
            contender.training(gradients)
            able[name] = contender
            if contender is next(iter(contenders.values())):  # ours
                run.ran(name)
        except Exception as error:
            run.leave_out(f"{name} at {where}", error)
            run.release()
    found = {
        "forward": run.alternate({name: contender.forward for name, contender in able.items()}),
        "forward + backward": run.alternate(
            {name: partial(contender.training, gradients) for name, contender in able.items()}
        ),
    }
    for what, times in found.items():
        medians = {name: asdict(Summary.of(seconds)) for name, seconds in times.items()}
        run.result["scans"].append({"what": what, "where": where, "seconds": medians})
    return found


def public_scan(run: Run, batch: int, channels: int, length: int) -> None:
    """linear_scan against accelerated-scan's Triton kernel, each in its own layout: ours has the channels, theirs the
    time next to each other in memory. Both work on the same numbers."""
    name, theirs = accelerated()
    memory = [torch.rand(batch * length * channels, device=run.device) for _ in range(2)]

    def leaves(*shape: int) -> tuple[Tensor, ...]:
        return tuple(x.view(shape).detach().requires_grad_() for x in memory)

    contenders = {
        "linear_scan": Contender(linear_scan, leaves(batch, length, channels)),
        name: Contender(theirs, leaves(batch, channels, length)),
    }
    where = f"({batch}, {length}, {channels}) float32"
    for what, times in side_by_side(run, contenders, where).items():
        if {name, "linear_scan"} <= times.keys():
            run.judge(table.compared(times, ">=", 0.95, name, "linear_scan", where, f"{what}: "))


def accelerated() -> tuple[str, Callable[..., Tensor]]:
    """accelerated-scan's Triton kernel and its name; 0.3 calls the module `scalar`, what came before `triton`."""
    for module in ("accelerated_scan.scalar", "accelerated_scan.triton"):
        try:
            return module, importlib.import_module(module).scan
        except ModuleNotFoundError:
            continue
    raise Skipped("accelerated_scan, or Triton, is not installed")


def selective(run: Run, batch: int, length: int, width: int, states: int, dtype: str) -> None:
    """selective_scan against the best installed peer: Mamba's CUDA kernel, or mambapy, or our own plain form."""
    kind = systems.DTYPES[dtype]

    def leaves(*, time_last: bool) -> tuple[Tensor, ...]:
        def series(size: int) -> Tensor:
            return torch.randn((batch, size, length) if time_last else (batch, length, size), device=run.device)

        u, delta, into, out = (series(size).to(kind) for size in (width, width, states, states))
        rates, past, bias = (torch.rand(*shape, device=run.device) for shape in ((width, states), (width,), (width,)))
        return tuple(x.requires_grad_() for x in (u, delta, -rates, into, out, past, bias - 3))

    def ours(*tensors: Tensor, backend: str | None = None) -> Tensor:
        return selective_scan(*tensors[:-1], bias=tensors[-1], backend=backend)[0]

    own = leaves(time_last=False)
    contenders = {"selective_scan": Contender(ours, own)}
    if importlib.util.find_spec("mamba_ssm"):
        kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

        def fused(*tensors: Tensor) -> Tensor:
            return kernel(*tensors[:-1], delta_bias=tensors[-1], delta_softplus=True)

        contenders["mamba_ssm"] = Contender(fused, leaves(time_last=True))
    elif importlib.util.find_spec("mambapy"):
        block = importlib.import_module("mambapy.mamba").MambaBlock

        def plain(u: Tensor, delta: Tensor, *rest: Tensor) -> Tensor:
            tensors = F.softplus(delta + rest[-1]), *rest[:-1]  # of one dtype, which it needs
            return block.selective_scan(None, u, *(x.to(u.dtype) for x in tensors))

        contenders["mambapy"] = Contender(plain, own)
    else:
        contenders["selective_scan, plain PyTorch"] = Contender(partial(ours, backend="parallel"), own)
    side_by_side(run, contenders, f"({batch}, {length}, {width}) with {states} states {dtype}")
