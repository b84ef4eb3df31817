"""What PyTorch may be doing with the operations that it is shown, and kernels, which go by addresses, cannot see."""

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether `torch.func` or forward mode is at work: what a kernel computes has neither a mapped dimension nor a
    tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched(tensors: tuple) -> bool:
    """Whether operations are recorded (`torch.jit.trace`, `make_fx`), or there is something other than memory behind a
    tensor (`FakeTensor`, `DTensor`): a kernel is then to be inside an operator."""
    if torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return True
    memory = torch._C._disabled_torch_dispatch_impl
    return any(x is not None and type(x).__torch_dispatch__ is not memory for x in tensors)


def refuse_legacy(caller: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where one is batched as `torch.autograd.functional` does it, which hides its memory."""
    if any(x is not None and is_legacy_batchedtensor(x) for x in tensors):
        raise NotImplementedError(
            f"{caller}: is_grads_batched and vectorize=True map tensors in a way that PyTorch has given up; "
            "torch.func.jacrev and jacfwd, or torch.func.vmap over torch.func.vjp or jvp, do the same"
        )


def out_of_range(lengths: Tensor, time: int) -> bool:
    """Whether one of the lengths is not between 0 and `time`; False where their values cannot be looked at without a
    wait for a device or a break of a graph, or in a transform."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or watched((lengths,)) or not lengths.numel():
        return False
    shortest, longest = torch.aminmax(lengths)
    return bool(shortest < 0 or longest > time)
