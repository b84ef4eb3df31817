"""The GPU kernels of the selective scan as code for GPUs, which Triton's compiler makes without one."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

if __name__ != "__main__":
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Triton is not installed", allow_module_level=True)

FORWARD, BACKWARD, ENDS = "forward_kernel", "backward_kernel", "ends_kernel"
STEPS = {FORWARD: 8, ENDS: 8, BACKWARD: 4}  # that a turn of the inner loop makes


def calls(width: int, states: int, dtype: torch.dtype, resets: bool) -> dict[str, tuple]:
    """What the library launches for such a series: kernel and arguments by name."""
    from minrnn.ops.triton import selective

    found = {}
    selective._LONG = 0  # in pieces
    selective.launch = lambda kernel, programs, device, *args, **options: found.setdefault(
        kernel.fn.__name__ + ("" if options.get("BACK") is None else str(options["BACK"])), (kernel, args, options)
    )
    keep = torch.float64 if dtype == torch.float64 else torch.float32
    u = torch.empty(2, 2048, width, dtype=dtype)
    A, B, D = (torch.empty(shape, dtype=keep) for shape in ((width, states), (2, 2048, states), (width,)))
    initial, reset = torch.empty(2, width, states, dtype=keep), torch.empty(2, 2048, dtype=torch.bool)
    inputs = (u, u, A, B, B, D, initial, reset if resets else None, D)
    selective.backward((None, None), inputs, selective.forward(*inputs))
    return found


def compiled(kernel, args: tuple, options: dict, capability: int) -> dict:
    """What the GPU's code needs and is, of a call with arguments as in `calls`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    types |= {torch.bool: "i1", torch.uint8: "u8"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = args[i] if i < len(args) else options[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{parameter.name} makes a variant for each of its values"
            signature[parameter.name] = parameter.annotation_type or "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": options["num_warps"]})
    file, tools = Path(os.environ["TRITON_CACHE_DIR"]) / "code.cubin", Path(triton.__path__[0]) / "backends/nvidia/bin"
    file.write_bytes(code.asm["cubin"])
    usage, listing = (
        subprocess.run([tools / tool, *flags, file], check=True, capture_output=True, text=True).stdout
        for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
    )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "loop": longest_inner_loop(listing)}


def longest_inner_loop(listing: str) -> Counter:
    """How often each instruction is in the longest loop that holds no other."""
    labels, code, loops = {}, [], []
    for line in map(str.strip, listing.splitlines()):
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif word := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            code.append(word[1])
            target = re.search(r"\.(L_x_\d+)", line)
            if word[1].startswith("BRA") and target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return Counter(word.split(".")[0] for word in code[begin:end])


def results(tmp_path, *cases) -> list[dict]:
    """`compiled` of cases (width, states, dtype, resets, capability), in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout)


def check(found: dict, states: int, most: dict[str, float]) -> None:
    """No register is spilled, no sum crosses threads without need, and a number of state takes no more instructions in
    the inner loop than `most`."""
    for name, code in found.items():
        kind = name.rstrip("01")
        assert code["stack"] == 0, f"{name} spills: {code}"
        assert code["loop"].get("LDL", 0) == code["loop"].get("STL", 0) == 0, name
        if kind != BACKWARD:  # no sum crosses threads
            assert not {"SHFL", "BAR", "LDS", "STS"} & set(code["loop"]), f"{name}: {code}"
        assert code["loop"].get("BAR", 0) == 0, name
        each = sum(code["loop"].values()) / (STEPS[kind] * states)
        assert each <= most[kind], f"{name}: {each:.2f} instructions"
        # Powers of two and their multiplications have instructions of their own, and each number has one power.
        assert code["loop"]["MUFU"] / (STEPS[kind] * states) <= (2.3 if kind == BACKWARD else 1.2), name


def test_what_the_gpu_runs(tmp_path):
    """Mamba's sizes. The bounds are a tenth above what was counted: 8.6, 7.9 and 29.3."""
    (found,) = results(tmp_path, (256, 16, "float32", False, 90))
    assert set(found) == {FORWARD, BACKWARD, ENDS + "0", ENDS + "1"}
    check(found, 16, {FORWARD: 9.5, ENDS: 8.7, BACKWARD: 32.3})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_variant(tmp_path, capability, resets, dtype):
    small, large = results(tmp_path, *((256, N, dtype, resets, capability) for N in (4, 16)))
    assert all(code["stack"] == 0 for code in small.values()), small
    check(large, 16, {FORWARD: 11, ENDS: 10.5, BACKWARD: 35.5})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_large_states_and_float64(tmp_path, capability):
    cases = [(48, N, "float32", True, capability) for N in (32, 64, 128, 256)]
    for code in results(tmp_path, *cases, (48, 16, "float64", True, capability)):
        assert len(code) == 4, code


if __name__ == "__main__":
    found = []
    for width, states, dtype, resets, capability in json.loads(sys.argv[1]):
        launched = calls(width, states, getattr(torch, dtype), resets)
        launched.pop("sum_kernel", None)
        found.append({name: compiled(*call, capability) for name, call in launched.items()})
    sys.stdout.write(json.dumps(found))
