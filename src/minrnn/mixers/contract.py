"""What every mixer is: a map of (B, T, D) to (B, T, D) along time, whole, in chunks or in steps, with a carried state.

B batch, T time, D model width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map_only

from minrnn._shapes import accumulate_dtype, castable, check_device, check_reset, check_shape, check_tensor, shape_error


class Place(NamedTuple):
    """Where in its stack a mixer stands, for those that begin differently at different depths.

    Args:
        layer: from 0.
        layers: how many the stack has.
    """

    layer: int = 0
    layers: int = 1


ALONE = Place()


class Tuning(NamedTuple):
    """What a parameter asks of who trains or casts it.

    Args:
        lr_scale: its learning rate in learning rates of the model,
        lr_limit: and at most this.
        decay: whether it may decay; only the matrices of linear maps ever do.
        keep_float32: whether it stays in float32 when its module is cast to a 16-bit type.
    """

    lr_scale: float = 1.0
    lr_limit: float = math.inf
    decay: bool = True
    keep_float32: bool = False


class Mixer(nn.Module, ABC):
    """`y, state = mixer(x, state=None, *, reset=None)`, always these two, for a whole sequence, a chunk or one step.

    A state is opaque to its holder: it is got from `initial_state` or from a call, and given to the next call. It is a
    tree of tensors for `torch.utils._pytree`, whose first dimension is the batch; `torch.load` needs weights_only=False
    for one that was saved. Its recurrent parts are float32 where the model is 16-bit. There are no `lengths`: padding
    on the right would be read, and be in the state. Begin sequences anew by `reset`, not by a product with zeros: some
    states hold -inf. A mixer made on "meta" gets its weights from the `state_dict` of one that was not.
    """

    def tuning(self) -> Mapping[str, Tuning]:
        """What parameters of this mixer ask for, by their names in it; those that are not there ask for nothing.

        Here: what its parts ask for that have a `tuning` of their own.
        """
        parts: dict[str, Any] = {name: part for name, part in self.named_children() if hasattr(part, "tuning")}
        return {f"{name}.{key}": asks for name, part in parts.items() for key, asks in part.tuning().items()}

    def tuned(self) -> dict[nn.Parameter, Tuning]:
        """The parameters that ask for something, with what they ask for: of one with a parametrization, what it is made
        from."""
        found: dict[nn.Parameter, Tuning] = {}
        for name, asks in self.tuning().items():
            place, _, own = name.rpartition(".")
            part = self.get_submodule(place)
            if is_parametrized(part, own):
                made_from = cast(nn.ModuleDict, part.parametrizations)[own]
                found |= dict.fromkeys(made_from.parameters(recurse=False), asks)
            elif isinstance(parameter := getattr(part, own), nn.Parameter):
                found[parameter] = asks
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mixer":
        parameters = [parameter for parameter, asks in self.tuned().items() if asks.keep_float32]
        kept = {id(tensor) for each in parameters for tensor in (each, each.grad)}

        def keeping(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if id(tensor) in kept and new.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(new.device, torch.float32)
            return new

        return super()._apply(keeping, recurse)

    @abstractmethod
    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix along time.

        Args:
            x: (B, T, D).
            state: what an earlier call gave for the steps before x; None at the beginning of a sequence.
            reset: bool (B, T). Where true, step t begins a new sequence: nothing from t on depends on a step before it.

        Returns:
            y, (B, T, D), y_t a function of x_0 ... x_t and the state; and the state after the last step.

        Raises:
            TypeError: an argument is not a tensor, or reset is not bool.
            ValueError: shapes do not agree.
        """

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` sequences. (Of a mixer that is sharded by FSDP2, take None.)"""

    @property
    @abstractmethod
    def state_size(self) -> int | None:
        """Numbers in the state of one sequence; None where they grow with its length."""


def check_series(caller: str, x: Tensor, width: int, reset: Tensor | None, like: Tensor, *, wide: bool = False) -> None:
    """Raise TypeError or ValueError unless x is (B, T, width) and `reset`, if given, bool (B, T).

    Args:
        caller: the mixer.
        x: what its caller gave.
        width: D.
        reset: what its caller gave.
        like: a weight; x must have its dtype, or under autocast any floating one but float64.
        wide: the weights of a 16-bit model are float32 here.
    """
    check_tensor(caller, "x", x)
    if x.dim() != 3 or x.shape[2] != width:
        raise shape_error(caller, "x", "(B, T, D)", f"three dimensions, the last {width}", tuple(x.shape))
    dtype = accumulate_dtype(x.dtype) if wide else x.dtype
    if dtype != like.dtype and not castable(x, like):
        raise ValueError(f"{caller}: x must be {like.dtype} as the weights are, got {x.dtype}")
    check_device(caller, like, "the weights are", x=x)
    check_reset(caller, reset, x)


def check_state_tensor(
    caller: str, name: str, tensor: Tensor, like: Tensor, letters: str, shape: tuple[int, ...], dtype: Any = None
) -> None:
    """Raise TypeError or ValueError unless `tensor` is what a state holds under this name.

    Args:
        caller: the mixer.
        name: of the tensor, for people.
        tensor: what the caller gave.
        like: a weight, whose dtype says in what states are kept; 16-bit parts of a 16-bit model's state are right, too.
        letters: of its shape.
        shape: that it must have.
        dtype: that it must have, if not a floating one.
    """
    check_tensor(caller, name, tensor)
    check_shape(caller, name, tensor, letters, shape)
    wanted = dtype or accumulate_dtype(like.dtype)
    if accumulate_dtype(tensor.dtype) != wanted:
        raise ValueError(f"{caller}: {name} must be {wanted}, got {tensor.dtype}")
    check_device(caller, like, "the weights are", **{name: tensor})


def check_state(caller: str, state: object, kind: type, like: Tensor | None = None, **fields: tuple) -> None:
    """Raise TypeError or ValueError unless `state` is of the class `kind` and these fields of it are right.

    Args:
        caller: the mixer.
        state: what its caller gave.
        kind: of the states of this mixer.
        like: a weight; see `check_state_tensor`.
        fields: by the names of tensors in it, their letters, their shape and, if not a floating one, their dtype.
    """
    if not isinstance(state, kind):
        raise ValueError(
            f"{caller}: state must be of type {kind.__name__}, as calls give it, got {type(state).__name__}"
        )
    for name, wanted in fields.items():
        assert like is not None, "tensors of a state are compared with a weight"
        check_state_tensor(caller, f"state.{name}", getattr(state, name), like, *wanted)


def plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is what its weights say, so that they may be read and it need not be called: no adapter with a
    forward of its own, no hook, such as pruning's. (A parametrization acts on reading.)"""
    own = type(layer).forward is kind.forward and "forward" not in vars(layer)
    return own and not (layer._forward_pre_hooks or layer._forward_hooks)


def scaled(width: int, factor: float) -> float:
    """`factor` times `width`, whole where it would be but for rounding: 2.3 times 50 is 115, and not a little less."""
    return round(width * factor, 6)


def detach_state(state: Any) -> Any:
    """A state without the graph that led to it: what truncated backpropagation through time hands to the next chunk.

    Args:
        state: of a layer, a mixer or a model, any tree of tensors.

    Returns:
        The same tree, its tensors detached; they share their memory with those of `state`.

    Example:
        >>> rnn, h = MinGRU(4, 8), None
        >>> for chunk in torch.randn(100, 2, 4).split(10):
        ...     output, h = rnn(chunk, h)
        ...     output.sum().backward()
        ...     h = detach_state(h)
    """
    return tree_map_only(Tensor, Tensor.detach, state)
