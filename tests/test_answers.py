"""The tasks that make their own questions: every answer worked out again in another way."""

import collections
import hashlib
import itertools
import time
import timeit

import numpy as np
import pytest
import torch

from minrnn.tasks import FormalLanguage, ListOps, SelectiveCopying
from minrnn.tasks.answers import IGNORED
from minrnn.tasks.formal import LANGUAGES
from minrnn.tasks.listops import CLOSE, OPEN, OPERATIONS, PAD

TASKS = {
    "copying": SelectiveCopying(50, 6, 16, 8),
    "copying-s4": SelectiveCopying(50, 6, 16, 8, "s4"),
    **{name: FormalLanguage(name, 8) for name in LANGUAGES},
    "listops": ListOps(120, 20, 8),
}
# Of batch(3, 5) and held_out(5): results are comparable only while NumPy's random streams give the same questions.
DIGESTS = {
    "copying": "5cc29c30be39ca46",
    "copying-s4": "502295a5a5b8ca68",
    "bucket_sort": "914f1ff395310992",
    "missing_duplicate": "f14b3a11d13b7821",
    "cycle_navigation": "088019905bb4edff",
    "even_pairs": "adf36e953f5a9e27",
    "majority": "49225396964f8d8c",
    "majority_count": "56fb5dfb5cb26305",
    "parity": "a5250c2ed720045d",
    "listops": "ec81fe140804b632",
}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(name):
    task = TASKS[name]
    assert same(task.batch(3, 5), task.batch(3, 5))
    assert not same(task.batch(3, 5), task.batch(3, 6)) and not same(task.batch(3, 5), task.batch(4, 5))
    assert same(task.held_out(5), task.held_out(5)) and not same(task.batch(0, 5), task.held_out(5))
    tensors = [*task.batch(3, 5), *task.held_out(5)]
    assert hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", TASKS)
def test_tokens_and_answers_are_in_the_vocabulary(name):
    for held_out in (False, True):
        for step in range(20):
            tokens, targets = TASKS[name].held_out(step) if held_out else TASKS[name].batch(0, step)
            assert tokens.shape == targets.shape and tokens.dtype == targets.dtype == torch.int64
            assert tokens.min() >= 0 and tokens.max() < TASKS[name].vocabulary
            wanted = targets[targets != IGNORED]
            assert len(wanted) >= len(tokens) and wanted.min() >= 0 and wanted.max() < TASKS[name].vocabulary


@pytest.mark.parametrize("name", ["copying", "bucket_sort", "cycle_navigation", "majority_count", "listops"])
def test_the_best_constant_answer_is_that_of_the_best_constant_model(name):
    task = TASKS[name]

    def always(answer):
        def model(tokens):
            return torch.nn.functional.one_hot(torch.full_like(tokens, answer), task.vocabulary).float(), None

        return model

    accuracies = [task.evaluate(always(answer))["accuracy"] for answer in range(task.vocabulary)]
    assert task.constant_accuracy() == pytest.approx(max(accuracies), abs=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_loss_and_accuracy_are_of_the_answers_alone(name):
    task = TASKS[name]

    def oracle(tokens):
        """Right answers, wherever the same questions come from."""
        for index in range(task.examination):
            known, targets = task.held_out(index)
            if known.shape == tokens.shape and torch.equal(known, tokens):
                return torch.nn.functional.one_hot(targets.clamp(min=0), task.vocabulary) * 100.0, None
        raise AssertionError("unknown questions")

    def uniform(tokens):
        return torch.zeros(*tokens.shape, task.vocabulary), None

    assert task.evaluate(oracle) == {"held_out": 0.0, "accuracy": 1.0}
    assert task.evaluate(uniform)["held_out"] == pytest.approx(np.log(task.vocabulary))
    assert task.loss(oracle, task.held_out(0)) == 0
    assert task.loss(uniform, task.batch(0, 0)).item() == pytest.approx(np.log(task.vocabulary))


@pytest.mark.parametrize(("convention", "blank", "cue", "total"), [("minrnn", 15, 0, 56), ("s4", 0, 15, 62)])
def test_selective_copying(convention, blank, cue, total):
    tokens, targets = SelectiveCopying(50, 6, 16, 64, convention).batch(0, 0)
    assert tokens.shape == (64, total)
    assert (tokens[:, -6:] == cue).all() and (targets[:, :-6] == IGNORED).all()
    for row, wanted in zip(tokens[:, :-6].tolist(), targets[:, -6:].tolist(), strict=True):
        assert [token for token in row if token != blank] == wanted
    assert set(targets[:, -6:].flatten().tolist()) == set(range(1, 15))
    places = (tokens[:, :-6] != blank).sum(0)
    assert (places > 0).all()  # everywhere, the last place included


def test_equal_draws_choose_the_same_places_on_any_machine():
    class Equal:
        integers = staticmethod(np.random.default_rng(0).integers)

        def random(self, shape, dtype):
            return np.zeros(shape, dtype)

    tokens, _ = SelectiveCopying(50, 6, 16, 4).make(Equal(), held_out=False)
    assert (tokens[:, :6] != 15).all() and (tokens[:, 6:50] == 15).all()


def test_making_questions_is_no_bottleneck():
    task = SelectiveCopying()
    assert task.batch(0, 0).tokens.shape == (64, 4112)
    assert min(timeit.repeat(lambda: task.batch(0, 0), number=1, repeat=5)) < 0.1  # seconds


def modulo(moves):
    place = 0
    for move in moves:
        place = (place + {0: -1, 1: 0, 2: 1}[move]) % 5
    return place


ANSWERS = {
    "bucket_sort": sorted,
    "cycle_navigation": lambda word: [modulo(word)],
    "even_pairs": lambda word: [sum(a != b for a, b in itertools.pairwise(word)) % 2],
    "majority": lambda word: [max(word, key=lambda symbol: (word.count(symbol), symbol))],
    "majority_count": lambda word: [min(collections.Counter(word).most_common(1)[0][1], 63)],
    "parity": lambda word: [sum(word) % 2],
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", LANGUAGES)
def test_formal_languages(name, held_out):
    task, empty = FormalLanguage(name, 16), LANGUAGES[name].symbols
    lengths = set()
    for step in range(40):
        tokens, targets = task.held_out(step) if held_out else task.batch(0, step)
        length = int((targets[0] == IGNORED).sum()) + (0 if name == "bucket_sort" else 1)
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            word = row[: row.index(empty)]
            answers = [answer for answer in wanted if answer != IGNORED]
            assert row[len(word) :] == [empty] * len(answers)
            if name == "missing_duplicate":
                # A word, and its beginning again: some length of the word makes it so, with the answer next.
                halves = [n for n in range((len(word) + 1) // 2, len(word) + 1) if word[n:] == word[: len(word) - n]]
                assert any(len(word) - n < n and word[len(word) - n] == answers[0] for n in halves)
            else:
                assert answers == ANSWERS[name](word)
        lengths.add(length)
    assert len(lengths) > 10


def test_words_are_short_to_train_on_and_long_to_be_examined_by():
    task = FormalLanguage("parity", 2)
    trained = [task.batch(0, step)[0].shape[1] - 1 for step in range(300)]
    examined = [task.held_out(step)[0].shape[1] - 1 for step in range(300)]
    assert (min(trained), max(trained)) == (1, 40)
    assert 40 <= min(examined) < 45 and 250 < max(examined) <= 256


def evaluate(tokens):
    """The value of a question, by a stack."""
    stack = [[]]
    for token in tokens:
        if token < OPEN:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([OPERATIONS[token - OPEN]])
        else:
            name, *digits = stack.pop()
            assert len(digits) >= 2
            middle = sorted(digits)[(len(digits) - 1) // 2], sorted(digits)[len(digits) // 2]
            stack[-1].append(
                {"MIN": min(digits), "MAX": max(digits), "MED": sum(middle) // 2, "SM": sum(digits) % 10}[name]
            )
    ((answer,),) = stack
    return answer


def test_listops():
    task, lengths, depths = ListOps(120, 20, 32, depth=4), [], []
    for step in range(10):
        tokens, targets = task.batch(0, step)
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            question = row[: row.index(PAD)] if PAD in row else row
            assert wanted[len(question) - 1] == evaluate(question)
            assert wanted.count(IGNORED) == len(row) - 1 and set(row[len(question) :]) <= {PAD}
            lengths.append(len(question))
            depths.append(max(np.cumsum([(OPEN <= t < CLOSE) - (t == CLOSE) for t in question])))
    assert 20 <= min(lengths) < 30 and 100 < max(lengths) <= 120 and max(depths) == 3  # and their digits


def test_listops_as_published_is_made_in_time():
    begin = time.perf_counter()
    tokens, _ = ListOps().batch(0, 0)
    assert 500 <= tokens.shape[1] <= 2000 and time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SelectiveCopying(4, 5), "tokens must be between 1 and length = 4, got 5"),
        (lambda: SelectiveCopying(4, 2, 2), "vocabulary must be at least 3, got 2"),
        (lambda: SelectiveCopying(4, 2, convention="x"), "convention must be one of .* got 'x'"),
        (lambda: SelectiveCopying(4, 2, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: ListOps(examination=0), "examination must be at least 1, got 0"),
        (lambda: FormalLanguage("latin"), "language must be one of bucket_sort, .* got 'latin'"),
        (lambda: FormalLanguage("parity", trained=(5, 4)), "trained must be"),
        (lambda: ListOps(100, 100), "length must be at least shortest"),
        (
            lambda: ListOps(depth=2),
            "depth and arguments must make questions of 500 to 2000 tokens likely, got 2 and 10",
        ),
        (lambda: ListOps(510, 500, arguments=2), "likely, got 10 and 2"),
        (lambda: ListOps(depth=1), "depth must be at least 2, got 1"),
        (lambda: ListOps(arguments=1), "arguments must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_batches_of_an_examination_count_alike():
    """As in the paper's code: sorted words of more symbols do not weigh more."""
    task = FormalLanguage("bucket_sort", 4, examination=2)
    longer, shorter = sorted((0, 1), key=lambda index: -task.held_out(index).tokens.shape[1])
    lengths = [task.held_out(index).tokens.shape[1] for index in (longer, shorter)]
    assert lengths[0] > lengths[1]

    def knows_the_longer(tokens):
        right = tokens.shape[1] == lengths[0]
        targets = task.held_out(longer if right else shorter).targets.clamp(min=0)
        return torch.nn.functional.one_hot(targets if right else 9 - targets, 11).float(), None

    assert task.evaluate(knows_the_longer)["accuracy"] == 0.5
