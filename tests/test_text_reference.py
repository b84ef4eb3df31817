"""The script that times the text preset against nanoGPT's recipe: its Transformer, its schedule, its turns."""

import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "text_reference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("text_reference", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipes_model(script):
    model = script.Transformer(65)
    # 4 layers of 12 D^2 + 2 D, embedding and positions, last norm: what the recipe prints as 0.80 M without positions.
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 2 * 128) + (65 + 64) * 128 + 128
    tokens = torch.randint(65, (2, 64))
    logits, _ = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(65, (128,)))
    assert abs(loss.item() - math.log(65)) < 0.2
    later = tokens.clone()
    later[:, 40:] = 0
    torch.testing.assert_close(model(later)[0][:, :40], logits[:, :40])


def test_it_learns_in_the_recipes_way(script, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question: " * 200)
    monkeypatch.setattr(script, "STEPS", 130)
    model = script.run_recipe(str(text))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result = script.measure_recipe(str(text), tmp_path / "weights.pt")
    assert result["held_out"] < 2 and result["steps"] == 130


def test_each_is_charged_its_own_time_only(script):
    commands = {"short": "0.5", "long": "1.5"}
    busy = "import time, sys; e = time.process_time() + float(sys.argv[1])\nwhile time.process_time() < e: pass"
    begin = time.monotonic()
    processes = {name: subprocess.Popen([sys.executable, "-c", busy, amount]) for name, amount in commands.items()}
    seconds = script.in_turns(processes, 0.2)
    assert sum(seconds.values()) <= time.monotonic() - begin
    assert seconds["short"] > 0.5 and seconds["long"] > 1.5


def test_a_failing_side_ends_it(script):
    with pytest.raises(SystemExit, match="bad failed"):
        script.in_turns({"bad": subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])}, 5)
