"""replace_rnn: the one-line swap of PyTorch's gated RNNs for the minimal ones."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

_CELL = ("input_size", "hidden_size", "bias")
_STACK = (*_CELL, "num_layers", "batch_first", "dropout", "bidirectional")
_SWAPS: dict[type[nn.Module], tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    nn.GRU: (MinGRU, _STACK),
    nn.LSTM: (MinLSTM, (*_STACK, "proj_size")),
    nn.GRUCell: (MinGRUCell, _CELL),
    nn.LSTMCell: (MinLSTMCell, _CELL),
}


def replace_rnn(model: nn.Module) -> nn.Module:
    """Swap every nn.GRU, nn.LSTM, nn.GRUCell and nn.LSTMCell in `model` for its minimal counterpart, in place.

    Each replacement has the same settings, device, dtype, training mode and, parameter by parameter, requires_grad; its
    weights are fresh, so create the optimiser, DistributedDataParallel and the like afterwards. A module that is used
    in several places stays one module; two modules that share a parameter have one each afterwards.
    Subclasses are left as they are and named in a warning: what they change cannot be known here. So are attributes
    that are lists, tuples, sets or dicts and still hold what was replaced. Hooks on a replaced module are lost. Code
    that asks for `isinstance(rnn, nn.LSTM)` or `rnn.mode` must ask for `MinLSTM`: the new ones are no subclasses.

    Args:
        model: any module, on any device, "meta" included.

    Returns: `model`, or its replacement if it is such a module itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: torch.compile, DistributedDataParallel or FSDP was given one of these modules, and would go on with
            the old one (compiled modules around them are no hindrance); or the weights of one are no parameters.

    Example:
        >>> model = replace_rnn(nn.Sequential(nn.Embedding(100, 16), nn.GRU(16, 32)))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_rnn: model must be a torch.nn.Module, got {type(model).__name__}")
    places = list(model.named_modules(remove_duplicate=False))
    parallel = tuple(f".{path}." if path else "." for path, module in places if _shares_gradients(module))
    taken = [
        path or "the model itself"
        for path, module in places
        if (type(module) in _SWAPS and (f".{path}.".startswith(parallel) or _is_taken(path, module)))
        # fully_shard makes a subclass of what it is given.
        or (_shares_gradients(module) and any(base in _SWAPS for base in type(module).__bases__))
    ]
    if taken:
        raise ValueError(
            "replace_rnn: model must have no RNN that torch.compile, DistributedDataParallel or FSDP was called with, "
            f"or that has no parameters, got {', '.join(taken)}: replace it first"
        )
    # All are made before the first is swapped: where one cannot be, the model stays as it was.
    swapped = {module: _counterpart(module) for module in model.modules() if type(module) in _SWAPS}
    if model in swapped:
        return swapped[model]
    for path, module in places:
        if module in swapped:
            model.set_submodule(path, swapped[module])
    left = [
        f"{path or 'the model itself'} ({type(module).__qualname__})"
        for path, module in places
        if isinstance(module, tuple(_SWAPS)) and module not in swapped
    ]
    if left:
        warnings.warn(f"replace_rnn: left as they are, being subclasses: {', '.join(left)}", stacklevel=2)
    held = [f"{path}.{name}".lstrip(".") for path, module in places for name in _holding(module, swapped)]
    if held:
        warnings.warn(f"replace_rnn: what was replaced is still in {', '.join(dict.fromkeys(held))}", stacklevel=2)
    return model


def _is_taken(path: str, module: nn.Module) -> bool:
    """Whether this RNN is one that torch.compile or FSDP works on."""
    flat = next(module.parameters(), None) is None  # its weights are parts of a parameter elsewhere
    return flat or f".{path}".endswith("._orig_mod") or module._compiled_call_impl is not None


def _shares_gradients(module: nn.Module) -> bool:
    """Whether it does so between processes, for the parameters that were below it when it was made."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; where nobody has, nothing is of it
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return isinstance(module, (nn.parallel.DistributedDataParallel, *kinds))


def _holding(module: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> Iterator[str]:
    """The attributes of a module, but for its submodules, that hold a module which has been replaced."""
    for name, value in vars(module).items():
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        if name != "_modules" and any(isinstance(each, nn.Module) and each in swapped for each in members):
            yield name


def _counterpart(module: nn.Module) -> nn.Module:
    create, settings = _SWAPS[type(module)]
    weight = next(module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of dropout that acts nowhere, as `module` has told itself
        new = create(**{name: getattr(module, name) for name in settings}, device=weight.device, dtype=weight.dtype)
    known = dict(module.named_parameters())
    for name, parameter in new.named_parameters():
        # What is no parameter there is computed from some, as by weight_norm: nobody has frozen it.
        parameter.requires_grad_(name not in known or known[name].requires_grad)
    return new.train(module.training)
