"""Whether the scans are right on a device: fresh random inputs, against the step loop in float64.

A case is an op, a dtype, a shape and options. All outputs and all gradients are compared; memory is full of NaN before;
a second run must give the same bits, and so must a sequence of the batch by itself. The cases run in processes of their
own, several at once, because compiling kernels takes most of the time. A case that brings its process down, as an
illegal access to a GPU's memory does, is wrong, and the others go on in a new process.
"""

import contextlib
import json
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minrnn._shapes import accumulate_dtype
from minrnn.bench.measure import last_line
from minrnn.ops import last_backend, linear_scan, mingru_scan, minlstm_scan, selective_scan

# The largest `error` that is right, of values and of gradients. Values are off by their own rounding at the end; 16-bit
# gradients by that of h, of which they are differences.
TOLERANCE = {
    "float64": (1e-10, 1e-10),
    "complex128": (1e-10, 1e-10),
    "float32": (1e-4, 1e-4),
    "complex64": (1e-4, 1e-4),
    "float16": (5e-4, 5e-3),
    "bfloat16": (4e-3, 4e-2),
}
SCANS = ("linear_scan", "mingru_scan", "minlstm_scan")
OPS = (*SCANS, "selective_scan")
SERIES = {"coeffs", "values", "projection", "u", "delta", "B", "C", "h", "y"}  # (B, T, *)
SHARED = {"restart", "A", "D", "bias"}  # by all sequences
WORKER = "from minrnn.bench import check; check.main()"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An op over (batch, length, hidden). Options:

    "initial", "reset", "restart", "lengths", "reverse", "tanh", "identity", "unnormalized", "bias": that argument;
    "broadcast": coefficients of the channels alone; "slow": the state lasts for hundreds of steps; "nan": NaN before a
    reset in the middle; "time-major", "sliced", "spaced" (a channel stride of 2): how the series lie in memory; "rows":
    only the first, the middle and the last sequence are compared, for sizes that the step loop cannot do.
    """

    op: str
    dtype: str
    batch: int
    length: int
    hidden: int
    options: tuple[str, ...] = ()
    state: int = 16  # per channel, of selective_scan

    def __str__(self) -> str:
        return " ".join((self.op, self.dtype, f"({self.batch}, {self.length}, {self.hidden})", *self.options))

    def rows(self, x: Tensor) -> Tensor:
        """What is compared of (B, *)."""
        if "rows" not in self.options:
            return x
        return torch.stack([x[i] for i in (0, self.batch // 2, self.batch - 1)])

    @property
    def cut(self) -> int:
        """The step before which everything is NaN."""
        return self.length // 2 if "nan" in self.options else 0


def cases() -> list[Case]:
    """What is checked on a GPU, what matters most first."""
    real, both = ("float32", "bfloat16", "float64"), ("initial", "reset")
    plain, odd, turned, long, small = (4, 1000, 256), (3, 257, 33), (5, 130, 100), (2, 8209, 8), (2, 67, 7)
    large = ("mingru_scan", "bfloat16", 550, 2048, 1024)  # a projection of more than 2^31 numbers
    gated = {"linear_scan": (), "mingru_scan": ("restart", "lengths"), "minlstm_scan": ("restart", "lengths")}
    found = [Case(op, dtype, *plain) for op in SCANS for dtype in real]
    found += [Case("selective_scan", dtype, 2, 300, 96, ("bias",)) for dtype in real]
    found += [Case(*large, ("rows",)), Case(*large, ("rows", "time-major"))]
    found += [Case("linear_scan", "bfloat16", 1100, 2048, 1024, ("rows",))]
    for dtype in real:
        found += [Case(op, dtype, *odd, (*both, *gated[op])) for op in SCANS]
        found += [Case(op, dtype, *long, (*both, "slow")) for op in SCANS]
        found += [Case(op, dtype, *turned, (*both, *gated[op], "reverse", "time-major")) for op in SCANS]
        found += [Case("selective_scan", dtype, 3, 131, 33, both, state=5)]
        found += [Case("selective_scan", dtype, 1, 4099, 16, (*both, "bias", "slow"))]
    for dtype in ("complex64", "complex128"):
        found += [Case("linear_scan", dtype, *plain), Case("linear_scan", dtype, *odd, both)]
        found += [Case("linear_scan", dtype, *long, ("reverse", "slow"))]
    for dtype in real:
        found += [Case(op, dtype, *small, ("initial", "sliced", "nan")) for op in OPS]
        found += [Case("linear_scan", dtype, *odd, ("reset", "broadcast"))]
        found += [Case(op, dtype, *long, ("reverse", "slow")) for op in SCANS]
        found += [Case(op, dtype, *turned, ("tanh", "spaced")) for op in ("mingru_scan", "minlstm_scan")]
        found += [Case(op, dtype, *turned, ("initial", "identity")) for op in ("mingru_scan", "minlstm_scan")]
        found += [Case("minlstm_scan", dtype, *odd, (*both, "restart", "unnormalized"))]
    found += [Case(op, "float16", *odd, both) for op in OPS]
    for shape in ((1, 1, 1), (2, 1, 300), (2, 0, 5), (0, 3, 5), (3, 4, 0)):
        found += [Case(op, "float32", *shape, ("initial",)) for op in OPS]
    return found


def run(
    cases: Sequence[Case], device: str, seed: int, seconds: float, workers: int = 0, backend: str | None = None
) -> Iterator[dict[str, Any]]:
    """The results of the cases as they come, of as many as `seconds` allow; without `workers`, in this process."""
    end = time.monotonic() + seconds
    if not workers:
        for case in cases:
            if time.monotonic() < end:
                yield guarded(case, device, seed, backend)
        return
    shares: list[list[Case]] = [[] for _ in range(workers)]
    for i, case in enumerate(cases):  # what needs much memory comes one after the other
        shares[0 if "rows" in case.options else i % workers].append(case)
    results: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threads = [
        threading.Thread(target=_hand_on, args=(_work(share, device, seed, end, backend), results.put), daemon=True)
        for share in shares
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        yield from iter(results.get, None)


def _hand_on(results: Iterator[dict[str, Any]], put: Callable[[dict[str, Any] | None], None]) -> None:
    """To a queue, and None after the last, whatever happens."""
    try:
        for result in results:
            put(result)
    finally:
        put(None)


def _work(share: list[Case], device: str, seed: int, end: float, backend: str | None) -> Iterator[dict[str, Any]]:
    """The results of one share of the cases, in one process as long as it lives."""
    while share and time.monotonic() < end:
        words = {"device": device, "seed": seed, "backend": backend, "cases": [asdict(case) for case in share]}
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-c", WORKER, json.dumps(words)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            killer = threading.Timer(end - time.monotonic(), child.kill)
            killer.start()
            try:
                for line in child.stdout or ():
                    if line.startswith("{"):
                        share.pop(0)
                        yield json.loads(line)
                if child.wait() and share and time.monotonic() < end:
                    errors.seek(0)
                    why = last_line(errors.read(), child.returncode)
                    yield _result(share.pop(0), "wrong", f"its process ended: {why}")
            finally:
                killer.cancel()
                child.kill()


def main() -> None:
    """The cases that the JSON on the command line names, a line of JSON for each result; ends where CUDA does."""
    words = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    for fields in words["cases"]:
        case = Case(**{**fields, "options": tuple(fields["options"])})
        result = guarded(case, words["device"], words["seed"], words["backend"])
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        if "CUDA" in result["why"]:  # PyTorch's or Triton's words for it
            return


def guarded(case: Case, device: str, seed: int, backend: str | None = None) -> dict[str, Any]:
    """`check`, where whatever is raised is a result too."""
    try:
        return check(case, device, seed, backend)
    except Exception as error:
        return _result(case, "wrong", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def check(case: Case, device: str, seed: int, backend: str | None = None) -> dict[str, Any]:
    """One case: right, wrong and why, or skipped and why; how far it is off, and which backend ran."""
    if "rows" in case.options and device != "cpu":
        needed = 8 * case.batch * case.length * case.hidden * getattr(torch, case.dtype).itemsize
        if torch.cuda.mem_get_info(device)[0] < needed:
            return _result(case, "skipped", f"it needs {needed / 1e9:.0f} GB of free memory")
    generator = torch.Generator(device).manual_seed(seed)
    leaves, context = _inputs(case, generator)
    wrong = []
    with poisoned():
        outputs = _call(case, leaves, context, backend)
        ran = last_backend()
        weights = {name: _random(x.shape, x.dtype, generator) for name, x in outputs.items()}
        for name in SERIES & weights.keys():
            weights[name][:, : case.cut] = 0
        came = outputs | _gradients(outputs, leaves, weights)
        if "rows" not in case.options:
            again = _call(case, leaves, context, backend)
            again |= _gradients(again, leaves, weights)
            wrong += [f"{name} differs between two runs" for name in came if not _same(came[name], again[name])]
        wrong += _alone(case, leaves, context, outputs, backend)
    chosen = {name: _wide(x if _shared(name, case) else case.rows(x)) for name, x in leaves.items()}
    if case.cut:
        chosen = {name: x.nan_to_num() for name, x in chosen.items()}
    for x in chosen.values():
        x.requires_grad_()
    want = _call(case, chosen, {name: case.rows(x).cpu() for name, x in context.items()}, "reference")
    want |= _gradients(want, chosen, {name: _wide(case.rows(x)) for name, x in weights.items()})
    worst = 0.0
    for name, wanted in want.items():
        plain = name.removeprefix("gradient of ")
        if case.cut and plain not in SERIES | {"last"}:  # steps that are NaN have a part in it
            continue
        found = (came[name] if _shared(plain, case) else case.rows(came[name])).detach().cpu()
        if plain in SERIES:
            found, wanted = found[:, case.cut :], wanted[:, case.cut :]
        off = error(found, wanted.detach())
        worst = max(worst, off)
        if off > TOLERANCE[case.dtype][name != plain]:
            wrong.append(f"{name} is off by {off:.2g}")
    off = worst if math.isfinite(worst) else None
    return _result(case, "wrong" if wrong else "right", "; ".join(wrong), off, ran)


def error(came: Tensor, want: Tensor) -> float:
    """The largest |came - want| / (|want| + its root mean square); infinite for NaN and for another shape."""
    if came.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    off = (came.to(want.dtype) - want).abs()
    worst = torch.where(off == 0, 0, off / (want.abs() + want.abs().square().mean().sqrt())).max().item()
    return worst if math.isfinite(worst) else math.inf


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that no output passes that was not written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each op: how many cases are right, on which backend, and the largest error of each dtype."""
    lines = []
    for op in dict.fromkeys(result["op"] for result in results):
        own = [result for result in results if result["op"] == op]
        done = [result for result in own if result["status"] != "skipped"]
        known = {
            dtype: [r["error"] for r in done if r["dtype"] == dtype and r["error"] is not None] for dtype in TOLERANCE
        }
        errors = ", ".join(f"{dtype} {max(offs):.1g}" for dtype, offs in known.items() if offs)
        backends = ", ".join(sorted({result["backend"] or "none" for result in done}))
        right = sum(result["status"] == "right" for result in done)
        lines.append(f"{op:<15}{right} of {len(done)} cases right on {backends}; largest error {errors}")
    return lines


def _result(case: Case, status: str, why: str, off: float | None = None, ran: str | None = None) -> dict[str, Any]:
    words = {"case": str(case), "op": case.op, "dtype": case.dtype, "status": status, "why": why}
    return words | {"error": off, "backend": ran}


def _inputs(case: Case, generator: torch.Generator) -> tuple[Tensors, Tensors]:
    """What the op is differentiated by, and reset and lengths."""
    dtype, options = getattr(torch, case.dtype), case.options
    keep, slow = accumulate_dtype(dtype), "slow" in options
    batch, time, hidden = case.batch, case.length, case.hidden

    def random(*shape: int, kept: bool = False) -> Tensor:
        return _random(shape, keep if kept else dtype, generator)

    def series(width: int) -> Tensor:
        if "time-major" in options:
            return random(time, batch, width).transpose(0, 1)
        if "sliced" in options:
            return random(batch, time, width + 5)[..., 3 : 3 + width]
        return random(batch, time, 2 * width)[..., ::2] if "spaced" in options else random(batch, time, width)

    if case.op == "linear_scan":
        coeffs = random(1, 1, hidden) if "broadcast" in options else series(hidden)
        if slow:
            size = 1 - 0.002 * coeffs.abs()
            coeffs.copy_(torch.sgn(coeffs) * size if dtype.is_complex else size)
        else:
            coeffs.mul_(0.4)
        leaves = {"coeffs": coeffs, "values": series(hidden)}
    elif case.op == "selective_scan":
        leaves = {"u": series(hidden), "delta": series(hidden).mul_(0.5)}
        leaves |= {"A": -0.2 - random(hidden, case.state, kept=True).abs()}
        leaves |= {"B": series(case.state), "C": series(case.state), "D": random(hidden, kept=True)}
        if "bias" in options:
            leaves["bias"] = random(hidden, kept=True) - (6 if slow else 2)
        else:
            leaves["delta"].abs_().mul_(0.2)
    else:
        projection = series((2 if case.op == "mingru_scan" else 3) * hidden)
        if slow:
            projection[..., :hidden] += -6 if case.op == "mingru_scan" else 3
            projection[..., hidden:-hidden] -= 3
        leaves = {"projection": projection}
    if "initial" in options:
        states = (hidden, case.state) if case.op == "selective_scan" else (hidden,)
        leaves["initial"] = random(batch, *states, kept=True)
    if "restart" in options:
        leaves["restart"] = random(hidden, kept=True)
    context = {}
    if "reset" in options or case.cut:
        share = 0.001 if slow else 0.03
        context["reset"] = torch.rand(batch, time, generator=generator, device=generator.device) < share
    if "lengths" in options:
        context["lengths"] = torch.randint(time + 1, (batch,), generator=generator, device=generator.device)
    if case.cut:
        context["reset"][:, case.cut] = True
        for name in SERIES & leaves.keys():
            leaves[name][:, : case.cut] = math.nan
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, context


def _call(case: Case, leaves: Tensors, context: Tensors, backend: str | None) -> Tensors:
    """The op's outputs by their names."""
    if case.op == "selective_scan":
        return dict(zip(("y", "last"), selective_scan(**leaves, **context, backend=backend), strict=True))
    reverse = "reverse" in case.options
    if case.op == "linear_scan":
        return {"h": linear_scan(**leaves, **context, reverse=reverse, backend=backend)}
    activation = next((name for name in ("tanh", "identity") if name in case.options), "g")
    words = {**leaves, **context, "reverse": reverse, "activation": activation, "backend": backend}
    if case.op == "mingru_scan":
        return dict(zip(("h", "last"), mingru_scan(**words), strict=True))
    return dict(zip(("h", "last"), minlstm_scan(**words, normalize="unnormalized" not in case.options), strict=True))


def _gradients(outputs: Tensors, leaves: Tensors, weights: Tensors) -> Tensors:
    names = [name for name, x in outputs.items() if x.requires_grad]
    grads = torch.autograd.grad(
        [outputs[name] for name in names], list(leaves.values()), [weights[name] for name in names], allow_unused=True
    )
    pairs = zip(leaves.items(), grads, strict=True)
    return {f"gradient of {name}": torch.zeros_like(x) if grad is None else grad for (name, x), grad in pairs}


def _alone(case: Case, leaves: Tensors, context: Tensors, outputs: Tensors, backend: str | None) -> list[str]:
    """What of the last sequence is not the same, bit by bit, when it is run by itself."""
    if case.batch < 2:
        return []
    one = slice(case.batch - 1, case.batch)
    with torch.no_grad():
        own = {name: x if _shared(name, case) else x[one] for name, x in leaves.items()}
        alone = _call(case, own, {name: x[one] for name, x in context.items()}, backend)
    return [f"{name} depends on the batch" for name, x in alone.items() if not _same(x, outputs[name][one])]


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def _shared(name: str, case: Case) -> bool:
    return name in SHARED or (name == "coeffs" and "broadcast" in case.options)


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator, device=generator.device)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.complex128 if x.is_complex() else torch.float64)
