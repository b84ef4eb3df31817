"""The check of benchmarks/gpu.py without a GPU: it finds right what is right, and wrong what is wrong."""

import math
import time

import pytest
import torch

from minrnn.bench import check, gpu
from minrnn.bench.check import Case
from minrnn.ops import linear_scan, selective_scan, why_not

CASES = [case for case in check.cases() if max(case.length, case.batch) <= 257]
TINY_ROWS = Case("mingru_scan", "bfloat16", 9, 6, 4, ("rows", "time-major"))


@pytest.mark.parametrize("case", [*CASES, TINY_ROWS], ids=str)
def test_what_is_right_is_found_right(case):
    if reason := why_not("native", torch.zeros(1)):
        pytest.skip(f"exp of plain PyTorch depends on the place in memory, and {reason}")
    result = check.guarded(case, "cpu", 1, "native")
    assert result["status"] == "right", result
    assert result["error"] <= max(check.TOLERANCE[case.dtype])


def test_the_cases_are_ugly():
    cases = check.cases()
    assert len(set(cases)) == len(cases)
    for op in check.OPS:
        own = [case for case in cases if case.op == op]
        assert {"float32", "bfloat16", "float64", "float16"} <= {case.dtype for case in own}
        options = {option for case in own for option in case.options}
        assert options >= {"initial", "reset", "slow", "nan", "sliced"}
        assert op == "selective_scan" or options >= {"reverse", "time-major"}
        assert min(case.length for case in own) == 0 and min(case.batch for case in own) == 0
    numbers = {case: case.batch * case.length * case.hidden for case in cases if "rows" in case.options}
    assert all(n * (2 if case.op == "mingru_scan" else 1) > 2**31 for case, n in numbers.items())


def unwritten(a, b, initial, h, reset):
    out = torch.empty_like(h)
    out[:, :-1] = h[:, :-1]
    return out


def multiplied(a, b, initial, h, reset):
    state, steps = initial, []
    for t in range(b.shape[1]):
        state = a[:, t] * state * ~reset[:, t, None] + b[:, t]
        steps.append(state)
    return torch.stack(steps, 1)


WRONG = {
    "h is off by": lambda a, b, initial, h, reset: h + 1e-3 * h.abs().max(),
    "h is off by inf": unwritten,
    "gradient of coeffs is off by": lambda a, b, initial, h, reset: h.detach() + b - b.detach(),
    "gradient of initial is off by": lambda a, b, initial, h, reset: h + (initial - initial.detach()).sum(),
    "h depends on the batch": lambda a, b, initial, h, reset: h * (1 + 1e-6 * len(b)),
    "h differs between two runs": lambda a, b, initial, h, reset: h + 1e-6 * torch.rand(()),
    "RuntimeError: no kernel": lambda a, b, initial, h, reset: (_ for _ in ()).throw(RuntimeError("no kernel\nat all")),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_is_found(why, monkeypatch):
    def wrong(coeffs, values, initial, *, reset, reverse, backend):
        h = linear_scan(coeffs, values, initial, reset=reset, backend=backend)
        return h if backend == "reference" else WRONG[why](coeffs, values, initial, h, reset)

    monkeypatch.setattr(check, "linear_scan", wrong)
    result = check.guarded(Case("linear_scan", "float32", 3, 21, 5, ("initial", "reset")), "cpu", 1)
    assert result["status"] == "wrong"
    assert why in result["why"]


def test_a_nan_that_passes_a_reset_is_found(monkeypatch):
    def wrong(coeffs, values, initial, *, reset, reverse, backend):
        h = linear_scan(coeffs, values, initial, reset=reset, backend=backend)
        return h if backend == "reference" else multiplied(coeffs, values, initial, h, reset)

    monkeypatch.setattr(check, "linear_scan", wrong)
    clean, spoiled = (Case("linear_scan", "float64", 3, 21, 5, ("initial", "reset", *nan)) for nan in ((), ("nan",)))
    assert check.guarded(clean, "cpu", 1)["status"] == "right"
    assert check.guarded(spoiled, "cpu", 1)["status"] == "wrong"


def test_a_gradient_that_all_sequences_share_is_checked(monkeypatch):
    def wrong(*, A, backend, **others):
        return selective_scan(A=A if backend == "reference" else A * 2 - A.detach(), backend=backend, **others)

    monkeypatch.setattr(check, "selective_scan", wrong)
    result = check.guarded(Case("selective_scan", "float64", 2, 9, 3, state=4), "cpu", 1)
    assert "gradient of A is off by" in result["why"]


def test_an_error_is_relative_to_the_size_of_what_is_wanted():
    want = torch.tensor([1.0, -1.0, 0.0, 1.0])
    assert check.error(want, want) == 0
    assert check.error(want * 1000 + 1, want * 1000) == pytest.approx(check.error(want + 1e-3, want), rel=1e-3)
    assert check.error(torch.zeros(3), torch.zeros(3)) == 0
    for came in (want * math.nan, want * math.inf, want[:3]):
        assert check.error(came, want) == math.inf


def test_a_case_that_ends_its_process_is_wrong_and_the_others_go_on(monkeypatch):
    crash = "import json, os, sys; json.loads(sys.argv[1])['cases'][0]['hidden'] == 1 and os._exit(3)"
    monkeypatch.setattr(check, "WORKER", f"{crash}; from minrnn.bench import check; check.main()")
    cases = [Case("linear_scan", "float32", 2, 3, hidden) for hidden in (2, 1, 3)]
    cases[0] = Case("linear_scan", "int8", 2, 3, 2)  # an error is no crash
    results = list(check.run(cases[1:] + cases[:1], "cpu", 1, 100, workers=1))
    assert [result["status"] for result in results] == ["wrong", "right", "wrong"]
    assert results[0]["why"] == "its process ended: exit status 3"


def test_checks_end_even_where_no_process_starts(monkeypatch):
    monkeypatch.setattr(check.sys, "executable", "/no/such/python")
    monkeypatch.setattr(check.threading, "excepthook", lambda _: None)
    assert list(check.run([Case("linear_scan", "float32", 2, 3, 2)], "cpu", 1, 100, workers=1)) == []


def test_checks_end_when_their_time_is_over(tmp_path):
    cases = [Case("linear_scan", "float32", 2, 3, hidden) for hidden in (2, 3)]
    assert list(check.run(cases, "cpu", 1, 0)) == [] == list(check.run(cases, "cpu", 1, 0, workers=1))
    run = gpu.Run("cpu", tmp_path / "x.json", time.monotonic())
    gpu.correct(run, cases, workers=0)
    assert run.result["left_out"] == ["2 of 2 checks, from linear_scan float32 (2, 3, 2) on: no time"]
