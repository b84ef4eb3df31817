"""Weights of other packages' minGRUs, brought into `MinGRU`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from minrnn.layers import MinGRU

_CHEIND = ("gate", "candidate")
# Which blocks of H rows a projection has, by what its layer is called; {} is the number of a layer.
_LAYOUTS = {
    "to_hidden_and_gate": ("candidate", "gate"),  # lucidrains/minGRU-pytorch
    "to_gate_hidden": _CHEIND,  # cheind/mingru's cell
    "layers.{}.gate_hidden": _CHEIND,  # and its layers
    "layers.{}": ("candidate", "gate", "highway"),  # PufferLib
}
# What stands around a projection, by its name there: the name here.
_AROUND = {
    "to_hidden_and_gate": {"to_out.weight": "output"},
    "layers.{}.gate_hidden": {
        "layers.{}.res_align.weight": "align",
        "layers.{}.norm.weight": "norm.weight",
        "layers.{}.norm.bias": "norm.bias",
    },
}


def convert_mingru(weights: Mapping[str, Tensor]) -> list[tuple[MinGRU, dict[str, Tensor]]]:
    """The minGRU layers of another package's state_dict, and what of it belongs to no minGRU.

    Known are a `minGRU` of lucidrains/minGRU-pytorch, a `MinGRU` or `MinGRUCell` of cheind/mingru and a `MinGRU` of
    PufferLib, told by the names of their weights. All three have z write, z_t = sigmoid(gate), as `MinGRU` does, and
    its activation "g": only the order of rows and the state at the beginning (cheind's is g(0) = 1/2, the others' 0)
    differ.

    Args:
        weights: the state_dict of one such module; of a larger model, that of its part: `model.rnn.state_dict()`.

    Returns:
        For each layer, first to last, a `MinGRU` of one layer, `batch_first`; and what surrounds it there:
        "output" (D, H), of lucidrains: y = h output^T;
        "highway" (H, H), of PufferLib: y = s h + (1 - s) x with s = sigmoid(x highway^T);
        "norm.weight" and "norm.bias" (D), of cheind with `norm`: the minGRU reads LayerNorm(x);
        "align" (H, D), of cheind with `residual`, where the widths differ: y = h + x align^T, and without it, but with
        `residual`, y = h + x.

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
    if other := [key for key, x in weights.items() if not (isinstance(key, str) and isinstance(x, Tensor))]:
        raise TypeError(f"convert_mingru: weights must be tensors by their names, got {other[0]!r}")
    for layout, blocks in _LAYOUTS.items():
        pattern = re.compile(layout.replace(".", r"\.").replace("{}", r"(\d+)") + r"\.weight")
        numbers = sorted((found[1] if pattern.groups else "" for key in weights if (found := pattern.fullmatch(key))),
                         key=lambda number: int(number or 0))  # fmt: skip
        if numbers:
            keys = [layout.format(number) for number in numbers]
            around = [{name.format(number): own for name, own in _AROUND.get(layout, {}).items()} for number in numbers]
            known = {name for key, its in zip(keys, around, strict=True) for name in (*_both(key), *its)}
            if strange := sorted(weights.keys() - known):
                raise ValueError(f"convert_mingru: weights must be those of one minGRU, got {', '.join(strange)} too")
            if pattern.groups and numbers != [str(number) for number in range(len(numbers))]:
                raise ValueError(f"convert_mingru: weights must be those of all layers from 0, got {', '.join(keys)}")
            layers = [_layer(weights, key, blocks, its) for key, its in zip(keys, around, strict=True)]
            for key, (below, _), (above, _) in zip(keys[1:], layers, layers[1:], strict=False):
                if above.input_size != below.hidden_size:
                    raise ValueError(
                        f"convert_mingru: {key}.weight must read the {below.hidden_size} channels of the layer before, "
                        f"got {above.input_size}"
                    )
            return layers
    raise ValueError(
        f"convert_mingru: weights must be those of one minGRU, with names such as {', '.join(_LAYOUTS)}, got "
        f"{', '.join(weights)}"
    )


def _both(key: str) -> tuple[str, str]:
    return f"{key}.weight", f"{key}.bias"


def _layer(
    weights: Mapping[str, Tensor], key: str, blocks: tuple[str, ...], around: Mapping[str, str]
) -> tuple[MinGRU, dict[str, Tensor]]:
    """The layer whose projection is called `key`; `around` is what may stand around it, by its name there."""
    weight, bias = (weights.get(name) for name in _both(key))
    assert weight is not None, "which is how the layout was told"
    inputs = "H" if "highway" in blocks else "D"  # the highway is as wide as what it passes by
    if weight.dim() != 2 or len(weight) % len(blocks) or (inputs == "H" and len(weight) != 3 * weight.shape[1]):
        raise ValueError(
            f"convert_mingru: {key}.weight must be ({len(blocks)}H, {inputs}) for {', '.join(blocks)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"convert_mingru: {key}.bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"convert_mingru: {key}.weight must be floating, got {weight.dtype}")
    rows = dict(zip(blocks, weight.detach().chunk(len(blocks)), strict=True))
    starts_at_half = blocks == _CHEIND
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
    D, H = rnn.input_size, rnn.hidden_size
    rest = {"highway": rows["highway"].clone()} if "highway" in rows else {}
    for name, own in around.items():
        if name in weights:
            wanted = {"output": (D, H), "align": (H, D)}.get(own, (D,))
            if weights[name].shape != wanted:
                raise ValueError(f"convert_mingru: {name} must be {wanted}, got {tuple(weights[name].shape)}")
            rest[own] = weights[name].detach().clone()
    return rnn, rest
