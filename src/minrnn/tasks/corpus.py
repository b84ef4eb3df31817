"""Where text comes from: Python's own manual, a verified download, or a UTF-8 file."""

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class Download:
    """A public text: where it lies, under which name it is kept, and the SHA-256 that it must have."""

    url: str
    name: str
    sha256: str


DOWNLOADS = {
    "shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}


def locate(data: str) -> str:
    """A name of the same text that holds in any working directory."""
    return data if data == "pydoc" or data in DOWNLOADS else os.path.abspath(data)


def read_corpus(data: str) -> str:
    """The text that `data` names.

    Args:
        data: `pydoc`, the language reference that every Python carries for its `help()` (460,000 characters; they
            differ between Python versions); `shakespeare`, Tiny Shakespeare, downloaded once and verified; or the
            path of a UTF-8 file.

    Raises:
        ValueError: no such file, not UTF-8, empty, or a download that failed or has other contents than it must.
    """
    if data == "pydoc":
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        return "\n".join(topics[name] for name in sorted(topics))
    path = download(DOWNLOADS[data]) if data in DOWNLOADS else Path(data)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} must be UTF-8 text, got {error.reason} at byte {error.start}") from None
    except FileNotFoundError:
        names = ", ".join(["pydoc", *DOWNLOADS])
        raise ValueError(f"data: must be an existing file or one of {names}, got {data!r}: no such file") from None
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
    if not text:
        raise ValueError(f"data: {path} must hold text, got an empty file")
    return text


def download(source: Download) -> Path:
    """Fetch `source` into the user's cache, unless it lies there already, and check its SHA-256 either way."""
    import pooch

    try:
        path = pooch.retrieve(source.url, f"sha256:{source.sha256}", source.name, pooch.os_cache("minrnn"))
    except OSError as error:  # what `requests` raises, and a full or read-only disk
        raise ValueError(f"data: cannot download {source.url}: {error}; --data FILE takes a local copy") from None
    except ValueError:
        raise ValueError(f"data: {source.url} must have SHA-256 {source.sha256}, got another text") from None
    return Path(path)
