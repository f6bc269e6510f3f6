"""From a choice of optimizer to one that holds a mount's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from neurograft.core.choose import Chosen, check_options, choose, methods
from neurograft.core.compact.moments import carried
from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError, near
from neurograft.core.overlap import shared
from neurograft.core.region import Region

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def named() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers of `torch.optim` by name.

    Example:
        >>> named()["AdamW"].__name__
        'AdamW'
    """
    found = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c)}
    return {n: c for n, c in found.items() if issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer}


def chosen(choice: Any) -> Chosen:
    """Resolve a choice: a class of `torch.optim` by name, a method of `optimizers`, or a callable (groups, **options).

    Raises:
        RequestError: an unknown name or option, with the near matches.

    Example:
        >>> chosen(("sgd", {"momentum": 0.9})).name
        'torch.optim.SGD'
    """
    options: dict[str, Any] = {}
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        choice, options = choice[0], dict(choice[1])
    if not isinstance(choice, str) or "." in choice:
        return choose("optimizers", choice, **options)
    known = {n.lower(): n for n in named()}
    if choice.lower() in known:
        name = known[choice.lower()]
        found = Chosen(named()[name], options, f"torch.optim.{name}")
        check_options(found.function, options, name)
        return found
    if choice in methods("optimizers"):
        return choose("optimizers", choice, **options)
    raise RequestError(
        f"optimizer {choice!r}",
        expected="an optimizer of torch.optim or of neurograft.optimizers",
        do=near(choice, [*named(), *methods("optimizers")]),
    )


def forward_only(choice: Chosen | None) -> bool:
    """Say whether a choice moves without gradients, by what its card claims."""
    return choice is not None and "forward_only" in choice.card.claims


def built(
    choice: Chosen, groups: list[dict[str, Any]], *, lr: float | None = None, seed: int | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer on parameter groups.

    Args:
        choice: from `chosen`.
        groups: parameter groups; their `weight_decay` holds for optimizers that know decay, and raises otherwise.
        lr: learning rate, if the choice's options name none.
        seed: for choices that draw random numbers, if their options name none.

    Raises:
        RequestError: a weight decay for an optimizer without one.
    """
    options = dict(choice.options)
    parameters = inspect.signature(choice.function).parameters
    takes = set(parameters) if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else None
    if lr is not None and (takes is None or "lr" in takes):
        options.setdefault("lr", lr)
    if seed is not None and "seed" in parameters:
        options.setdefault("seed", seed)
    if takes is not None and "weight_decay" not in takes:
        if any(g.get("weight_decay") for g in groups):
            raise RequestError(
                f"a weight decay for {choice.name}", expected="an optimizer that knows it", do="set weight_decay=0"
            )
        groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
    elif "weight_decay" in options:
        groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
    if choice.name == "torch.optim.LBFGS":
        groups = [p for g in groups for p in g["params"]]
    try:
        made: torch.optim.Optimizer = choice.function(groups, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{choice.name} with {', '.join(f'{k}={v!r}' for k, v in options.items()) or 'no option'} ({error})",
            expected="options that this optimizer takes",
            do="change them",
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise RequestError(
            f"{choice.name}, which returned a {type(made).__name__}",
            expected="a callable (groups, **options) -> torch.optim.Optimizer",
            do="name an optimizer of torch.optim or of neurograft.optimizers",
        )
    return made


def groups_of(
    parameters: Mapping[str, nn.Parameter], *, decay: Iterable[str] = (), weight_decay: float = 0.0, apart: bool = False
) -> list[dict[str, Any]]:
    """Return parameter groups: with and without weight decay, or one for each tensor.

    Args:
        parameters: trainable tensors by name.
        decay: names that decay.
        weight_decay: how strongly.
        apart: one group per tensor, so that a schedule can give each its learning rate; `name` says which.
    """
    decays = set(decay)
    if apart:
        return [
            {"params": [p], "weight_decay": weight_decay if n in decays else 0.0, "name": n}
            for n, p in parameters.items()
        ]
    split = [([p for n, p in parameters.items() if (n in decays) is yes], yes) for yes in (True, False)]
    return [{"params": ps, "weight_decay": weight_decay if yes else 0.0} for ps, yes in split if ps]


def carry(
    optimizer: Any,
    scheduler: Any,
    mount: Mount,
    old: Mapping[str, nn.Parameter],
    regions: Mapping[str, Region],
    *,
    keep: bool,
) -> None:
    """Let an optimizer with one group per tensor go on with the tensors a mount turned to.

    Args:
        optimizer: its groups carry names.
        scheduler: its base rates follow the groups, or None.
        mount: holds the new tensors.
        old: the tensors from before.
        regions: their entries.
        keep: entries that stay keep their moments; new ones begin at zero beside them. Otherwise all begin anew.
    """
    groups = {g["name"]: g for g in optimizer.param_groups}
    usual = optimizer.param_groups[0]
    weight_decay = max(g.get("weight_decay", 0.0) for g in groups.values())
    decays = set(decaying(mount.model, mount))
    now, made = mount.regions(), []  # type: ignore[attr-defined]
    for name, theta in mount.named_parameters().items():
        group = dict(groups.get(name, usual), params=[theta], name=name)
        if "weight_decay" in group and name not in groups:
            group["weight_decay"] = weight_decay if name in decays else 0.0
        made.append(group)
        if keep and name in old and old[name] in optimizer.state:
            inside, there = (i.to(theta.device) for i in shared(now[name], regions[name]))
            optimizer.state[theta] = carried(optimizer.state[old[name]], old[name], theta, inside, there)
    for theta in old.values():
        optimizer.state.pop(theta, None)
    optimizer.param_groups[:] = made
    for rates in ("base_lrs", "lr_lambdas"):
        if hasattr(scheduler, rates):
            setattr(scheduler, rates, [getattr(scheduler, rates)[0]] * len(made))


def decaying(model: nn.Module, mount: Mount) -> list[str]:
    """Return the names of a mount's tensors that weight decay acts on: not norms, not biases."""
    plain = []
    for name in mount.named_parameters():
        lower = name.lower()
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
        if "bias" in lower or "norm" in lower or isinstance(module, torch.nn.LayerNorm):
            continue
        plain.append(name)
    return plain
