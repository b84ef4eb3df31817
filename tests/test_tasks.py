"""The text task: its corpora, its tokenisations, its batches, and its metric against a sum written out."""

import hashlib
import http.server
import math
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minrnn.tasks import TextConfig, TextTask, corpus, vocabulary
from minrnn.tasks.corpus import Download, read_corpus
from minrnn.tasks.text import score
from minrnn.tasks.vocabulary import decode_stream, encode, make_tokenizer

TEXT = "The quick brown fox — naïve, 12 €.\r\n\tJumps over the lazy dog 🦊.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


@pytest.mark.parametrize("tokens", ["chars", "bytes", "subwords"])
def test_every_tokenisation_gives_the_text_back(tokens, tmp_path):
    if tokens == "subwords":
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = make_tokenizer("bytes", "").decoder
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
        trained.enable_truncation(5)
        trained.save(str(tmp_path / "bpe.json"))
        tokens = str(tmp_path / "bpe.json")
    tokenizer = make_tokenizer(tokens, TEXT)
    ids = encode(tokenizer, TEXT)
    assert ids.dtype == np.int32
    assert len(ids) == {"chars": len(TEXT), "bytes": len(TEXT.encode())}.get(tokens, len(ids))
    assert "".join(decode_stream(tokenizer, ids.tolist())) == TEXT
    assert tokenizer.get_vocab_size() == {"chars": len(set(TEXT)), "bytes": 256}.get(tokens, 300)


def test_what_follows_a_prompt_keeps_its_space():
    """Tokenizers that write a word's space into its token drop that of the first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = "the cat sat on the mat"
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=60))
    ids = encode(tokenizer, text).tolist()
    for cut in range(len(ids)):
        begin = tokenizer.decode(ids[:cut])
        assert begin + "".join(decode_stream(tokenizer, ids[cut:], ids[:cut])) == text


def test_a_replacement_character_is_a_character():
    """U+FFFD, which stands for half a character where tokens are bytes."""
    tokenizer = make_tokenizer("chars", "ab\ufffd")
    ids = encode(tokenizer, "a\ufffdb\ufffd").tolist()
    for cut in range(len(ids)):
        assert "".join(decode_stream(tokenizer, ids[cut:], ids[:cut])) == "a\ufffdb\ufffd"[cut:]


def test_numbers_that_a_tokenizer_leaves_out_have_room(tmp_path, text_file):
    tokenizer = make_tokenizer("chars", TEXT)
    spread = Tokenizer(models.WordLevel({char: 3 * index for char, index in tokenizer.get_vocab().items()}))
    spread.pre_tokenizer, spread.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    spread.save(str(tmp_path / "spread.json"))
    task = TextTask(TextConfig(text_file, tokens=str(tmp_path / "spread.json"), length=8))
    assert task.vocabulary == 3 * len(set(TEXT)) - 2 == 1 + max(task.train.max(), task.held_out.max())


def test_long_texts_are_encoded_piece_by_piece_without_a_trace():
    text = TEXT * 60
    assert len(text) > 1 << 16
    tokenizer = make_tokenizer("chars", text)
    chars = sorted(set(text))
    assert encode(tokenizer, text).tolist() == [chars.index(char) for char in text]
    assert encode(tokenizer, "").shape == (0,)


def test_pieces_are_encoded_in_groups(monkeypatch):
    class Counting:
        sizes, tokenizer = [], make_tokenizer("chars", "ab")

        def encode_batch_fast(self, pieces, **options):
            self.sizes.append(len(pieces))
            return self.tokenizer.encode_batch_fast(pieces, **options)

    monkeypatch.setattr(vocabulary, "_PIECE", 2)
    assert encode(Counting(), "ab" * 65).tolist() == [0, 1] * 65
    assert Counting.sizes == [64, 1]


def test_a_character_never_seen_is_named():
    tokenizer = make_tokenizer("chars", "abc")
    with pytest.raises(ValueError, match="text must have only characters that the model has seen, got 'xé'"):
        encode(tokenizer, "abxéc")


def test_words_never_seen_are_not_called_characters():
    tokenizer = Tokenizer(models.WordLevel({"hello": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"text must have only tokens that the model has seen, got: .*UNK"):
        encode(tokenizer, "hello world")


def test_the_first_nine_tenths_train_and_every_other_character_is_predicted(text_file):
    task = TextTask(TextConfig(data=text_file, length=16))
    cut = len(TEXT) * 9 // 10
    assert task.tokenizer.decode(task.train.tolist()) == TEXT[:cut]
    assert task.tokenizer.decode(task.held_out.tolist()) == TEXT[cut - 1 :]
    assert task.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    TextTask(TextConfig(data=text_file, length=16, sha256=task.sha256))
    with pytest.raises(ValueError, match=r"must have SHA-256 0ff, not \w+: it has changed"):
        TextTask(TextConfig(data=text_file, length=16, sha256="0ff"))


def test_a_batch_is_a_function_of_seed_and_step(text_file):
    config = TextConfig(data=text_file, length=16, batch_size=5)
    one, other = TextTask(config), TextTask(config)
    batch = one.batch(3, 7)
    other.batch(0, 0)
    assert batch.shape == (5, 17) and batch.dtype == torch.int64
    assert torch.equal(batch, other.batch(3, 7))
    assert not torch.equal(batch, one.batch(3, 8)) and not torch.equal(batch, one.batch(4, 7))
    train = one.tokenizer.decode(one.train.tolist())
    assert all(one.tokenizer.decode(window.tolist()) in train for window in batch)


def test_the_shortest_text_that_can_train_has_one_window(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij" * 2)
    assert TextTask(TextConfig(data=str(path), length=17, batch_size=2)).batch(0, 0).shape == (2, 18)
    with pytest.raises(ValueError, match="longer than the training window of 18 tokens, got 18"):
        TextTask(TextConfig(data=str(path), length=18))


class Counter(torch.nn.Module):
    """Logits that depend on the token and on how many were read since the state began: a state that shows."""

    def forward(self, tokens, state=None):
        start = torch.zeros(tokens.shape[0], 1) if state is None else state
        position = start + torch.arange(1, tokens.shape[1] + 1)
        scores = torch.stack([torch.sin(position * (v + 1)) * (1 + tokens) for v in range(3)], -1)
        return scores.double(), position[:, -1:]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("count", [2, 8, 9, 10, 33, 100])
def test_score_is_the_mean_over_every_token(carried, count):
    tokens = torch.from_numpy(np.random.default_rng(count).integers(0, 3, count))
    total = 0.0
    for t in range(count - 1):
        position = t + 1 if carried else t % 8 + 1
        logits = [math.sin(position * (v + 1)) * (1 + int(tokens[t])) for v in range(3)]
        total -= logits[int(tokens[t + 1])] - math.log(sum(map(math.exp, logits)))
    config = TextConfig(length=8, batch_size=3)
    assert score(Counter(), tokens, config, carried=carried) == pytest.approx(total / (count - 1), rel=1e-6)


def test_score_needs_two_tokens():
    with pytest.raises(ValueError, match="score: tokens must be at least 2, got 1"):
        score(Counter(), torch.zeros(1), TextConfig())


def test_loss_is_the_score_of_the_same_windows(text_file):
    task = TextTask(TextConfig(data=text_file, length=8, batch_size=1))
    model, window = lambda tokens, state=None: (torch.eye(task.vocabulary)[tokens], state), task.batch(0, 0)
    assert task.loss(model, window).item() == pytest.approx(score(model, window[0], task.config), rel=1e-6)


def test_python_brings_a_corpus():
    text = read_corpus("pydoc")
    assert len(text) > 300_000 and "assert_stmt" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold text, got an empty file"),
        (b"caf\xe9", "must be UTF-8 text, got unexpected end of data at byte 3"),
        (None, "must be an existing file or one of pydoc, shakespeare, got"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(str(path))
    with pytest.raises(ValueError, match="cannot read"):
        read_corpus(str(tmp_path))


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="must be chars, bytes or an existing tokenizers file"):
        make_tokenizer(str(tmp_path / "none.json"), TEXT)
    (tmp_path / "torn.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="must be a JSON file of the tokenizers library"):
        make_tokenizer(str(tmp_path / "torn.json"), TEXT)


@pytest.mark.parametrize("name", ["length", "batch_size"])
def test_config_is_checked(name):
    with pytest.raises(ValueError, match=f"TextConfig: {name} must be at least 1, got 0"):
        TextConfig(**{name: 0})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local HTTP server that hands out TEXT and counts, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/text" else 404)
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_download_is_verified_and_done_once(server, monkeypatch):
    url, asked = server
    right = Download(f"{url}/text", "a.txt", hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setitem(corpus.DOWNLOADS, "shakespeare", right)
    assert read_corpus("shakespeare") == TEXT
    assert read_corpus("shakespeare") == TEXT
    assert asked == ["/text"]


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [("/text", "0" * 64, "must have SHA-256 000"), ("/nothing", "0" * 64, "cannot download .*404.*--data FILE")],
)
def test_a_download_that_fails_leaves_nothing(server, tmp_path, path, sha256, message):
    url, _ = server
    with pytest.raises(ValueError, match=message):
        corpus.download(Download(url + path, "a.txt", sha256))
    assert not [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]
