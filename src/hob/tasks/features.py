"""States of many texts from the daemon, in big calls, kept on disk if wanted: asking again costs nothing then."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hob.client import Client
from hob.heads.head import Features
from hob.heads.parts import parts_of

CALL_TEXTS = 64
"""Texts in one call: enough to fill the engine's steps, few enough to report progress and to be interrupted."""

States = NDArray[np.float32]
Progress = Callable[[int, int], None]


def body_of(texts: list[str], features: Features) -> dict[str, Any]:
    """Body of /hob/v1/features."""
    return {
        "input": [
            [{"text": part.text, "spans": part.spans} for part in parts_of(text, features.lead)] for text in texts
        ],
        "pools": [{"how": how, "span": span or None} for how, span in features.pools],
        "layers": features.layers,
        "max_tokens": features.max_tokens,
    }


def gather(
    client: Client,
    texts: list[str],
    features: Features,
    progress: Progress | None = None,
    cache: Path | None = None,
    model: str = "",
) -> States:
    """(n, pools x layers x hidden size). model: by name; empty: the default one.

    cache: a folder for what the default model computed; it is found again by content.
    """
    rows: list[States] = []
    for start in range(0, len(texts), CALL_TEXTS):
        some = texts[start : start + CALL_TEXTS]
        rows.append(_cached(client, some, features, cache) if not model else _ask(client, some, features, model))
        if progress is not None:
            progress(start + len(some), len(texts))
    return np.concatenate(rows)


def _cached(client: Client, texts: list[str], features: Features, cache: Path | None) -> States:
    if cache is None:
        return _ask(client, texts, features)
    model = client.stats()["model"]
    key = repr((model["name"], model["quantisation"], features, texts))
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if path.exists():
        return np.asarray(np.load(path), np.float32)
    states = _ask(client, texts, features)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, states)
    part.rename(path)
    return states


def _ask(client: Client, texts: list[str], features: Features, model: str = "") -> States:
    reply = client.features(**body_of(texts, features), model=model)
    return np.stack([np.frombuffer(base64.b64decode(data), np.float32) for data in reply["data"]])
