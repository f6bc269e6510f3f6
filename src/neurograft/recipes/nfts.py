"""NFTS: which units to tune and which to adapt, searched for over the paths of a supernet of few-shot episodes."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe


@method(
    paper="nfts",
    kinds={"layer", "channel"},
    needs={"groups"},
    departs="The published code tells the kept paths apart by support accuracy, lets each begin where the one before "
    "it ended, measures the distance between paths by their bits to the last one kept only, and ties the ViT's prefix "
    "to the tuning bit; here as the paper says: support loss, each from the supernet, cosine to every one kept, prefix "
    "with the adapter. A prefix is learned keys and values, not made from the episode's prototypes by a network, and "
    "without its distillation loss; the published feature alignment behind the backbone is not "
    "here. The residual 1 x 1 convolution is the middle of the kernel, starting at 0. "
    "Batch norms keep their statistics, episodes have fixed numbers of classes and examples, and the search looks at "
    "the same episodes for every path.",
)
def nfts(
    *,
    task: str | None = None,
    ways: int = 5,
    shots: int = 5,
    queries: int = 16,
    episodes_to_train: int = 50_000,
    episodes_to_search: int = 100,
    population: int = 64,
    top: int = 8,
    mutation: float = 0.05,
    generations: int = 15,
    count: int = 3,
    apart: float | None = None,
    steps: int = 40,
    steps_at_test: int = 20,
    optimizer: str | None = None,
    lr: tuple[float, float] | None = None,
    decay: float = 0.01,
    prefix: int = 1,
) -> Recipe:
    """Search which convolutions of a ResNet, or blocks of a ViT, are tuned and which get an adapter, and tune these.

    The data are rows with `image`, `label` and `group`: every group a domain, one of them the task to adapt to. The
    graft changes the backbone; a class is then the mean of its examples' features.

    Args:
        task: the group to adapt to; the last if None.
        ways: classes in an episode.
        shots: examples of each in its support.
        queries: examples of each in its query.
        episodes_to_train: steps of the supernet.
        episodes_to_search: episodes a path's fitness is the mean over.
        population: paths to begin with.
        top: paths that breed.
        mutation: chance that a bit flips.
        generations: rounds of breeding.
        count: N, paths fine-tuned on the task, of which the one with the lowest support loss is kept.
        apart: T, their least cosine distance; 0.4 for a ResNet, 0.2 for a ViT if None.
        steps: of fine-tuning in the search.
        steps_at_test: of fine-tuning on the task.
        optimizer: "Adadelta", "Adam", "AdamW" or "SGD"; the first for a ResNet, "AdamW" for a ViT if None.
        lr: of training, and of fine-tuning; (0.05, 0.1) and (7e-5, 3e-6) if None.
        decay: weight decay.
        prefix: tokens of a block's prefix.
    """
    options = {**locals()}
    return Recipe("nfts", ({"do": "neurograft.pipeline.path_search", **options},), paper="nfts")
