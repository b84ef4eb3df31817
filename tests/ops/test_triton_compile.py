"""The GPU kernels, compiled as the scans' host code asks for them, for GPUs that need not be there: Triton brings the
assembler and the disassembler. What the design rests on is read from the machine code."""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from minrnn.ops.triton import interpreted

triton = pytest.importorskip("triton")
if interpreted():
    pytest.skip("kernels are compiled without TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from minrnn.ops.triton import scan  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ACTIVATIONS = ("g", "identity", "tanh")
GATES = ("mingru", "minlstm", "minlstm_unnormalized")
# Registers of a multiprocessor, and the shared memory that its programs may have.
REGISTERS, SHARED = 1 << 16, {80: 163 << 10, 90: 227 << 10}


def launches(monkeypatch, direction: str, gates: str, activation: str, dtype, *, T=4096, B=2, H=256, gpu=132, **given):
    """What the host code would launch: (kernel, programs, arguments) of each kernel."""
    found = []

    def launch(kernel, programs, device, *args, **arguments):
        names = dict(zip(kernel.arg_names, args, strict=False))
        found.append((kernel, programs, {**names, **arguments}))

    monkeypatch.setattr(scan, "launch", launch)
    monkeypatch.setattr(scan, "multiprocessors", lambda device: gpu)
    keep = torch.float32 if dtype.itemsize == 2 else dtype
    blocks = 2 if gates in ("mingru", "linear") else 3
    state = torch.empty(B, H, dtype=keep)
    source = torch.empty(B, T, H if gates == "linear" else blocks * H, dtype=dtype)
    values = torch.empty(B, T, H, dtype=dtype) if gates == "linear" else None
    reset = torch.empty(B, T, dtype=torch.bool) if given.get("reset") else None
    restart = state[0].expand(B, H) if given.get("restart") else None
    lengths = torch.full((B,), T) if given.get("lengths") else None
    inputs = (source, values, state if given.get("initial", True) else None, reset, restart, lengths)
    if direction == "forward":
        scan.forward(inputs, gates, activation, given.get("reverse", False))
    else:
        scan.backward(torch.empty(B, T, H, dtype=dtype), state, inputs, torch.empty(B, T, H, dtype=dtype), gates,
                      activation, given.get("reverse", False))  # fmt: skip
    return found


def specialised(kernel, arguments: dict, capability: int = 90):
    """(what Triton would compile, its options, the key by which it looks for what it has compiled)."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, key, options = bind(**arguments)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, key, options)
    return ASTSource(kernel, signature, constants, attributes), parsed, (str(key), str(options))


class Code:
    """A kernel's machine code."""

    def __init__(self, kernel, arguments: dict, capability: int):
        source, options, _ = specialised(kernel, arguments, capability)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        self.shared, self.ttgir = compiled.metadata.shared, compiled.asm["ttgir"]
        self.threads = 32 * compiled.metadata.num_warps
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            run = {"capture_output": True, "text": True, "check": True}
            usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], **run).stdout
            text = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], **run).stdout
        self.registers, self.stack, self.local = (
            int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
        )
        lines = [(int(at, 16), op) for at, op in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.M)]
        self.all = Counter(name(op) for _, op in lines)
        # The longest loop is the one over tiles.
        loops = [
            [name(op) for at, op in lines if int(to.group(1), 16) <= at <= end]
            for end, jump in lines
            if name(jump).startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", jump)) and int(to.group(1), 16) < end
        ]
        self.loop = Counter(max(loops, key=len)) if loops else Counter()

    def count(self, start: str) -> int:
        return sum(n for op, n in self.loop.items() if op.startswith(start))


def name(op: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", op).split()[0]


def check(code: Code, capability: int, spill: int = 0) -> None:
    assert code.local == 0 and code.stack <= spill  # bytes of a thread's numbers that do not fit its registers
    assert 2 * code.registers * code.threads <= REGISTERS  # two programs fit a multiprocessor
    assert 2 * code.shared <= SHARED[capability]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_loop_over_tiles(monkeypatch, direction, dtype, capability):
    """Reads are asynchronous copies of 16 bytes into shared memory, and an element's instructions leave the memory the
    slower part: 132 multiprocessors issue 57 in the time in which an element of 6 bytes, that of forward in bfloat16,
    is copied, and 114 for 12 bytes."""
    (kernel, _, arguments), *more = launches(monkeypatch, direction, "mingru", "g", dtype, B=64)
    assert not more
    code = Code(kernel, arguments, capability)
    check(code, capability)
    elements = arguments["S"] * arguments["L"] * arguments["C"] / code.threads
    tensors = 2 if direction == "forward" else 4
    assert code.loop["LDGSTS.E.BYPASS.128"] == tensors * elements * dtype.itemsize / 16
    assert code.count("LDG.") == 0
    bytes_moved = dtype.itemsize * (3 if direction == "forward" else 6)
    assert sum(code.loop.values()) / elements <= 0.7 * 57 * bytes_moved / 6
    assert code.count("BAR") <= 8


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_first_reading_of_chunks_costs_less(monkeypatch, direction):
    """It makes no step twice, and reads only what the maps are made of: backward, the gate and the gradient of h."""
    (kernel, _, arguments), *_ = launches(monkeypatch, direction, "mingru", "g", torch.bfloat16, gpu=10**6)
    assert arguments["TOTALS"]
    code = Code(kernel, arguments, 90)
    check(code, 90)
    elements = arguments["S"] * arguments["L"] * arguments["C"] / code.threads
    assert code.loop["LDGSTS.E.BYPASS.128"] == 2 * elements * 2 / 16
    assert sum(code.loop.values()) / elements <= 32


VARIANTS = [
    ("forward", "minlstm", "g", torch.bfloat16, {"reset": True, "restart": True}),
    ("backward", "minlstm", "tanh", torch.bfloat16, {}),
    ("backward", "minlstm", "g", torch.float32, {"reset": True, "restart": True}),
    ("backward", "mingru", "g", torch.float16, {"reset": True}),
    ("forward", "minlstm_unnormalized", "identity", torch.float32, {}),
    ("backward", "linear", "identity", torch.float32, {"reset": True}),
    ("forward", "linear", "identity", torch.complex64, {}),
    ("backward", "linear", "identity", torch.complex128, {"reset": True}),
    ("forward", "mingru", "g", torch.bfloat16, {"H": 5}),
    ("backward", "mingru", "g", torch.float32, {"H": 33}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant(monkeypatch, variant):
    *what, given = variant
    for kernel, _, arguments in launches(monkeypatch, *what, gpu=10**6 if what[0] == "forward" else 1, **given):
        check(Code(kernel, arguments, 90), 90, 64 if given.get("restart") and what[1] == "minlstm" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, 80), (torch.float32, 90)], ids=str)
@pytest.mark.parametrize("gates", [*itertools.product(GATES, ACTIVATIONS), ("linear", "identity")], ids=str)
def test_every_variant(monkeypatch, gates, dtype, capability, direction):
    for given in ({}, {"reset": True, "restart": gates[0] != "linear"}):
        for kernel, _, arguments in launches(monkeypatch, direction, *gates, dtype, gpu=10**6, H=100, **given):
            # Resets of three gates are not worth a kernel that spills nothing.
            check(Code(kernel, arguments, capability), capability, 64 if given else 0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_new_batch_or_length_is_no_new_variant(monkeypatch, direction):
    """What Triton looks up is the same for any B and T, any lengths and states, either direction of time, and for
    offsets beyond 2^31."""
    keys = {}
    cases = [
        {"B": b, "T": t, "reverse": r, "initial": i, "lengths": r}
        for (b, t), r, i in itertools.product(
            [(1, 1), (2, 7), (16, 1000), (3, 4096), (1, 70000)], (False, True), (False, True)
        )
    ]
    for case in cases:
        for kernel, _, arguments in launches(monkeypatch, direction, "mingru", "g", torch.bfloat16, gpu=132, **case):
            keys.setdefault((kernel.__name__, arguments.get("TOTALS")), set()).add(specialised(kernel, arguments)[2])
            if "time_h" in arguments:
                huge = {
                    **arguments,
                    "batch0": 1 << 40,
                    "time0": 1 << 33,
                    "batch_h": 1 << 40,
                    "T": (1 << 31) - 1,
                    "tiles": 1,
                }
                assert specialised(kernel, huge)[2] in keys[kernel.__name__, arguments["TOTALS"]]
    assert len(keys) == 3  # the walk, the chunks as maps, and their joining
    assert all(len(found) == 1 for found in keys.values()), keys


def test_offsets_are_of_64_bits(monkeypatch):
    """No product of a stride and an index is made in 32 bits."""
    for direction in ("forward", "backward"):
        for kernel, _, arguments in launches(monkeypatch, direction, "mingru", "g", torch.float32, gpu=10**6):
            source, options, _ = specialised(kernel, arguments)
            text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options.__dict__).asm["ttir"]
            narrow = re.findall(r"arith\.muli (%(?:batch|time)\w+), .*: (?!i64|tensor<\w*xi64>)", text)
            assert not narrow
            wide = re.findall(r"tt\.addptr .*tensor<(?:\d+x)*i64>|tt\.addptr .*, i64", text)
            assert wide
