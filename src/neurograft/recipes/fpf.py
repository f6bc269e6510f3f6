"""FPF: after a sequence of tasks, the few modules that change from task to task are tuned on a small buffer."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="fpf",
    kinds={"module"},
    task="text-generation",
    departs="The sensitivity score and the schedule's constants could not be read: modules are ranked by their change "
    "between tasks, learned by plain SGD from consecutive parts of the data, and the defaults are ours. k-FPF is the "
    "schedule `repair` with `data.reservoir` in the plain loop, and k-FPF-KD the objective `remembered` there. Batch "
    "statistics never update: they belong to the base.",
)
def fpf(
    *,
    modules: int = 2,
    tasks: int = 2,
    rehearse: int = 2,
    lr: float = 0.02,
    epochs: float = 5.0,
    batch: int = 16,
    warmup: float = 0.0,
) -> Recipe:
    """Tune the modules with the largest change between tasks on the buffer, by SGD; all else stays.

    The model has learned its tasks by any method, and the data are the buffer in the order of the tasks
    (`neurograft.data.reservoir` keeps one).

    Args:
        modules: how many train.
        tasks: consecutive parts of the data that count as tasks when the change is measured.
        rehearse: passes over each part for that.
        lr: learning rate of SGD, there and here.
        epochs: passes over the buffer.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    by = ("drift", {"tasks": tasks, "epochs": rehearse, "lr": lr, "batch_size": batch})
    return Recipe(
        "fpf",
        (
            {"do": "locate", "by": by, "units": "module", "batch_size": batch},
            {"do": "select", "by": "top", "count": modules},
            {
                "do": "tune",
                "adapter": "dense",
                "optimizer": "SGD",
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="constant"),
            },
        ),
        paper="fpf",
    )
