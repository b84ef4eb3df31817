"""Decision models: mode against mode, layouts against their definitions, and what a call refuses."""

import json

import numpy as np
import offline_toys
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from conftest import assert_close
from minrnn.mixers import MIXERS
from minrnn.models import BackboneConfig, load_model, save
from minrnn.rl.decision import DecisionConfig, DecisionModel, Scales, Trajectory
from minrnn.rl.systems import PUBLISHED, SYSTEMS, published, usual
from minrnn.rl.task import OfflineConfig
from minrnn.train import RunConfig
from parity import check_chunks, check_resets

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, A = 5, 2  # of an observation and of an action


def make_model(mixer, dtype=torch.float64):
    return offline_toys.make_model(mixer, SIZE, A, width=8, dtype=dtype, max_timestep=9, return_scale=1000.0)


def make_trajectory(batch, time, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return Trajectory(
        1000 * torch.randn(batch, time, dtype=dtype),
        torch.randn(batch, time, SIZE, dtype=dtype),
        torch.randn(batch, time, A, dtype=dtype),
        torch.arange(3, 3 + time).expand(batch, time),
    )


def as_series(model):
    """The model as the harness wants it: one series (B, T, 1 + SIZE + A), its first column also telling the time."""

    def run(x, state, *, reset=None):
        parts = x.split([1, SIZE, A], 2)
        time = (x[..., 0].detach().nan_to_num().abs() * 4).long()
        return model(Trajectory(1000 * parts[0][..., 0], parts[1], parts[2], time), state, reset=reset)

    return run


def series(batch, time):
    torch.manual_seed(1)
    return torch.randn(batch, time, 1 + SIZE + A, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("time", [1, 9])
@pytest.mark.parametrize("mixer", SYSTEMS)
def test_whole_chunked_and_stepped_agree(mixer, time):
    model = make_model(mixer)
    check_chunks(as_series(model), series(2, time), None, list(model.parameters()))


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_no_steps_leave_the_beginning_where_it_is(mixer):
    model, trajectory = make_model(mixer), make_trajectory(2, 3)
    actions, state = model(Trajectory(*(each[:, :0] for each in trajectory)))
    assert actions.shape == (2, 0, A)
    assert torch.equal(model(trajectory, state)[0], model(trajectory)[0])


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_resets_are_separate_sequences(mixer):
    model = make_model(mixer)
    check_resets(as_series(model), series(2, 12), list(model.parameters()))


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_nothing_crosses_a_reset(mixer):
    """Gradients of all actions from step 6 on, in all that came before, are exactly 0; so they are in the action that
    came with step 6."""
    model, trajectory = make_model(mixer), make_trajectory(2, 11)
    inputs = [each.requires_grad_() for each in trajectory[:3]]
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[:, 6] = True
    actions, _ = model(trajectory, reset=reset)
    found = torch.autograd.grad(actions[:, 6:].sum(), inputs)
    assert all((each[:, :6] == 0).all() for each in found)
    assert (found[2][:, 6] == 0).all() and all((each[:, 7] != 0).any() for each in found)


@pytest.mark.parametrize("mixer", ["mingru", "s4"])
def test_an_action_before_the_beginning_is_never_read(mixer):
    """Not even its NaN, in values or in gradients."""
    model, trajectory = make_model(mixer), make_trajectory(2, 5)
    spoiled = trajectory._replace(previous_actions=trajectory.previous_actions.clone())
    spoiled.previous_actions[:, [0, 3]] = float("nan")
    reset = torch.tensor([[False, False, False, True, False]]).expand(2, 5)
    results = []
    for each in (trajectory, spoiled):
        actions, _ = model(each, reset=reset)
        results.append([actions, *torch.autograd.grad(actions.sum(), list(model.parameters()), allow_unused=True)])
    for clean, other in zip(*results, strict=True):
        assert clean is other is None or torch.equal(clean, other)


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_no_action_knows_what_comes_later(mixer):
    """Right padding is exact: a window's actions are the same whatever follows it."""
    model, trajectory = make_model(mixer), make_trajectory(2, 9)
    whole, _ = model(trajectory)
    part, _ = model(Trajectory(*(each[:, :5] for each in trajectory)))
    assert_close(whole[:, :5], part, torch.float64)


def test_the_decision_transformer_is_its_equation():
    """Tokens, table, norm and head by hand, around torch's own attention."""
    model, trajectory = make_model("attention"), make_trajectory(3, 7)
    parameters = dict(model.named_parameters())

    def linear(x, name):
        return x @ parameters[f"{name}.weight"].mT + parameters[f"{name}.bias"]

    def norm(x, name, bias=None):
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], bias)

    observations = (trajectory.observations - model.mean) / (model.std + 1e-6)
    tokens = []
    for t in range(7):
        place = parameters["timestep.weight"][min(3 + t, 8)]
        tokens.append(linear(trajectory.returns_to_go[:, t, None] / 1000, "return_to_go") + place)
        tokens.append(linear(observations[:, t], "observation") + place)
        if t < 6:
            tokens.append(linear(trajectory.previous_actions[:, t + 1], "action") + place)
    x = norm(torch.stack(tokens, 1), "join", parameters["join.bias"])
    for block in ("backbone.blocks.0", "backbone.blocks.1"):
        q, k, v = linear(norm(x, f"{block}.mixer_norm"), f"{block}.mixer.input").split(8, 2)
        hidden = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        x = x + linear(hidden, f"{block}.mixer.output")
        x = x + linear(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.0").relu(), f"{block}.mlp.2")
    y = linear(norm(x, "backbone.norm")[:, 1::3], "head").tanh()
    assert_close(model(trajectory)[0], model.middle + model.reach * y, torch.float64)


def test_decision_s4_reads_one_token_per_step():
    model, trajectory = make_model("s4"), make_trajectory(2, 6)
    previous = trajectory.previous_actions.clone()
    previous[:, 0] = 0
    parts = [
        model.action(previous),
        model.return_to_go(trajectory.returns_to_go[..., None] / 1000),
        model.observation((trajectory.observations - model.mean) / (model.std + 1e-6)),
    ]
    hidden, _ = model.backbone(model.join(torch.cat([part.tanh() for part in parts], -1)))
    expected = model.middle + model.reach * model.head(hidden).tanh()
    assert model.timestep is None
    assert_close(model(trajectory)[0], expected, torch.float64)


def test_actions_stay_within_the_bounds():
    model = make_model("mingru")
    torch.nn.init.normal_(model.head.weight, std=100)
    actions, _ = model(make_trajectory(8, 20))
    share = (actions - model.middle).abs() / model.reach
    assert (share <= 1).all() and (share.amax((0, 1)) > 0.99).all()


def test_no_rounding_takes_an_action_out_of_bounds():
    random = np.random.default_rng(0)
    low, high = np.sort(random.normal(size=(2, 10_000)) * np.exp(2 * random.normal(size=10_000)), 0).astype(np.float32)
    model = offline_toys.make_model(actions=len(low))
    model.set_scales(Scales(np.zeros(4), np.ones(4), low, high))
    reached = [(model.middle + model.reach).numpy(), (model.middle - model.reach).numpy()]
    assert (reached[0] <= high).all() and (reached[1] >= low).all()
    assert (np.abs(np.subtract(reached, [high, low])) <= 1e-6 * np.abs([high, low]).max(0)).all()


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_times_beyond_the_table_are_its_last(mixer):
    model, trajectory = make_model(mixer), make_trajectory(2, 4)
    late = trajectory._replace(timesteps=torch.full((2, 4), 10_000))
    last = trajectory._replace(timesteps=torch.full((2, 4), 9))
    assert torch.equal(model(late)[0], model(last)[0])


@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - SYSTEMS.keys()))
def test_any_mixer_fits_the_shell(mixer):
    shell = {name: usual(mixer)[name] for name in ("conv", "mlp", "mlp_kind", "norm")}
    torch.manual_seed(0)
    config = DecisionConfig(SIZE, A, BackboneConfig(8, 1, mixer, **shell, dropout=0.0), max_timestep=9)
    model, trajectory = DecisionModel(config).double().eval(), make_trajectory(2, 6)
    whole, _ = model(trajectory)
    state, steps = None, []
    for t in range(6):
        action, state = model(Trajectory(*(each[:, t : t + 1] for each in trajectory)), state)
        steps.append(action)
    assert_close(torch.cat(steps, 1), whole, torch.float64)


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_a_state_grows_only_where_it_is_said_to(mixer):
    model, trajectory = make_model(mixer), make_trajectory(1, 3)
    sizes = []
    for time in (1, 3):
        _, state = model(Trajectory(*(each[:, :time] for each in trajectory)))
        _, state = model(Trajectory(*(each[:, :1] for each in trajectory)), state)
        found = []
        tree_map(lambda each, found=found: found.append(each.shape) if isinstance(each, torch.Tensor) else None, state)
        sizes.append(found)
    assert (sizes[0] == sizes[1]) == model.constant_state == (mixer != "attention")


def test_files_give_the_same_model(tmp_path):
    model, trajectory = make_model("mamba", torch.float32), make_trajectory(1, 4)
    save(model, tmp_path)
    again = load_model(tmp_path, DecisionModel)
    assert again.config == model.config and not again.training
    assert torch.equal(again(trajectory)[0], model(trajectory)[0])
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "action_size": A + 1}))
    with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of config\.json"):
        load_model(tmp_path, DecisionModel)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("returns_to_go", torch.zeros(2, 4), r"returns_to_go must be \(B, T\) = \(2, 3\), got \(2, 4\)"),
        (
            "observations",
            torch.zeros(2, 3, SIZE + 1),
            r"observations must be \(B, T, O\) = \(2, 3, 5\), got \(2, 3, 6\)",
        ),
        ("previous_actions", torch.zeros(2, 3), r"previous_actions must be \(B, T, A\) = \(2, 3, 2\), got \(2, 3\)"),
        ("timesteps", torch.zeros(2, 3), "timesteps must be int64, got torch.float32"),
        ("timesteps", torch.zeros(2), r"timesteps must be \(B, T\)"),
        ("observations", np.zeros((2, 3, SIZE)), "observations must be a torch.Tensor, got ndarray"),
    ],
)
def test_a_call_says_what_it_wants(field, value, wanted):
    with pytest.raises((ValueError, TypeError), match=f"DecisionModel: {wanted}"):
        make_model("mingru")(make_trajectory(2, 3)._replace(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("layout", "both", "layout must be one of"),
        ("context", 0, "context must be at least 1, got 0"),
        ("return_scale", 0.0, "return_scale must be above 0 and finite"),
        ("action_size", -1, "action_size must be at least 1"),
    ],
)
def test_the_config_is_checked(field, value, wanted):
    with pytest.raises(ValueError, match=f"DecisionConfig: {wanted}"):
        DecisionConfig(**{"observation_size": SIZE, "action_size": A, field: value})


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_published_settings_make_a_run(mixer):
    """Every key belongs to a run; sizes and rates are those of the published code, and no text model's."""
    assert RunConfig.from_dict({"task": "offline", "data": "x.hdf5", "mixer": mixer}).train.lr == 1e-3
    for dataset, width, rate in (
        ("hopper-medium", 256, 1e-4),
        ("hopper-medium-expert", 128, 1e-3),
        ("walker2d-medium", 128, 1e-4),
        ("walker2d-medium-replay", 128, 1e-3),
        ("halfcheetah-medium", 128, 1e-3),
    ):
        table = published(mixer, dataset)
        config = RunConfig.from_dict({"task": "offline", "data": "x.hdf5", **table})
        assert isinstance(config.task, OfflineConfig) and config.backbone.mixer == mixer
        assert (config.train.steps, config.train.warmup, config.train.clip) == (100_000, 10_000, 0.25)
        assert (config.task.context, config.task.batch_size) == (PUBLISHED["context"], 64)
        if mixer in ("mingru", "minlstm", "mamba"):
            assert (config.backbone.width, config.train.lr) == (width, rate)
        else:
            assert (config.backbone.width, config.train.lr) == (96 if mixer == "s4" else 128, 1e-4)
