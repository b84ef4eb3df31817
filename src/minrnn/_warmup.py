"""Compiles GPU kernels ahead of the first call that needs them."""

import torch
from torch import Tensor, nn

from minrnn._gated import Gated
from minrnn._shapes import accumulate_dtype
from minrnn.mixers.minrnn import MinRNNMixer
from minrnn.mixers.s6 import S6
from minrnn.ops import backends, selective_scan

_LENGTH = 4097  # long enough for time to be divided, which other kernels do


def warmup(
    module: nn.Module, dtype: torch.dtype | None = None, *, reset: bool = False, backward: bool = True
) -> list[str]:
    """Compile the GPU kernels that the layers, cells and mixers in `module` will call: minGRU, minLSTM, S6 and Mamba.

    A kernel is compiled once for a width, a dtype and a kind of gate, whatever the batch and the length; without this,
    in the first call that needs it. Compiled kernels stay in Triton's cache on disk. Parameters, gradients and random
    generators are left as they are. On the CPU there is nothing to compile, and nothing is done.

    Args:
        module: on the device on which it will run.
        dtype: of the activations where it is not that of the weights: torch.bfloat16 for a float32 module that will run
            under autocast.
        reset: whether calls will give resets, which have kernels of their own.
        backward: whether gradients will be asked for.

    Returns: what was run, a line for each kind of recurrence in the module.

    Raises: TypeError if `module` is no nn.Module.

    Example:
        >>> warmup(MinGRU(64, 128), torch.bfloat16)
        []
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"warmup: module must be an nn.Module, got {type(module).__name__}")
    done: dict[tuple, str] = {}
    for part in module.modules():
        if not isinstance(part, Gated | MinRNNMixer | S6):
            continue
        weight = next(part.parameters())
        if backends.choose(backends.forced(None), weight, "warmup") != "triton":
            continue
        own = (part.input.weight if isinstance(part, S6) else weight).dtype
        given = dtype or own
        kind = type(part).__name__, _width(part), given, weight.device, *_formulas(part)
        if kind not in done:
            done[kind] = f"{kind[0]}, {kind[1]} wide, {given}, on {weight.device}"
            # Under autocast norms and convolutions give S6 its input in the dtype of the weights.
            for read in dict.fromkeys((given, own) if isinstance(part, S6) else (given,)):
                _run(part, read, given, weight.device, reset, backward)
    return list(done.values())


def _width(part: Gated | MinRNNMixer | S6) -> int:
    return len(part.D) if isinstance(part, S6) else part.hidden_size if isinstance(part, Gated) else part.hidden


def _formulas(part: Gated | MinRNNMixer | S6) -> tuple:
    """What else about a layer decides which kernels it calls."""
    if isinstance(part, S6):
        return (part.A_log.shape[1],)
    return part.activation, getattr(part, "normalize", None), _restarts(part)


def _restarts(part: Gated | MinRNNMixer) -> bool:
    """Whether resets begin at a learned state."""
    return part.learn_initial_state if isinstance(part, Gated) else part.initial is not None


@torch.inference_mode(False)
@torch.enable_grad()
def _run(
    part: Gated | MinRNNMixer | S6,
    read: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    reset: bool,
    backward: bool,
) -> None:
    """The scan of a layer, and its gradients, on zeros: what it reads in `read`, what it makes of that in `dtype`."""
    cuts = torch.zeros(1, _LENGTH, dtype=torch.bool, device=device) if reset else None

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=backward)

    if isinstance(part, S6):
        width, states = part.A_log.shape
        u, delta = zeros(1, _LENGTH, width, dtype=read), zeros(1, _LENGTH, width)
        into, out = (zeros(1, _LENGTH, states) for _ in range(2))
        inputs = [u, delta, into, out]
        outputs = selective_scan(u, delta, -part.A_log.exp(), into, out, part.D, reset=cuts, bias=part.step_bias)
    else:
        blocks = part._blocks if isinstance(part, Gated) else part.blocks
        state = zeros(1, _width(part), dtype=accumulate_dtype(dtype))
        projection = zeros(1, _LENGTH, blocks * _width(part))
        inputs = [projection, state]
        restart = state[0] if _restarts(part) else None
        if isinstance(part, Gated):
            outputs = part._scan(projection, state, cuts, restart, None, False)
        else:
            outputs = part.scan(projection, state, cuts, restart)
    if backward:
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(each) for each in outputs])
