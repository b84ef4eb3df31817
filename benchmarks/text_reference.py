"""The `shakespeare` preset against the Transformer of nanoGPT's documented CPU recipe: whole runs, on one machine.

The recipe: 2,000 steps of 12 windows of 64 characters; 4 layers, 4 heads, width 128, no dropout, no biases; AdamW with
betas (0.9, 0.99), decay 0.1, learning rate 1e-3 falling to 1e-4 by a cosine after 100 steps of warm-up, gradients
clipped at 1; every 250 steps the loss of 20 batches each of training and held-out text.

Each is a process of its own, from its start to its end, and they take turns of some seconds: while one runs, the other
is stopped by a signal. So a machine that slows down slows both, and each is charged its own time only. Both have huge
pages, or neither, as the environment says. The loss over every held-out character, in windows of the training length
from zero state, is our measure: ours takes it within its time, the recipe is not charged for it.

    python benchmarks/text_reference.py --data shakespeare
"""

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.bench import facts
from minrnn.tasks import TextConfig, TextTask

STEPS, WARMUP, HIGHEST, LOWEST = 2000, 100, 1e-3, 1e-4


class Attention(nn.Module):
    """Causal self-attention of `heads` heads, (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and an MLP, each residual and normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width, bias=False), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, bias=False),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """The recipe's model: learned positions, tied embedding, N(0, 0.02) weights, smaller into the residual stream."""

    def __init__(self, vocabulary: int, length: int = 64, layers: int = 4, heads: int = 4, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return F.linear(self.norm(self.layers(x)), self.embedding.weight), None


def recipe_task(data: str) -> TextTask:
    """The text in the recipe's windows."""
    return TextTask(TextConfig(data=data, length=64, batch_size=12))


def run_recipe(data: str) -> Transformer:
    """The recipe from beginning to end, in this process: its trained model."""
    task = recipe_task(data)
    held_out = task.held_out.unfold(0, 65, 1)
    torch.manual_seed(0)
    model = Transformer(task.vocabulary)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=HIGHEST, betas=(0.9, 0.99))
    for step in range(STEPS + 1):
        if step % 250 == 0:
            with torch.no_grad():
                for batch in range(20):
                    task.loss(model, task.batch(1, step + batch))
                    task.loss(model, held_out[torch.randint(len(held_out), (12,))].long())
        if step == STEPS:
            break
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = HIGHEST * step / WARMUP if step < WARMUP else LOWEST + fall * (HIGHEST - LOWEST)
        loss = task.loss(model, task.batch(0, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # the recipe logs every step
    return model


def measure_recipe(data: str, weights: Path) -> dict[str, float]:
    """What the saved weights of the recipe are worth, over every held-out character."""
    task = recipe_task(data)
    model = Transformer(task.vocabulary).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**task.evaluate(model), "steps": STEPS, "parameters": parameters}


def in_turns(processes: dict[str, subprocess.Popen[bytes]], turn: float) -> dict[str, float]:
    """The seconds that each process was let run until it ended."""
    seconds = dict.fromkeys(processes, 0.0)
    for process in processes.values():
        process.send_signal(signal.SIGSTOP)
    while running := [name for name, process in processes.items() if process.returncode is None]:
        for name in running:
            begin = time.monotonic()
            processes[name].send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if processes[name].wait(turn):
                    raise SystemExit(f"{name} failed")
            processes[name].send_signal(signal.SIGSTOP)
            seconds[name] += time.monotonic() - begin
        sys.stderr.write("  ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()) + "\n")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The shakespeare preset against nanoGPT's CPU recipe, in turns, both with huge pages. "
        "Each is charged its own time only, the recipe not that of our measure."
    )
    parser.add_argument("--data", default="shakespeare", help="shakespeare, or a file that holds it")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn (default: 5)")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="run the recipe alone, its weights into FILE")
    given = parser.parse_args()
    facts.use_huge_pages()  # for both: the processes inherit the setting
    if given.recipe:
        torch.save(run_recipe(given.data).state_dict(), given.recipe)
        return
    with tempfile.TemporaryDirectory() as folder:
        run, recipe = Path(folder, "run"), Path(folder, "recipe.pt")
        ours = ["-m", "minrnn.cli", "train", "--config", "shakespeare", "--data", given.data, "--out", str(run)]
        theirs = [__file__, "--data", given.data, "--recipe", str(recipe)]
        commands = {"minrnn": ours, "recipe": theirs}
        processes = {
            name: subprocess.Popen([sys.executable, *command], stdout=sys.stderr) for name, command in commands.items()
        }
        try:
            seconds = in_turns(processes, given.turn)
        finally:
            for process in processes.values():
                process.kill()
        results = {
            "minrnn": json.loads((run / "result.json").read_text()),
            "recipe": measure_recipe(given.data, recipe),
        }
    for name, result in results.items():
        result["seconds"] = round(seconds[name], 1)
        sys.stdout.write(f"{name}: {result['seconds']} s, {result['held_out']:.4f} nats per held-out character\n")
    if given.out:
        given.out.write_text(json.dumps({**facts.gather(), "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
