"""Named random generators: the same seed and name give the same numbers, whatever ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *names: object) -> int:
    """Return a 63-bit seed derived from `seed` and any names, independent for different names.

    Hashing keeps neighbouring seeds and tensors of one shape from sharing noise.

    Example:
        >>> derive(0, "a") != derive(1, "a") != derive(0, "b")
        True
    """
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh `torch.Generator` for this seed and name; the global state is not touched.

    Example:
        >>> a, b = generator(0, "mask"), generator(0, "mask")
        >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
        True
    """
    made = torch.Generator(device=device)
    made.manual_seed(derive(seed, *names))
    return made


@contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """Let what draws from the global generators, as new modules do, draw the numbers of this seed and name.

    The generators' states come back, those of GPUs too where these are in use; elsewhere they are not touched.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0, "layer"):
        ...     one = torch.nn.Linear(2, 1)
        >>> with seeded(0, "layer"):
        ...     same = torch.nn.Linear(2, 1)
        >>> torch.equal(one.weight, same.weight), torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    sow = torch.manual_seed if devices else torch.default_generator.manual_seed
    with torch.random.fork_rng(devices=devices):
        sow(derive(seed, *names))
        yield
