"""A stack of recurrent layers, as nn.RNNBase is one: layers, directions, dropout, layouts, ragged batches, resets."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from minrnn._gated import Gated, States, Weights, map_states
from minrnn._shapes import check_tensor
from minrnn.ops.transforms import out_of_range


class Stack(Gated):
    """What MinGRU and MinLSTM share beyond a recurrence."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device,
        dtype,
        activation: str,
        learn_initial_state: bool,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, activation, learn_initial_state, forget_bias)
        self.num_layers = self._check_size("num_layers", num_layers, 1)
        self._check_type("bias", bias, bool)
        self._check_type("batch_first", batch_first, bool)
        self.proj_size = self._check_size("proj_size", proj_size, 0)
        if self.proj_size >= self.hidden_size:
            raise self._wrong("proj_size", f"smaller than hidden_size = {self.hidden_size}", proj_size)
        self.dropout = float(dropout)
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= self.dropout <= 1:
            raise self._wrong("dropout", "a probability between 0 and 1", repr(dropout))
        if dropout and num_layers == 1:
            warnings.warn(
                f"{self._get_name()}: dropout comes after all but the last layer, so dropout={dropout} does nothing "
                "with num_layers=1",
                stacklevel=3,
            )
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self._suffixes = []
        directions = ("", "_reverse") if bidirectional else ("",)
        for layer in range(self.num_layers):
            width = self.input_size if layer == 0 else len(directions) * (self.proj_size or self.hidden_size)
            for direction in directions:
                self._suffixes.append(f"_l{layer}{direction}")
                self._create_weights(self._suffixes[-1], width, device, dtype)
        self.reset_parameters()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """For each layer and direction a list of its weight_ih, bias_ih and weight_hr, as far as it has them."""
        return [[w for w in self._weights(suffix)[:3] if w is not None] for suffix in self._suffixes]

    def flatten_parameters(self) -> None:
        """Does nothing, as there is no flat buffer; for code that calls it on any RNN."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, States]:
        """`(output, states)` for whole sequences, as the docstring of the class says."""
        weights = [self._weights(suffix) for suffix in self._suffixes]
        if isinstance(input, PackedSequence):
            if lengths is not None or reset is not None:
                raise self._wrong("lengths and reset", "None with a PackedSequence", "one")
            return self._forward_packed(input, hx, weights)
        self._check_input(input, (2, 3), weights[0].weight)
        batched = input.dim() == 3
        batch_first = self.batch_first or not batched  # an unbatched series is a batch of one
        batch, time = (input.shape[:-2], input.shape[-2]) if batch_first else (input.shape[1:2], input.shape[0])
        initial = self._check_states(hx, input, (len(weights), *batch))
        if reset is not None:
            self._check_reset(reset, input)
        if lengths is not None:
            lengths = self._check_lengths(lengths, batch, time).to(input.device)
        if not batched:
            input, initial, reset, lengths = (
                input[None],
                _unsqueeze(initial, 1),
                _unsqueeze(reset, 0),
                _unsqueeze(lengths, 0),
            )
        if lengths is not None:
            steps = torch.arange(time, device=input.device)
            # Laid out as the input is, which `where` would otherwise lay out anew.
            valid = steps < lengths[:, None] if batch_first else steps[:, None] < lengths
            reset = None if reset is None else reset & valid
            # Masked before the projection: 0 * NaN would reach the gradients of the weights.
            input = torch.where(valid[..., None], input, 0)
        if reset is not None and not batch_first:
            reset = reset.transpose(0, 1)
        output, states = self._run(input, initial, lengths, reset, batch_first, weights)
        if not batched:
            return output[0], map_states(lambda state: state[:, 0], states)
        return output, states

    def _forward_packed(self, packed: PackedSequence, hx: States | None, weights: list[Weights]) -> tuple[Any, States]:
        """As a padded batch, in the order in which the sequences are packed."""
        data, batch_sizes, order, restore = packed
        self._check_input(data, (2,), weights[0].weight)
        initial = self._check_states(hx, data, (len(weights), int(batch_sizes[0])))
        if initial is not None and order is not None:
            initial = initial.index_select(1, order)
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, states = self._run(padded, initial, lengths.to(data.device), None, False, weights)
        output = PackedSequence(pack_padded_sequence(output, lengths).data, batch_sizes, order, restore)
        if restore is not None:
            states = map_states(lambda state: state.index_select(1, restore), states)
        return output, states

    def _run(
        self,
        input: Tensor,
        initial: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
        weights: list[Weights],
    ) -> tuple[Tensor, States]:
        """All layers over (B, T, D), or (T, B, D) if not `batch_first`, from states (S, B, H); `reset` is (B, T)."""
        directions = 2 if self.bidirectional else 1
        resets = [reset, reset]
        if self.bidirectional and reset is not None:
            # The reverse scan is cut where a sequence ends: one step before the next begins.
            resets[1] = torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)
        hidden_states: list[Tensor] = []
        carried_states: list[Tensor] = []
        outputs: list[Tensor] = []
        for index, (weight, bias, project, learned) in enumerate(weights):
            reverse = index % directions
            if index and not reverse:
                input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
                input = F.dropout(input, self.dropout, self.training)
                outputs = []
            projection = F.linear(input, weight, bias)
            if not batch_first:
                projection = projection.transpose(0, 1)
            start = None if initial is None else initial[index]
            output, last = self._recur(projection, learned, start, resets[reverse], lengths, bool(reverse))
            if not batch_first:
                output = output.transpose(0, 1)
            carried_states.append(last)
            if project is not None:
                output, last = F.linear(output, project), F.linear(last, project)
            hidden_states.append(last)
            outputs.append(output)
        carried = torch.stack(carried_states)
        hidden = torch.stack(hidden_states) if self.proj_size else carried
        return outputs[0] if directions == 1 else torch.cat(outputs, -1), self._give_states(hidden, carried)

    def _check_reset(self, reset: Tensor, input: Tensor) -> None:
        check_tensor(self._get_name(), "reset", reset)
        if reset.dtype != torch.bool:
            raise TypeError(f"{self._get_name()}: reset must be torch.bool, got {reset.dtype}")
        if reset.shape != input.shape[:-1]:
            raise self._wrong("reset", f"of shape {tuple(input.shape[:-1])}, the input's", tuple(reset.shape))
        if reset.device != input.device:
            raise self._wrong("reset", f"on {input.device} as the input is", f"one on {reset.device}")

    def _check_lengths(self, lengths: Tensor | Sequence[int], batch: tuple[int, ...], time: int) -> Tensor:
        if torch.compiler.is_compiling() and _integers(lengths):  # `as_tensor` would be compiled anew for each list
            lengths = torch.stack([torch.scalar_tensor(each, dtype=torch.int64, device="cpu") for each in lengths])
        if not isinstance(lengths, Tensor):
            try:
                lengths = torch.as_tensor(lengths, device="cpu")  # whatever the default device is
            except (TypeError, ValueError, RuntimeError) as error:
                wanted = "must be a tensor or a sequence of integers"
                raise TypeError(f"{self._get_name()}: lengths {wanted}, got {lengths!r}") from error
        other = lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
        if other and lengths.numel():  # in this order: how many there are may not be known when a graph is made
            raise TypeError(f"{self._get_name()}: lengths must be integers, got {lengths.dtype}")
        if lengths.shape != batch:
            raise self._wrong("lengths", f"of shape {tuple(batch)}", tuple(lengths.shape))
        lengths = lengths.to(torch.int64)
        if out_of_range(lengths, time):
            raise self._wrong("lengths", f"between 0 and T = {time}", lengths.tolist())
        return lengths


def _integers(lengths: Tensor | Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Whether it is a sequence, not an empty one, of nothing but Python's integers."""
    if not isinstance(lengths, list | tuple):
        return False
    return len(lengths) > 0 and all(isinstance(each, int) and not isinstance(each, bool) for each in lengths)


def _unsqueeze(tensor: Tensor | None, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)
