"""Text to token ids and back. Every tokenisation is a `tokenizers.Tokenizer`, so that a run keeps one kind of file."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# The tokenizers library keeps about 100 bytes beside each token, so text goes in by pieces, and a group of them at once
# for its threads. Characters and bytes do not notice; a subword tokenizer sees one additional boundary in each piece.
_PIECE, _GROUP = 1 << 16, 64


def make_tokenizer(tokens: str, text: str) -> Tokenizer:
    """The tokenizer that `tokens` names.

    Args:
        tokens: `chars`, the characters of `text`; `bytes`, the 256 bytes of UTF-8; or the path of a JSON file of the
            `tokenizers` library.
        text: the whole corpus.

    Raises:
        ValueError: no such file, or not a tokenizer.
    """
    if tokens == "chars":
        tokenizer = Tokenizer(models.WordLevel({char: index for index, char in enumerate(sorted(set(text)))}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer
    if tokens == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    if not Path(tokens).exists():
        raise ValueError(f"tokens: must be chars, bytes or an existing tokenizers file, got {tokens!r}")
    return load_tokenizer(Path(tokens))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer's JSON file; ValueError where there is none."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"tokenizer: {path} must be there, got no such file") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"tokens: {path} must be a JSON file of the tokenizers library, got {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The token ids of `text`, int32; ValueError if it has characters that the tokenizer does not know."""
    pieces, ids = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)], [np.empty(0, np.int32)]
    try:
        for start in range(0, len(pieces), _GROUP):
            group = tokenizer.encode_batch_fast(pieces[start : start + _GROUP], add_special_tokens=False)
            ids += [np.array(each.ids, np.int32) for each in group]
    except Exception as error:  # the tokenizers library raises bare Exception
        known = tokenizer.get_vocab()
        unseen = "".join(sorted(set(text) - known.keys()))
        if unseen and all(len(token) == 1 for token in known):
            raise ValueError(f"text must have only characters that the model has seen, got {unseen[:20]!r}") from None
        raise ValueError(f"text must have only tokens that the model has seen, got: {error}") from None
    return np.concatenate(ids)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], prompt: Iterable[int] = ()) -> Iterator[str]:
    """Text as its tokens come; a character that takes several tokens is given out with its last one.

    Args:
        tokenizer: of the tokens.
        ids: the tokens.
        prompt: those before them, by which some tokenizers decide whether a space comes first.
    """
    if isinstance(tokenizer.decoder, decoders.Fuse):  # tokens are text as they are; U+FFFD may be one
        yield from filter(None, map(tokenizer.id_to_token, ids))
        return
    stream = decoders.DecodeStream(skip_special_tokens=False)
    for index in prompt:
        stream.step(tokenizer, index)
    for index in ids:
        text = stream.step(tokenizer, index)
        if text:
            yield text


def default_prompt(tokenizer: Tokenizer) -> list[int]:
    """A line break, or token 0 where the tokenizer knows none."""
    try:
        return encode(tokenizer, "\n").tolist() or [0]
    except ValueError:
        return [0]
