"""Blocks, backbone and language model: mode against mode, their files, and the text that they generate."""

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from conftest import assert_close
from minrnn import MinGRU, MinGRUCell, MinLSTM
from minrnn._files import locked, replace_files
from minrnn.mixers import Place
from minrnn.models import (
    Backbone,
    BackboneConfig,
    Block,
    LanguageModel,
    LanguageModelConfig,
    generate,
    load,
    parameter_groups,
    save,
)
from minrnn.models.generate import sample
from parity import check_chunks, check_resets, chunked, compare

D, V = 6, 11
LEARNED = {"learn_initial_state": True}
STACKS = {
    "mingru": BackboneConfig(D, 2, "mingru", dropout=0.0),
    "minlstm-learned": BackboneConfig(D, 2, "minlstm", {"expansion": 1.5, **LEARNED}, dropout=0.0),
    "no-conv": BackboneConfig(D, 1, "mingru", LEARNED, conv=0, dropout=0.0),
    "no-mlp": BackboneConfig(D, 1, "minlstm", mlp=0),
    "mixer-alone": BackboneConfig(D, 1, conv=0, mlp=0),
}


def make_block(name):
    return Block(STACKS[name], Place()).double()


def make_backbone(name):
    return Backbone(STACKS[name]).double()


def make_language(name="mingru"):
    """A small model whose outputs differ as those of a trained one do."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(V, STACKS[name])).double().eval()
    torch.nn.init.normal_(model.head.weight, std=2)
    return model


def series(batch, time):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=torch.float64).requires_grad_()


def text(batch, time):
    torch.manual_seed(1)
    return torch.randint(V, (batch, time))


# --- modes ---


@pytest.mark.parametrize("name", STACKS)
def test_copies_give_the_same_results(name):
    model, tokens = make_language(name), text(2, 9)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for mine, other in zip(tree_leaves(copied(tokens)), tree_leaves(model(tokens)), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("time", [0, 1, 2, 17])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("make", [make_block, make_backbone])
def test_whole_chunked_and_stepped_agree(make, name, time):
    module, x = make(name), series(2, time)
    check_chunks(module, x, None, list(module.parameters()))
    compare(module(x, module.initial_state(2)), module(x), [x, *module.parameters()], x.dtype)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("make", [make_block, make_backbone])
def test_resets_are_separate_sequences(make, name):
    module = make(name)
    check_resets(module, series(2, 17), list(module.parameters()))


@pytest.mark.parametrize("name", STACKS)
def test_language_model_whole_chunked_and_stepped_agree(name):
    model, tokens, reset = make_language(name), text(3, 17), torch.rand(3, 17) < 0.2
    parameters = list(model.parameters())
    for resets in (None, reset):
        whole = model(tokens, reset=resets)
        for sizes in ([1], [2, 3], [7, 1, 64]):
            compare(whole, chunked(model, tokens, None, sizes, resets), parameters, torch.float64)


def test_language_model_with_resets_reads_separate_texts():
    model, tokens = make_language("minlstm-learned"), text(1, 20)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, [0, 6, 7, 13]] = True
    parts = [model(part)[0] for part in tokens.split([6, 1, 6, 7], 1)]
    assert_close(model(tokens, reset=reset)[0], torch.cat(parts, 1), torch.float64)


def test_no_output_knows_a_later_input():
    module, x = make_backbone("mingru"), series(2, 9)
    y, _ = module(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t].sum() + y[:, t].square().sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, t] != 0).any()


def test_a_block_is_its_equation():
    block, x = make_block("mingru"), series(2, 9)

    def norm(x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    u = x + block.conv(x)[0]
    u = u + block.mixer(norm(u, block.mixer_norm.weight))[0]
    normed = norm(u, block.mlp_norm.weight)
    value, gate = (normed @ part.weight.T + part.bias for part in (block.mlp.value, block.mlp.gate))
    gated = value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    expected = u + gated @ block.mlp.output.weight.T + block.mlp.output.bias
    assert_close(block(x)[0], expected, torch.float64)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("time", [0, 1])
def test_no_batch_and_no_time_are_ordinary(batch, time):
    model = make_language("minlstm-learned")
    logits, state = model(text(batch, time))
    assert logits.shape == (batch, time, V)
    logits.sum().backward()
    again, _ = model(text(batch, 3), state)
    assert again.shape == (batch, 3, V)


def test_recurrent_state_is_float32_in_16_bit_models():
    model = make_language("mingru").bfloat16()
    logits, state = model(text(2, 50))
    assert logits.dtype == torch.bfloat16
    assert [leaf.dtype for leaf in tree_leaves(state)] == [torch.bfloat16, torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = make_language("mingru").float()(text(2, 50))
    assert logits.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in tree_leaves(state)} == {torch.float32}


def test_every_parameter_learns():
    model = make_language("minlstm-learned")
    model(text(2, 9))[0].square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


def test_compiles_without_a_graph_break():
    model, tokens, reset = make_language("mingru").float(), text(2, 9), torch.rand(2, 9) < 0.3
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True), []
    for logits in (compiled(tokens, reset=reset)[0], model(tokens, reset=reset)[0]):
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits, *grads))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float32)


# --- arguments ---


@pytest.mark.parametrize(
    ("error", "match", "arguments", "reset"),
    [
        (TypeError, "tokens must be a torch.Tensor, got list", ([[1]],), None),
        (TypeError, "tokens must be int64 or int32, got torch.float32", (torch.zeros(1, 2),), None),
        (ValueError, r"tokens must be \(B, T\).*got \(2,\)", (text(1, 2)[0],), None),
        (IndexError, "out of range", (text(1, 2) + V,), None),
        (ValueError, "state must be a tuple of 2 parts, as calls give it, got 1 parts", (text(1, 2), (None,)), None),
        (ValueError, r"reset must be \(B, T\) = \(1, 2\), got \(1, 3\)", (text(1, 2),), torch.zeros(1, 3).bool()),
    ],
)
def test_bad_arguments_are_named(error, match, arguments, reset):
    with pytest.raises(error, match=match):
        make_language()(*arguments, reset=reset)


def test_a_state_of_another_batch_is_refused():
    model = make_language()
    _, state = model(text(3, 4))
    with pytest.raises(ValueError, match=r"state must be \(B, K-1, D\) = \(2, 3, 6\), got \(3, 3, 6\)"):
        model(text(2, 4), state)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "width must be at least 1, got 0", {"width": 0}),
        (ValueError, "layers must be at least 1, got 0", {"layers": 0}),
        (ValueError, "conv must be at least 0, got -1", {"conv": -1}),
        (ValueError, "mlp must be at least 0 and finite, got nan", {"mlp": math.nan}),
        (ValueError, "mlp must be at least 0 and finite, got inf", {"mlp": math.inf}),
        (ValueError, r"mlp \* width must be below 2\*\*63, got 1e\+308 \* 128", {"mlp": 1e308}),
        (ValueError, r"dropout must be in \[0, 1\), got 1", {"dropout": 1}),
        (ValueError, "one of mingru, minlstm, .* got 'rnn'", {"mixer": "rnn"}),
        (ValueError, "options of mingru must be among .* got 'expand'", {"mixer_options": {"expand": 2}}),
        (TypeError, "width must be of type int, got 8.0", {"width": 8.0}),
        (TypeError, "mixer_options must be of type dict, got None", {"mixer_options": None}),
    ],
)
def test_bad_configs_are_named(error, match, changes):
    with pytest.raises(error, match=match):
        BackboneConfig(**changes)


def test_vocabulary_must_hold_a_token():
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        LanguageModelConfig(0)


@pytest.mark.parametrize("name", STACKS)
def test_configs_survive_json(name):
    config = LanguageModelConfig(V, STACKS[name])
    assert LanguageModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- the optimiser ---


def test_only_matrices_decay():
    model = make_language("minlstm-learned")
    others, decaying = parameter_groups(model, 1e-3, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decaying["lr"] == others["lr"] == 1e-3
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rest = ([names[id(p)] for p in group["params"]] for group in (decaying, others))
    assert sorted(decay + rest) == sorted(names.values())
    assert {name.removeprefix("backbone.blocks.0.") for name in decay if "blocks.1" not in name} == {
        "head.weight",
        "conv.output.weight",
        "mixer.input.weight",
        "mixer.output.weight",
        "mlp.value.weight",
        "mlp.gate.weight",
        "mlp.output.weight",
    }
    torch.optim.AdamW([decaying, others], lr=1e-3)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTMCell, MinGRU, MinLSTM, MinGRUCell])
def test_matrices_of_layers_decay(kind):
    layer = kind(3, 4)
    groups = parameter_groups(layer, 1e-3, 0.1)
    decay = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decay == {id(p) for name, p in layer.named_parameters() if name.startswith("weight")}


def test_matrices_of_attention_decay():
    layer = nn.TransformerEncoderLayer(8, 2)
    decay = {id(p) for group in parameter_groups(layer, 1e-3, 0.1) if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in layer.named_parameters() if id(parameter) in decay}
    assert names == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}


@pytest.mark.parametrize(("kind", "name"), [(LanguageModel, "LanguageModelConfig"), (Backbone, "BackboneConfig")])
def test_a_model_wants_its_config(kind, name):
    with pytest.raises(TypeError, match=f"config must be a {name}, got int"):
        kind(8)


# --- files ---


@pytest.fixture
def run(tmp_path) -> Path:
    save(make_language("minlstm-learned"), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", STACKS)
def test_a_saved_model_comes_back(name, dtype, tmp_path):
    model = make_language(name).to(dtype)
    save(model.train(), tmp_path)
    back = load(str(tmp_path))
    assert not back.training and back.config == model.config
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    tokens = text(2, 9)
    assert torch.equal(back(tokens)[0], model.eval()(tokens)[0])
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in back.parameters())
    back(tokens)[0].sum().backward()


def test_a_compiled_model_is_saved_as_the_model_that_it_is(tmp_path):
    model = make_language("mingru")
    save(torch.compile(model), tmp_path)
    assert torch.equal(load(tmp_path)(text(2, 9))[0], model.eval()(text(2, 9))[0])


def test_weights_that_could_not_be_loaded_are_not_saved(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    model = make_language("mingru")
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match=r"save: .* weights that its config makes, got others: head.parametrizations"):
        save(model, run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_weights_that_share_memory_are_not_saved(tmp_path):
    model = make_language("mingru")
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"save: model must have weights that share no memory, got: .*head.weight"):
        save(model, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_files_that_cannot_be_put_in_place_leave_nothing_beside_it(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_files({tmp_path / "model": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_model_that_was_there(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(make_language("mingru"), run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_lock_has_one_owner_at_a_time_and_goes_with_the_last(tmp_path):
    """Although the file is another one after each owner."""
    inside, most, said = [], [], []

    def work(_):
        with locked(tmp_path / "deep" / "lock", said.append):
            inside.append(1)
            time.sleep(0.002)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == [1] * 40
    assert set(said) == {"another process is at work on it: waits"}
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(ValueError, match="mine"), locked(tmp_path / "lock", said.append):
        raise ValueError("mine")
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("kept", [0, 7, 8, 200, -1])
def test_torn_weights_are_refused(run, kept):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"load: .*model.safetensors must be the weights of config.json, got"):
        load(run)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"vocabulary": 3}', "\x00\xff"])
def test_torn_configs_are_refused(run, content):
    (run / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"load: .*config.json must be the config of a LanguageModel, got"):
        load(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_run_without_a_model_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"load: run must be a directory that holds {name}"):
        load(run)


def test_unknown_and_missing_fields_are_refused(run):
    values = json.loads((run / "config.json").read_text())
    values["backbone"]["depth"] = values["backbone"].pop("layers")
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="BackboneConfig: fields must be width, layers, .* got .* depth"):
        load(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 10**12),
        ("width", 10**30),
        pytest.param("width", 10**400, id="width-huge"),
        ("conv", 10**15),
        ("mlp", 1e30),
        ("mlp", 1e308),
        ("layers", 10**9),
    ],
)
def test_sizes_beyond_any_machine_are_refused(run, name, value):
    values = json.loads((run / "config.json").read_text())
    values["backbone"][name] = value
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="must be"):
        load(run)


def test_weights_of_another_model_are_refused(run):
    weights = safetensors.torch.load_file(run / "model.safetensors")
    for changed in (
        {name: tensor for name, tensor in weights.items() if name != "head.weight"},
        weights | {"more": torch.zeros(1)},
        weights | {"head.weight": torch.zeros(V, D + 1)},
        weights | {"head.weight": torch.zeros(V, D, dtype=torch.int64)},
    ):
        safetensors.torch.save_file(changed, run / "model.safetensors")
        with pytest.raises(ValueError, match="must be the weights of config.json"):
            load(run)


class Impostor:
    def __reduce__(self):
        return os.mkdir, ("impostor-was-here",)


def test_no_code_in_the_files_is_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run / "model.safetensors").write_bytes(pickle.dumps(Impostor()))
    with pytest.raises(ValueError, match="model.safetensors must be"):
        load(run)
    torch.save(Impostor(), run / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors must be"):
        load(run)
    assert not Path("impostor-was-here").exists()


# --- generation ---


def full_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7]])
def test_greedy_generation_is_the_argmax_of_the_whole_text(name, prompt):
    model = make_language(name)
    expected = full_greedy(model, prompt, 20)
    assert list(generate(model, prompt, max_new_tokens=20, temperature=0)) == expected
    # The likeliest one alone, in other words:
    assert list(generate(model, torch.tensor(prompt), max_new_tokens=20, top_k=1)) == expected
    assert list(generate(model, prompt, max_new_tokens=20, top_p=1e-9)) == expected
    for temperature in (1e-40, 1e-46):  # float32 holds neither
        assert list(generate(model, prompt, max_new_tokens=20, temperature=temperature)) == expected


def test_the_prompt_is_read_once_and_then_token_by_token():
    model, sizes = make_language(), []
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape)))
    tokens = generate(model, range(7), max_new_tokens=4)
    assert sizes == []
    next(tokens)
    assert sizes == [(1, 7)]
    assert len(list(tokens)) == 3
    assert sizes == [(1, 7), (1, 1), (1, 1), (1, 1)]
    assert list(generate(model, [1], max_new_tokens=0)) == []


def test_a_seed_decides_the_text():
    model = make_language()

    def write(seed):
        return list(generate(model, [1], max_new_tokens=30, generator=torch.Generator().manual_seed(seed)))

    assert write(1) == write(1) != write(2)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, 11),
        ({"temperature": 0.5}, 11),
        ({"top_k": 3}, 3),
        ({"top_k": 50}, 11),
        ({"top_p": 1.0}, 11),
        ({"top_p": 0.5}, None),
        ({"top_p": 1e-46}, 1),  # less than float32 has
        ({"temperature": 2.0, "top_k": 5, "top_p": 0.7}, None),
    ],
)
def test_tokens_are_drawn_from_the_distribution(options, allowed):
    draws, logits = 40_000, torch.randn(V)
    # The distribution, worked out in another way: one token after the other, the likeliest first.
    weights = torch.exp(logits / options.get("temperature", 1.0)).tolist()
    ranking = sorted(range(V), key=lambda token: -weights[token])[: options.get("top_k", V)]
    total, kept = sum(weights[token] for token in ranking), []
    for token in ranking:
        if sum(weights[other] for other in kept) / total < options.get("top_p", 1.0):
            kept.append(token)
    if allowed is not None:
        assert len(kept) == allowed
    else:
        assert 1 < len(kept) < V
    wishes = (options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    tokens = sample(logits.expand(draws, V), *wishes, torch.Generator().manual_seed(0))
    counts = tokens.flatten().bincount(minlength=V).tolist()
    share = sum(weights[token] for token in kept)
    for token in range(V):
        probability = weights[token] / share if token in kept else 0.0
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) <= 4.5 * deviation


@pytest.mark.parametrize(
    ("match", "prompt", "options"),
    [
        ("prompt_tokens must be at least one token, got none", [], {}),
        (r"prompt_tokens must be in \[0, 11\), got 11", [1, 11], {}),
        (r"prompt_tokens must be in \[0, 11\), got -1", [-1], {}),
        ("max_new_tokens must be at least 0, got -1", [1], {"max_new_tokens": -1}),
        ("temperature must be at least 0 and finite, got -0.1", [1], {"temperature": -0.1}),
        ("temperature must be at least 0 and finite, got nan", [1], {"temperature": math.nan}),
        ("top_k must be at least 1, got 0", [1], {"top_k": 0}),
        (r"top_p must be in \(0, 1\], got 0", [1], {"top_p": 0}),
        (r"top_p must be in \(0, 1\], got 1.1", [1], {"top_p": 1.1}),
    ],
)
def test_bad_wishes_are_named_at_the_call(match, prompt, options):
    with pytest.raises(ValueError, match=f"generate: {match}"):
        generate(make_language(), prompt, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("name", "prompt", "options"),
    [
        ("prompt_tokens", [1.5], {}),
        ("max_new_tokens", [1], {"max_new_tokens": 2.5}),
        ("top_k", [1], {"top_k": 1.5}),
    ],
)
def test_numbers_that_are_not_whole_are_named_at_the_call(name, prompt, options):
    with pytest.raises(TypeError, match=rf"generate: {name} must be of whole numbers, got \d.5"):
        generate(make_language(), prompt, **{"max_new_tokens": 1, **options})


def test_a_model_in_training_mode_does_not_generate():
    with pytest.raises(ValueError, match="eval mode"):
        generate(make_language().train(), [1], max_new_tokens=1)


def test_dropout_is_of_the_mlp_and_of_training():
    model = LanguageModel(LanguageModelConfig(V, dataclasses.replace(STACKS["mingru"], dropout=0.5)))
    tokens = text(1, 4)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])
