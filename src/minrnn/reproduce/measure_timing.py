"""Cells that measure time: training steps against length, and contexts read by language models in use.

Times are comparable side by side only, so all systems of a cell take turns in one process. Systems are named as in
`minrnn.bench.systems.SYSTEMS`, which says too what each is set against.
"""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch.utils._pytree import tree_leaves

from minrnn._console import say
from minrnn.bench import measure, sweep
from minrnn.bench.measure import Summary, Times
from minrnn.bench.systems import SYSTEMS, Workload
from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig
from minrnn.reproduce.cells import Cell


def speed(cell: Cell, console: Console) -> dict[str, Any]:
    """Time training steps, forward and backward of one layer, of all systems; and take the peak memory of each.

    Args:
        cell: its config has `batch`, `length`, `width`, `systems`, `longest`, `rounds`, `budget` and `device`.
        console: where progress is shown.

    Returns:
        `points`, one for each system, as `minrnn bench` makes them, with `batch` and `width`; `left_out`, the others
        and why; `device` and `seconds`.
    """
    begin, config, device = time.perf_counter(), cell.config, _device(cell.config)
    torch.manual_seed(cell.seed)
    load = Workload(config["batch"], config["length"], config["width"], config["width"], device=device)
    left_out = _too_long(config)
    able = [name for name in config["systems"] if name not in left_out]
    left_out |= {name: reason for name in able if (reason := sweep.refusal(name, load))}
    names = [name for name in able if name not in left_out]
    plan = sweep.Sweep(load, (load.length,), tuple(names), config["rounds"], config["budget"])
    say(console, sweep.HEAD)
    points = [
        {**point, "batch": load.batch, "width": load.hidden_size} for point in sweep.at_length(plan, names, load.length)
    ]
    return {"points": points, "left_out": left_out, "device": device, "seconds": _since(begin)}


def inference(cell: Cell, console: Console) -> dict[str, Any]:
    """Time how language models of equal width and layers read a context at once, and one token more after it.

    Args:
        cell: its config has `batch`, `length` of the context, `vocabulary`, `systems` with the backbone of each,
            `longest`, `rounds`, `budget` and `device`.
        console: where progress is shown.

    Returns:
        `points`, one for each system: seconds of the context (`prefill`) and of the token (`step`), speed-ups over
        others in both, and the size of the state between them; `left_out`, `device` and `seconds`.
    """
    begin, config, device = time.perf_counter(), cell.config, _device(cell.config)
    torch.manual_seed(cell.seed)
    batch, length = config["batch"], config["length"]
    tokens = torch.randint(config["vocabulary"], (batch, length + 1), device=device)
    context, token = tokens.split([length, 1], 1)
    left_out, models, states = _too_long(config), {}, {}
    clock = measure.clock(device)
    with torch.inference_mode():
        for name, backbone in config["systems"].items():
            if name in left_out:
                continue
            model_config = LanguageModelConfig(config["vocabulary"], BackboneConfig(**backbone))
            model = LanguageModel(model_config).to(device).eval()
            try:  # the last token in a step of its own: it leaves a cache as later steps find it, in one piece
                _, states[name] = model(context[:, -1:], model(context[:, :-1])[1])
            except RuntimeError as error:  # such as one that says that memory does not suffice
                left_out[name] = str(error).partition("\n")[0]
            else:
                models[name] = model
        prefill = {name: partial(model, context) for name, model in models.items()}
        step = {name: partial(model, token, states[name]) for name, model in models.items()}
        prefills, steps = (
            measure.alternate(each, config["rounds"], config["budget"], clock) for each in (prefill, step)
        )
    points = []
    for name in models:
        point = {
            "system": name,
            "length": length,
            "batch": batch,
            "prefill": asdict(Summary.of(prefills[name])),
            "step": asdict(Summary.of(steps[name])),
            "prefill_speedup_over": _speedups(prefills, name),
            "step_speedup_over": _speedups(steps, name),
            "state_bytes": sum(leaf.nbytes for leaf in tree_leaves(states[name])),
            "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
        }
        points.append(point)
        context_ms, token_ms = (1e3 * point[part]["median"] for part in ("prefill", "step"))
        took = f"context {context_ms:.4g} ms, token {token_ms:.4g} ms"
        say(console, f"{name:<10} {took}, state {point['state_bytes']:,} bytes")
    return {"points": points, "left_out": left_out, "device": device, "seconds": _since(begin)}


def _device(config: dict[str, Any]) -> str:
    """A GPU where the config leaves the device open and there is one."""
    return "cuda" if config["device"] == "auto" and torch.cuda.is_available() else "cpu"


def _too_long(config: dict[str, Any]) -> dict[str, str]:
    """The systems that are not measured at this length, and why."""
    return {
        name: f"measured up to length {longest:,}"
        for name, longest in config["longest"].items()
        if longest < config["length"]
    }


def _speedups(times: Times, name: str) -> dict[str, dict[str, float]]:
    """Paired ratios of the times of others over those of a system."""
    return {other: asdict(measure.ratio(times, other, name)) for other in SYSTEMS[name].over if other in times}


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 1)
