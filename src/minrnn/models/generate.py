"""Text from a language model: the prompt in one pass, then one token at a time, carrying the state on."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minrnn.models.language import LanguageModel


def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue a text, token by token, each given out as soon as it is drawn.

    Args:
        model: in eval mode.
        prompt_tokens: at least one.
        max_new_tokens: how many to draw.
        temperature: divides the logits; 0, or what float32 cannot divide by, takes the likeliest token always.
        top_k: draw only among the k likeliest.
        top_p: draw only among the likeliest that together have at least this probability, of those that `top_k` leaves.
        generator: of the random numbers, on the model's device.

    Raises:
        TypeError: a token, `max_new_tokens` or `top_k` is not a whole number.
        ValueError: an argument is out of its range, or the model is in training mode; at the call, not the first token.
    """
    vocabulary, prompt = model.config.vocabulary, list(prompt_tokens)
    for name, numbers in (("prompt_tokens", prompt), ("max_new_tokens", [max_new_tokens]), ("top_k", [top_k or 0])):
        for number in numbers:
            if not hasattr(number, "__index__"):
                raise TypeError(f"generate: {name} must be of whole numbers, got {number!r}")
    if not prompt:
        raise ValueError("generate: prompt_tokens must be at least one token, got none")
    for token in prompt:
        if not 0 <= token < vocabulary:
            raise ValueError(f"generate: prompt_tokens must be in [0, {vocabulary}), got {token}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if model.training:
        raise ValueError("generate: model must be in eval mode, got one in training mode; call model.eval()")
    return _draw(model, prompt, max_new_tokens, temperature, top_k, top_p, generator)


@torch.inference_mode()
def _draw(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Iterator[int]:
    tokens, state = torch.tensor([prompt], device=model.head.weight.device), None
    for _ in range(max_new_tokens):
        logits, state = model(tokens, state)
        tokens = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        yield int(tokens)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of logits (B, V): (B, 1)."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1, keepdim=True)
    probability = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None and top_p is None:
        return torch.multinomial(probability, 1, generator=generator)
    # Sorted, so that neither a tie at the k-th place nor rounding lets in more than was asked for.
    probability, token = torch.sort(probability, dim=-1, descending=True, stable=True)
    if top_k is not None:
        probability[:, top_k:] = 0
    if top_p is not None:
        share = probability / probability.sum(-1, keepdim=True)
        probability[:, 1:][(share.cumsum(-1) - share >= top_p)[:, 1:]] = 0  # the first stays, however small top_p is
    return token.gather(-1, torch.multinomial(probability, 1, generator=generator))
