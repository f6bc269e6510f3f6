"""H-Neurons: the few FFN neurons whose share of the output predicts a made-up answer, turned down."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.ranges import above, least
from neurograft.pipeline.recipe import Recipe


@method(
    paper="h-neurons",
    kinds={"neuron"},
    needs={"contrast"},
    task="text-generation",
    departs="Rows come with their answers: sampling ten answers a question and keeping the consistent ones is left to "
    "the user. The FFN's output in a share's denominator is the sum of what its neurons write, without a bias of the "
    "down projection. L1 runs liblinear on a working set of columns, which ends where the whole problem's conditions "
    "hold. Where no weight is positive the largest one is taken. How far the found neurons moved from a base to its "
    "chat model is `locators.change`.",
)
def h_neurons(
    *, C: float = 1.0, others: bool = True, alpha: float = 0.0, iterations: int = 1000, memory: float = 8.0
) -> Recipe:
    """Find hallucination neurons by an L1 probe on shares of the FFN's output, and scale them by alpha.

    c_jt = |a_jt| * ||W_d[:, j]|| / (||FFN output_t|| + 1e-8), averaged over the answer's tokens; logistic regression
    over the neurons of all layers side by side; H-neurons are those with a positive weight. Scaling the input of the
    down projection is scaling its columns, so the graft is a weight change.

    Args:
        C: weight of the data in the L1 probe; larger keeps more neurons.
        others: 3-vs-1: the tokens outside of the answers count as negatives, so that the probe cannot key on being an
            answer token; False is the 1-vs-1 detector.
        alpha: what the neurons' activations are multiplied with: 0 silences them, 1 is the base, more strengthens.
        iterations: of liblinear.
        memory: GiB that the probe's table may take, 4 * examples * neurons bytes.

    The data are rows with `positive` (prompt and the wrong answer) and `negative` (prompt and a right answer).
    """
    above(C=(C, 0))
    least(iterations=(iterations, 1))
    options = {"fit": "l1", "scope": "all", "pool": "answer", "statistic": "cett", "score": "weight", "C": C}
    options |= {"others": others, "epochs": iterations, "memory": memory}
    return Recipe(
        "h_neurons",
        (
            {"do": "locate", "by": ("probe", options), "units": "neuron"},
            {"do": "select", "by": ("threshold", {"above": 0.0, "least": 1})},
            {"do": "intervene", "kind": "scale", "factor": alpha, "ship": "weights"},
        ),
        paper="h-neurons",
    )
