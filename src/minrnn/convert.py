"""Weights of other packages' minGRUs, brought into `MinGRU`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minrnn.layers import MinGRU

# Which blocks of H rows a projection has, by the names that its layer gives it.
_LAYOUTS = {
    "to_hidden_and_gate": ("candidate", "gate"),  # lucidrains/minGRU-pytorch
    "gate_hidden_layers": ("gate", "candidate"),  # cheind/mingru
    "layers": ("candidate", "gate", "highway"),  # PufferLib
}


def convert_mingru(weights: Mapping[str, Tensor]) -> list[tuple[MinGRU, dict[str, Tensor]]]:
    """The minGRU layers of another package's state_dict, and what of it belongs to no minGRU.

    Known are a `minGRU` of lucidrains/minGRU-pytorch, a `MinGRU` of cheind/mingru and a `MinGRU` of PufferLib, told by
    the names of their weights. All three have z write, z_t = sigmoid(gate), as `MinGRU` does, and its activation "g":
    only the order of rows and the state at the beginning (cheind's is g(0) = 1/2, the others' 0) differ.

    Args:
        weights: the state_dict of one such module; of a larger model, that of its part: `model.rnn.state_dict()`.

    Returns:
        For each layer, first to last, a `MinGRU` of one layer, `batch_first`; and what surrounds it there:
        "output" (D, H), of lucidrains: y = h output^T;
        "highway" (H, H), of PufferLib: y = s h + (1 - s) x with s = sigmoid(x highway^T);
        "align.weight" and "align.bias", of cheind with `residual`, where the widths differ: y = h + align(x), and
        without it, but with `residual`, y = h + x.

    Raises:
        ValueError: the names or shapes are those of none of the three.
        TypeError: the weights are not floating, or no state_dict.

    Source: the definitions of the three packages.

    Example:
        >>> ((rnn, rest),) = convert_mingru({"to_hidden_and_gate.weight": torch.randn(2 * 20, 10)})
        >>> output, h_n = rnn(torch.randn(3, 5, 10))
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"convert_mingru: weights must be a state_dict, got {type(weights).__name__}")
    for name, blocks in _LAYOUTS.items():
        keys = sorted((key for key in weights if key.split(".")[0] == name and key.endswith("weight")), key=_depth)
        if keys:
            known = {around for key in keys for around in (key, _bias(key), *_around(key))}
            if strange := sorted(weights.keys() - known):
                raise ValueError(f"convert_mingru: weights must be those of one minGRU, got {', '.join(strange)} too")
            return [_layer(weights, key, blocks) for key in keys]
    raise ValueError(
        f"convert_mingru: weights must be those of one minGRU, with names that begin with {', '.join(_LAYOUTS)}, got "
        f"{', '.join(weights)}"
    )


def _bias(key: str) -> str:
    return key.removesuffix("weight") + "bias"


def _around(key: str) -> dict[str, str]:
    """What stands around the layer of this key, by the names there: the names here."""
    align = {f"align_layers.{_depth(key)}.{part}": f"align.{part}" for part in ("weight", "bias")}
    return {"to_out.weight": "output", **align}


def _depth(key: str) -> int:
    number = key.split(".")[1]
    return int(number) if number.isdigit() else 0


def _layer(weights: Mapping[str, Tensor], key: str, blocks: tuple[str, ...]) -> tuple[MinGRU, dict[str, Tensor]]:
    weight, bias = weights[key], weights.get(_bias(key))
    inputs = "H" if "highway" in blocks else "D"  # the highway is as wide as what it passes by
    if weight.dim() != 2 or len(weight) % len(blocks) or (inputs == "H" and len(weight) != 3 * weight.shape[1]):
        raise ValueError(
            f"convert_mingru: {key} must be ({len(blocks)}H, {inputs}) for {', '.join(blocks)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"convert_mingru: {_bias(key)} must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"convert_mingru: {key} must be floating, got {weight.dtype}")
    rows = dict(zip(blocks, weight.detach().chunk(len(blocks)), strict=True))
    rest = {"highway": rows["highway"].clone()} if "highway" in rows else {}
    starts_at_half = key.startswith("gate_hidden_layers")
    rnn = MinGRU(
        weight.shape[1],
        len(rows["gate"]),
        bias=bias is not None,
        batch_first=True,
        learn_initial_state=starts_at_half,
        device=weight.device,
        dtype=weight.dtype,
    )
    values = {"weight_ih_l0": torch.cat([rows["gate"], rows["candidate"]])}
    if bias is not None:
        parts = dict(zip(blocks, bias.detach().chunk(len(blocks)), strict=True))
        values["bias_ih_l0"] = torch.cat([parts["gate"], parts["candidate"]])
    if starts_at_half:
        values["initial_l0"] = torch.zeros(len(rows["gate"]), device=weight.device, dtype=weight.dtype)
    rnn.load_state_dict(values)
    around = _around(key)
    rest |= {around[name]: tensor.detach().clone() for name, tensor in weights.items() if name in around}
    output = rest.get("output")
    if output is not None and (output.dim() != 2 or output.shape[1] != rnn.hidden_size):
        raise ValueError(f"convert_mingru: to_out.weight must be (D, {rnn.hidden_size}), got {tuple(output.shape)}")
    return rnn, rest
