"""Whether the Hub can be asked at all."""

from __future__ import annotations

from pathlib import Path


def cut_off(name: str, *, file: str = "config.json", kind: str = "model") -> bool:
    """Say whether nothing of a Hub id is in the cache and there is no connection to ask for it.

    The library asks five times more for a file that it does not have, half a minute in all, also where the machine
    has no network; so it is asked once here. Whatever else goes wrong is left for it to say.

    Args:
        name: a Hub id.
        file: a file that it should have.
        kind: "model" or "dataset".
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    known = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    if constants.HF_HUB_OFFLINE or known.exists():
        return False
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file, repo_type=kind))
    except Exception as error:  # its class is one of whichever library the Hub's speaks through
        return any(c.__name__ in ("ConnectError", "ConnectionError") for c in type(error).__mro__)
    return False
