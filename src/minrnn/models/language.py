"""The language model, and what its optimiser has to know.

B batch, T time, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minrnn._gated import Gated
from minrnn._shapes import check_tensor, shape_error
from minrnn.mixers import Mixer, Tuning
from minrnn.mixers.headwise import HeadwiseLinear
from minrnn.models.base import SequenceModel
from minrnn.models.block import Backbone
from minrnn.models.config import LanguageModelConfig


class LanguageModel(SequenceModel):
    """logits = W backbone(embedding(tokens)): for each token those of the next one.

    Args:
        config: vocabulary and backbone.

    Raises:
        TypeError: config is none.

    Example:
        >>> model = LanguageModel(LanguageModelConfig(vocabulary=65, backbone=BackboneConfig(width=128, layers=3)))
        >>> logits, state = model(torch.randint(65, (4, 100)))
        >>> logits, state = model(torch.randint(65, (4, 1)), state)
    """

    config_class = LanguageModelConfig

    def __init__(self, config: LanguageModelConfig) -> None:
        if not isinstance(config, LanguageModelConfig):
            raise TypeError(f"LanguageModel: config must be a LanguageModelConfig, got {type(config).__name__}")
        super().__init__(config)
        width = config.backbone.width
        self.embedding = nn.Embedding(config.vocabulary, width)
        # Measured: text is learned faster from 0.2 to 0.5 than from 1, nn.Embedding's, or 0.02, GPT's.
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.backbone = Backbone(config.backbone)
        self.head = nn.Linear(width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read tokens, all of a text, a chunk of it or one.

        Args:
            tokens: int64 or int32 (B, T).
            state: what an earlier call gave for the tokens before; None at the beginning of a text.
            reset: bool (B, T). Where true, a new text begins with this token.

        Returns:
            logits, (B, T, V), and the state after the last token.

        Raises:
            TypeError: tokens is not an integer tensor, reset not a bool tensor.
            ValueError: shapes do not agree.
            IndexError: a token is not in the vocabulary.
        """
        check_tensor("LanguageModel", "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"LanguageModel: tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise shape_error("LanguageModel", "tokens", "(B, T)", "two dimensions", tuple(tokens.shape))
        hidden, state = self.backbone(self.embedding(tokens), state, reset=reset)
        return self.head(hidden), state

    def initial_state(self, batch_size: int) -> Any:
        """The state at the beginning of `batch_size` texts."""
        return self.backbone.initial_state(batch_size)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """What each parameter of any module asks of the optimiser: the matrices of linear maps, attention and RNNs decay,
    nothing else does; and what mixers say of theirs in `Mixer.tuning`.

    (Not biases, norms, embeddings, convolutions, initial states: there zero is no simpler than another value. Nor what
    a parametrization makes a matrix of.)

    Args:
        model: whose parameters.
        lr: learning rate of those that ask for no other.
        weight_decay: of those that decay.

    Returns:
        Groups as torch.optim takes them.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    """
    matrices = {id(part.weight) for part in model.modules() if isinstance(part, (nn.Linear, HeadwiseLinear))}
    matrices |= {
        id(parameter)
        for part in model.modules()
        if isinstance(part, (nn.RNNBase, nn.RNNCellBase, Gated, nn.MultiheadAttention))
        for name, parameter in part.named_parameters(recurse=False)
        if "weight" in name
    }
    asked = {
        id(parameter): tuning
        for mixer in model.modules()
        if isinstance(mixer, Mixer)
        for parameter, tuning in mixer.tuned().items()
    }
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        tuning = asked.get(id(parameter), Tuning())
        decays = tuning.decay and id(parameter) in matrices
        groups.setdefault((tuning.lr_scale, tuning.lr_limit, decays), []).append(parameter)
    return [
        {"params": each, "lr": min(lr * scale, limit), "weight_decay": weight_decay if decays else 0.0}
        for (scale, limit, decays), each in groups.items()
    ]
