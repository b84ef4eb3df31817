"""The experiments of the paper: which cells each has, at which scale, and in what that differs from the paper.

smoke proves that everything runs, in minutes; laptop shows the effects on two cores; paper is the published setting, as
far as it is known.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from minrnn.reproduce import cells_rl, cells_timing, cells_training
from minrnn.reproduce.cells import SCALES, Cell, Scale


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Args:
        title: what it is.
        source: the paper's table or figure.
        question: what it is to show.
        metric: what a cell's result is judged by: accuracy, held_out (nats), return or seconds.
        changed: for each scale, in what it differs from the paper's setting, and why.
        cells: those of a scale.
        baseline: the system that the table sets all others against, if there is one.
        along: what is compared in words: the systems of a column, or the columns of a system.
    """

    title: str
    source: str
    question: str
    metric: str
    changed: Mapping[Scale, tuple[str, ...]]
    cells: Callable[[Scale], Iterable[Cell]]
    baseline: str = ""
    along: Literal["systems", "columns"] = "systems"


def cells(names: Iterable[str], scale: Scale, systems: Iterable[str] = ()) -> list[Cell]:
    """The cells of some experiments, of some systems if any are named.

    Raises:
        ValueError: no experiment, system or scale has this name.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    names, systems = list(dict.fromkeys(names)), list(systems)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"experiments must be of {', '.join(EXPERIMENTS)}, got {unknown[0]!r}")
    found = [cell for name in names for cell in EXPERIMENTS[name].cells(scale)]
    known = list(dict.fromkeys(cell.system for cell in found))
    if unknown := [system for system in systems if system not in known]:
        raise ValueError(f"systems must be of {'; '.join(known)}, got {unknown[0]!r}")
    return [cell for cell in found if not systems or cell.system in systems]


# In what a scale differs from the paper, and why.
_SMOKE = ("sizes and steps that only show that everything runs",)
# The released code has selective copying and the formal languages, of the minimal RNNs alone.
_OURS = "the minimal RNNs have LayerNorm without bias, not RMSNorm, and begin from zeros, not from a learned state"
_INSIDE = (
    "weight decay acts on the matrices of linear maps, in the released code on all but those of gates and candidates; "
    "the embedding begins with a standard deviation of 0.3, in the released code probably of 1"
)
_EITHER = (
    _INSIDE,
    "the last training step is evaluated; the paper's text tells of early stopping in selective copying",
)
_SHORTER = "64 positions and 8 tokens instead of 4,096 and 16, 2,000 steps instead of 400,000: what two cores can train"
_FASTER = (
    "learning rate 3e-3 with a warm-up and a cosine instead of a constant 1e-4 (the paper's text) or 3e-4 (its code), "
    "weight decay 0.1 instead of 0.05, beta2 0.99 instead of 0.999: two hundred times fewer steps"
)
_OWN_MAMBA = "Mamba is minrnn's, not its authors' kernels for GPUs"
_ON_CORES = "processor cores instead of {}, and fewer rounds of what is slow, but at least 3"
_OWN_KERNELS = (
    "MinGRU and MinLSTM are fused kernels, in C or, on a GPU, in Triton; the paper's are ordinary PyTorch operations"
)
_WIDTHS = (
    "one layer of 16 and of 64 channels, float32: the paper's sizes are not known; by the bytes that a T4 can move, "
    "its times hold for about 15 channels at most"
)
_UNEQUAL = (
    "{}; Mamba is its authors' whole block, of twice the width, with a convolution and projections: part of what lies "
    "between them"
)
_LAYERS = _UNEQUAL.format("MinGRU and MinLSTM are the layers alone, as nn.GRU and nn.LSTM are")
_TRAINING_STEPS = (
    _OWN_KERNELS,
    "minGRU-pytorch, another package's minGRU, stands for the paper's: it, too, is made of ordinary PyTorch "
    "operations, each of which keeps its result for backward, and in log space, as the paper trains (whether figure 1 "
    "was timed so is not known)",
    "the library's nn.LSTM and nn.GRU stand beside the step loops; all systems take turns, round by round",
    "no loss: backward begins from a gradient of the output, which is the same for all systems",
    _LAYERS,
    _OWN_MAMBA,
)
_MIXERS = _UNEQUAL.format("minGRU and minLSTM are as wide as the model, without a convolution, as GRU and LSTM are")
_CONTEXT = (
    "the context, read at once, and one token after it are timed apart",
    "the Transformer (attention with rotary positions, no MLP) is not in the paper; each token copies its whole cache",
)
_SIZES = "{}: the paper's sizes are not known; around each mixer only a norm and a residual connection"
_RATES = (
    "the paper's text has Adam at a constant 1e-4, its code AdamW at 3e-4 with weight decay 0.05: the code's is taken"
)
_ALL_TRAINED = (
    "all systems trained alike, GRU and LSTM too; the paper quotes the others from Mamba's comparison, of 2 layers",
    "as in the paper, the minimal RNNs have 3 layers of 6 widths and Mamba's comparison 2: weights differ, see the "
    "table",
)
_LM = (
    "weights, norm and MLP of the paper's are not known: LayerNorm without bias, sequences that begin from zeros, "
    "an MLP of 4 widths with GELU as in nanoGPT (the released code, which has no language model, has RMSNorm, a "
    "learned state, and GEGLU of 2 widths); systems of one width differ in weights, as the table shows",
    "context of 256, warm-up, cosine, weight decay 0.1 and beta2 0.99 as in nanoGPT's recipe, but that the cosine ends "
    "at zero instead of at a tenth of the rate; the paper names none",
    "bfloat16 arithmetic where torch has kernels for it; training ends when the held-out loss has found no new minimum "
    "for 500 steps",
    "the held-out loss is of every character that is held out, in windows from zero state",
    "the embedding begins with a standard deviation of 0.3, in nanoGPT with one of 0.02",
    "Mamba without an MLP, as its authors have it, so that dropout, which acts on MLPs, does nothing to it",
    "the paper's Transformer is taken to have learned positions, as nanoGPT's; beside it one with rotary positions, "
    "which learns in fewer steps",
)
_RECIPES = (
    "an MLP of 3.5 widths: 6.3 M weights at width 384",
    "beside the cosine of lm a short one that ends before the model overfits; to that, one change at a time",
    "the preset shakespeare-best has twice the rate and more dropout; its dropout is meant for width 384 and 10 passes "
    "over the text, of which laptop scale, with a ninth of the weights and 6 passes, tells nothing",
    "recipes and the step are chosen by the loss on the same held-out text that is reported, which flatters it; no "
    "other system has been tuned so",
)
_FORMAL = (
    "one learning rate for all systems and languages, gradients clipped to a norm of 1; xLSTM as mLSTM blocks alone, "
    "xLSTM[1:0]",
    "systems of one width differ up to threefold in weights, as the table shows: the minimal RNNs, without expansion "
    "and MLP, have the fewest",
    "without convolution: the setting of a copy of the released code, which may have been edited; it also has half the "
    "batch, a weight decay of 0.05 instead of 0.01, and clips no gradients, which is done here",
    "words of one length in a batch, as in the paper's code: all systems answer the same words, of few lengths, and by "
    "which lengths they are is not in the errors by which systems are told apart; accuracy is of single symbols",
    "width 256 is that of a copy of the released code; the paper's is not known",
    _INSIDE,
)
_ACTING = (
    "5 % of the episodes are held out, for the curve of the loss; windows at the ends of episodes are padded after "
    "them and masked, none is padded when acting",
    "Gymnasium's environments of version 5 instead of 3",
    "the last training step is evaluated, at one target return",
    "weight decay acts on the matrices of linear maps alone; norms have no bias; no dropout on the embedded tokens",
    "Decision S4 learns and acts in windows of 20 steps, as all others, where its authors have it read whole episodes "
    "and carry its state on when it acts (here: streaming)",
)
_LISTOPS = (
    "lists are generated, not read from the published files",
    "no expansion, no dropout, an MLP of 4 widths with GELU (the released code, which has no ListOps, has GEGLU of 2), "
    "gradients clipped to a norm of 1: the paper's are not known",
)


EXPERIMENTS: dict[str, Experiment] = {
    "speed": Experiment(
        "Time and memory of a training step against length",
        "Figure 1",
        "How much faster do minGRU and minLSTM train than GRU and LSTM, as step loops and as the library has them?",
        "seconds",
        {
            "smoke": _SMOKE,
            "laptop": (_WIDTHS, _ON_CORES.format("a T4 GPU"), *_TRAINING_STEPS),
            "paper": (_WIDTHS, *_TRAINING_STEPS),
        },
        cells_timing.speed,
    ),
    "inference": Experiment(
        "Time to read a context, and of one token after it",
        "Figures 3 and 4",
        "How long does a trained model take to read a context, and to go on from it?",
        "seconds",
        {
            "smoke": _SMOKE,
            "laptop": (
                _SIZES.format("3 layers of 128 channels"),
                _ON_CORES.format("GPUs"),
                *_CONTEXT,
                "the Transformer ends at 16,384, in batches above 8 at 4,096: the next context would take it minutes",
                _MIXERS,
                _OWN_KERNELS,
                _OWN_MAMBA,
            ),
            "paper": (_SIZES.format("3 layers of 384 channels"), *_CONTEXT, _MIXERS, _OWN_KERNELS, _OWN_MAMBA),
        },
        cells_timing.inference,
    ),
    "layers": Experiment(
        "Selective copying with one, two and three layers",
        "Table 1",
        "Gates that do not see the state depend on the present token alone; a second layer's depend on the past too. "
        "What do more layers do to accuracy, and to its spread over seeds?",
        "accuracy",
        {
            "smoke": _SMOKE,
            "laptop": (_SHORTER, _FASTER, _OURS, *_EITHER),
            "paper": (
                _RATES,
                "the text's learning rate beside it, still with the code's AdamW and weight decay, with one seed",
                *_EITHER,
            ),
        },
        cells_training.layers,
        along="columns",
    ),
    "copying": Experiment(
        "Selective copying, against other systems",
        "Table 2",
        "Which systems can choose, by what a token is, what to remember?",
        "accuracy",
        {
            "smoke": _SMOKE,
            "laptop": (
                _SHORTER,
                _FASTER,
                "the learning rate was chosen on minGRU; whom it does not suit is to be seen at a third and at three "
                "times of it, with one seed; at three times of it the paper's systems at 256 positions, too",
                *_ALL_TRAINED,
                _OURS,
                *_EITHER,
            ),
            "paper": (_RATES, "one learning rate for all", *_ALL_TRAINED, *_EITHER),
        },
        cells_training.copying,
    ),
    "lm": Experiment(
        "Language modelling of Shakespeare's plays by characters",
        "Figure 2",
        "How low does the held-out loss get, and after how many steps?",
        "held_out",
        {
            "smoke": _SMOKE,
            "laptop": (
                "width 128, batches of 16, a cosine of 2,000 steps, 4 heads instead of 6, the held-out loss every 100 "
                "steps instead of 25: minutes on two cores; learning rate 3e-3, which suits minGRU, and 1e-3",
                *_LM,
            ),
            "paper": _LM,
        },
        cells_training.lm,
    ),
    "best": Experiment(
        "Shakespeare's plays beyond the paper: minGRU by other recipes",
        "beyond Figure 2",
        "How low can the held-out loss of a minGRU get, with at most 6.3 M weights, and by what?",
        "held_out",
        {
            "smoke": _SMOKE,
            "laptop": (
                "width 128, batches of 16, learning rate 3e-3, a short cosine of 1,500 steps: what two cores can train "
                "in minutes; 3 seeds of two recipes, to see how much chance does",
                *_RECIPES,
            ),
            "paper": ("a short cosine of 600 steps", *_RECIPES),
        },
        cells_training.best,
        "short cosine",
    ),
    "formal": Experiment(
        "Formal languages: trained on words of up to 40 symbols, evaluated on 40 to 256",
        "Tables 4 and 5",
        "Which regularities does each system generalise to longer words?",
        "accuracy",
        {
            "smoke": _SMOKE,
            "laptop": (
                "width 64, batches of 64, 1,500 steps at 2e-3 with a warm-up and a cosine, beta2 0.99, evaluated on 20 "
                "batches, instead of width 256, batches of 256, 500,000 steps at 3e-4, beta2 0.999, evaluated on 200: "
                "what two cores can train",
                _OURS,
                *_FORMAL,
            ),
            "paper": _FORMAL,
        },
        cells_training.formal,
    ),
    "listops": Experiment(
        "ListOps, with and without convolution and MLP",
        "Tables 4 and 6",
        "What do a convolution before the recurrence and an MLP after it add?",
        "accuracy",
        {
            "smoke": _SMOKE,
            "laptop": (
                "lists of 20 to 120 tokens (half of them have at most 30), 5 levels and 5 arguments instead of 500 to "
                "2,000, 10 and 10; 3 layers of 64 channels instead of 8 of 128; 3,000 steps at 2e-3 in batches of 64 "
                "instead of 250,000 at 1e-3 in batches of 32; beta2 0.99 instead of 0.999: what two cores can train",
                _OURS,
                *_LISTOPS,
            ),
            "paper": _LISTOPS,
        },
        cells_training.listops,
        along="columns",
    ),
    "rl": Experiment(
        "Offline reinforcement learning: acting from logged episodes",
        "Table 3",
        "How well does a model act that has only read what others did, and how long does it take?",
        "return",
        {
            "smoke": _SMOKE,
            "laptop": (
                "our own data, of policies trained by PPO to about a third of D4RL's expert score (medium) and of "
                "their snapshots on the way (medium-replay); no medium-expert, which would need an expert",
                "these policies explored by noise, which the models do without: to be at least as good as the policy "
                "behind the data is to be as good as its mean action, which has a row of its own",
                "2,000 steps at 1e-3 with a cosine, width 128, instead of 100,000 at 1e-3 or 1e-4, width 128 or 256; 2 "
                "seeds on Hopper and 1 elsewhere instead of 5; 10 episodes instead of 100; the highest return of the "
                "data is asked for: what two cores can do in hours",
                *_ACTING,
            ),
            "paper": _ACTING,
        },
        cells_rl.rl,
    ),
}
