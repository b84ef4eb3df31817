"""The numbers of the paper, "Were RNNs All We Needed?" (arXiv 2410.01201), and how sure each is.

Systems and columns are named as in `experiments`, and as in `minrnn.bench.systems` where time is measured. Accuracies
are in %, losses in nats per character, times in milliseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

URL = "https://arxiv.org/abs/2410.01201"

ARTICLE = "quoted by a news article on the paper and by a translation of it"
NAMED = "quoted by a news article on the paper; which system each belongs to is from a translation or a summary"
SUMMARY = "from a summary of the paper; digits may be garbled"
TRANSLATION = "from a translation of the paper; digits may be garbled"
MEMORY = "written from memory, not checked against the paper"
CHECKED = "written from memory, not checked against the paper; the table's averages, from memory too, agree"
PEER = "the paper's minGRU again, beside another package's"
EITHER = "the paper's minLSTM again: it is not known which of its forms and settings produced it"


@dataclass(frozen=True)
class Number:
    """A number of the paper.

    Args:
        value: in the unit of its experiment's table.
        deviation: the standard deviation over seeds, if the paper has one.
        step: the training step it belongs to, if the paper says so.
        source: the table or figure.
        sure: how it is known.
        scaled: so that chance is 0, to be set against an accuracy that is scaled as well.
    """

    value: float
    deviation: float | None = None
    step: int | None = None
    source: str = ""
    sure: str = ""
    scaled: bool = False


Key = tuple[str, str]  # system, column


def _table(
    source: str, sure: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | tuple[float, float]]]
) -> dict[Key, Number]:
    """The rows of a table; each number stands alone or with its deviation."""
    table = {}
    for system, numbers in rows.items():
        for column, number in zip(columns, numbers, strict=True):
            value, deviation = number if isinstance(number, tuple) else (number, None)
            table[system, column] = Number(value, deviation, source=source, sure=sure)
    return table


_MINLSTM = (37.6, 2.0), (85.7, 5.8), (96.0, 2.8)
_MINLSTM_FORMAL = 94, 26, 79, 100, 93, 47
_MINLSTM_LISTOPS = 46, 45, 52, 59
_LAYERS = "1 layer", "2 layers", "3 layers"
_AROUND = "plain", "conv", "MLP", "conv + MLP"
_LANGUAGES = "bucket_sort", "missing_duplicate", "cycle_navigation", "even_pairs", "majority", "majority_count"
# fmt: off
_SUMMARIZED: dict[str, Sequence[float | tuple[float, float]]] = {
    "S4": [18.3], "H3 with S6": [99.7], "Mamba with Hyena": [28.4], "Mamba with S6": [99.8],
    "minGRU": [(99.5, 0.2)], "minLSTM": [(96.0, 2.8)],
}
_REMEMBERED = {"S4 with S6": [97.0], "H3 with Hyena": [30.1], "H3 with S4": [57.0], "Mamba with S4": [56.4]}
_SCALED = {
    "Transformer": [92, 8, 4, 100, 37, 13],
    "Mamba": [69, 15, 86, 100, 69, 45],
    "RWKV-4": [54, 21, 13, 100, 63, 13],
    "xLSTM": [97, 33, 86, 100, 74, 46],
}
_TIMES = {"MinLSTM": [2.97, 3.41], "MinGRU": [2.72, 3.25], "mamba": [2.71, 3.15]}
_SPEEDUPS = {"MinGRU over GRU-loop": [175, 1324], "MinLSTM over LSTM-loop": [235, 1361]}
_MEMORY = {"MinGRU over GRU-loop": [1.88], "MinLSTM over LSTM-loop": [1.88]}
_CONTEXT = {"MinGRU over mamba": [1.066, 1.041, 1.049, 1.029], "MinLSTM over mamba": [0.964, 0.971, 1.0, 0.987]}
_TOKEN_64 = {"MinGRU over GRU-loop": [1.196], "MinLSTM over LSTM-loop": [1.415]}
_DATA_SETS = [
    f"{name} {quality}" for quality in ("medium", "medium-replay", "medium-expert") for name in
    ("HalfCheetah", "Hopper", "Walker2d")
]
_RETURNS = {
    "Decision Transformer": [42.6, 68.4, 75.5, 37.0, 85.6, 71.2, 88.8, 109.6, 109.3],
    "Decision S4": [42.5, 54.2, 78.0, 15.2, 49.6, 69.0, 92.7, 110.8, 105.7],
    "DAaren": [42.2, 80.9, 74.4, 37.9, 77.9, 71.4, 75.7, 103.9, 110.5],
    "Decision Mamba": [42.8, 83.5, 78.2, 39.6, 82.6, 70.9, 91.9, 111.1, 108.3],
    "DminLSTM": [(42.7, 0.7), (85.0, 4.4), (72.0, 7.5), (38.6, 1.1), (88.5, 4.7), (69.7, 10.7), (85.4, 1.7),
                 (110.3, 1.6), (110.3, 0.5)],
    "DminGRU": [(43.0, 0.4), (79.4, 8.2), (73.3, 3.3), (38.5, 1.1), (90.5, 0.9), (72.8, 8.9), (86.3, 0.5),
                (109.7, 2.7), (110.3, 0.4)],
}
# fmt: on

_FIGURE_1 = (
    _table("Figure 1", NAMED, [f"time in ms at batch 64, length {length}" for length in (512, 4096)], _TIMES)
    | _table("Figure 1", NAMED, [f"speed-up at batch 64, length {length}" for length in (512, 4096)], _SPEEDUPS)
    | _table("Figure 1", ARTICLE, ["memory ratio at batch 64, length 4096"], _MEMORY)
    | _table("Figure 1", TRANSLATION, ["memory ratio at batch 64, length 4096"], {"MinGRU over mamba": [0.641]})
)

PUBLISHED: dict[str, dict[Key, Number]] = {
    "speed": _FIGURE_1
    | {
        (system.replace("MinGRU", "minGRU-pytorch"), column): replace(number, sure=f"{PEER}; {number.sure}")
        for (system, column), number in _FIGURE_1.items()
        if system in ("MinGRU", "MinGRU over GRU-loop")
    },
    "inference": _table(
        "Figures 3 and 4",
        TRANSLATION,
        [f"context speed-up at batch {batch}, length 2048" for batch in (8, 16, 32, 64)],
        _CONTEXT,
    )
    | _table("Figures 3 and 4", TRANSLATION, ["token speed-up at batch 64, length 2048"], _TOKEN_64),
    "layers": _table(
        "Table 1", SUMMARY, _LAYERS, {"minLSTM": _MINLSTM, "minGRU": [(37.0, 2.3), (96.8, 3.2), (99.5, 0.2)]}
    )
    | _table("Table 1", EITHER, _LAYERS, {"minLSTM unnormalized": _MINLSTM}),
    "copying": _table("Table 2", SUMMARY, ["minRNN's convention"], _SUMMARIZED)
    | _table("Table 2", MEMORY, ["minRNN's convention"], _REMEMBERED)
    | _table("Table 2", EITHER, ["minRNN's convention"], {"minLSTM unnormalized": _MINLSTM[2:]}),
    "lm": {
        ("minGRU", ""): Number(1.548, None, 575, "Figure 2", ARTICLE),
        ("minLSTM", ""): Number(1.555, None, 625, "Figure 2", ARTICLE),
        ("Mamba", ""): Number(1.575, None, 400, "Figure 2", ARTICLE),
        ("Transformer", ""): Number(1.547, None, None, "Figure 2", ARTICLE),
    },
    "best": {
        (recipe, ""): Number(1.548, None, 575, "Figure 2, minGRU", ARTICLE)
        for recipe in ("long cosine", "shakespeare-best")
    },
    "formal": {
        place: replace(number, scaled=True) for place, number in _table("Table 4", CHECKED, _LANGUAGES, _SCALED).items()
    }
    | _table("Table 4", CHECKED, _LANGUAGES, {"minLSTM": _MINLSTM_FORMAL})
    | _table("Table 4", EITHER, _LANGUAGES, {"minLSTM unnormalized": _MINLSTM_FORMAL})
    | _table(
        "Table 4",
        EITHER,
        [f"{language} without convolution" for language in _LANGUAGES],
        dict.fromkeys(("minLSTM", "minLSTM unnormalized"), _MINLSTM_FORMAL),
    ),
    "listops": _table("Table 6", MEMORY, _AROUND[:3], {"minLSTM": _MINLSTM_LISTOPS[:3]})
    | _table("Tables 4 and 6", CHECKED, _AROUND[3:], {"minLSTM": _MINLSTM_LISTOPS[3:]})
    | _table("Table 6", EITHER, _AROUND, {"minLSTM unnormalized": _MINLSTM_LISTOPS}),
    "rl": _table("Table 3", CHECKED, _DATA_SETS, _RETURNS),
}

# What must be known to read these numbers beside others.
NOTES: dict[str, tuple[str, ...]] = {
    "speed": (
        "On a T4 GPU; width, number of layers and precision are not known. GRU and LSTM were loops of steps in Python, "
        "not PyTorch's own.",
        "The paper's minGRU and minLSTM use about 88 % more memory than its GRU and LSTM, its Mamba 56 % more than "
        "minGRU; at which length is not known: they stand beside ours at 4,096. By the article the 88 % hold for Mamba "
        "too, by the translation they do not.",
    ),
    "inference": (
        "The paper has contexts of up to 2,048 tokens, and percentages. Of which context is not known: they stand "
        "beside ours at 2,048. Faster by 6.6 % is read as a speed-up of 1.066. Those over GRU and LSTM are taken for "
        "the time of a token, for with a context these are told to be much slower.",
    ),
    "layers": (
        "The paper's text divides minLSTM's gates by their sum; its released code does not, unless told to "
        "(here: minLSTM unnormalized, with its forget bias of 3). Both are measured.",
    ),
    "copying": ("The paper took all rows but minGRU and minLSTM from the Mamba paper. GRU and LSTM it left out.",),
    "lm": (
        "The step of the Transformer's lowest loss is told in ways that contradict each other: 2,000, 2,000 more than "
        "minGRU's, and 2.5 times as many.",
        "Width of the context, schedule and weight decay are not known.",
    ),
    "formal": (
        "The paper took all rows but minLSTM from the xLSTM paper: as far as is known, scaled accuracies (0 is chance, "
        "100 is perfect) on words from other generators. Beside them ours stand plain and, for the difference, scaled "
        "in the same way: 0 is a guess among all answers. (Of majority count the best constant answer is far above "
        "that.)",
        "Of words of 63 symbols and up to 40 places the most frequent symbol hardly ever occurs more than 5 times, of "
        "those that are evaluated mostly more often: by this generator majority count has answers that training hardly "
        "shows.",
        "Batches of 256, weight decay 0.01 and a convolution are the paper's text's; a copy of its code that may have "
        "been edited has 128, 0.05 and none. The minimal RNNs are measured in both settings.",
        "Transformer stands beside the paper's Llama, xLSTM beside its xLSTM[1:0]. minGRU and parity are not in the "
        "paper's table; Hyena is in its table 5, whose numbers are not known.",
    ),
    "best": ("The lowest loss in the paper's figure is its Transformer's, 1.547.",),
    "listops": ("minGRU is not in the paper's tables.",),
    "rl": (
        "D4RL's data come from MuJoCo environments of version 2, and the paper acts in version 3; Gymnasium's version "
        "5 gives other returns for the same policy.",
        "Which of several target returns the paper reports, and after how many steps, is not known. It took all rows "
        "but minGRU and minLSTM from other papers. The deviations are from memory, and nothing checks them.",
    ),
}

# CHECKED; accuracies, but in table 3, in %.
MISSING: tuple[str, ...] = (
    "Table 3, averages over the nine data sets: Decision Transformer 76.4, Decision S4 68.6, DAaren 75.0, Decision "
    "Mamba 78.8, DminLSTM 78.1, DminGRU 78.2 (D4RL's scores).",
    "Table 4, averages over all nine columns: Llama 48, Mamba 64, RWKV-4 51, xLSTM 71, minLSTM 73.",
    "Table 4, Retrieval, which needs a download: Llama 85, Mamba 90, RWKV-4 90, xLSTM 91, minLSTM 89.",
    "Table 4, G-Image, which needs a download: Llama 54, Mamba 69, RWKV-4 69, xLSTM 70, minLSTM 67.",
    "Table 4, ListOps by the systems that the paper quotes: Llama 38, Mamba 33, RWKV-4 39, xLSTM 41.",
    "Table 5, more systems on formal languages, of which Hyena is measured here, and Figure 5, minLSTM's forget bias: "
    "their numbers are not known.",
)
