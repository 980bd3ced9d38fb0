"""LoRA adapters as clients name them: 'MODEL:ADAPTER' wherever a model is named."""

from __future__ import annotations

import contextlib

import msgspec

from hob.api.services import ServedModel, Services
from hob.errors import EngineUnavailable, ModelNotFound
from hob.messages import ModelInfo


def split_name(name: str) -> tuple[str, str]:
    """Model and adapter, empty for none. A source such as hf:OWNER/REPO/FILE has its colon elsewhere."""
    model, _, adapter = name.rpartition(":")
    return (model, adapter) if model and "/" not in adapter else (name, "")


def with_adapter(model: ModelInfo, adapter: str) -> tuple[ModelInfo, str]:
    """The model under its name with the adapter's, and what the engine calls the adapter. Raises ModelNotFound."""
    if not adapter:
        return model, ""
    by_name = {known.partition("@")[0]: known for known in model.adapters}
    if (found := by_name.get(adapter)) is None:
        raise ModelNotFound(
            f"model '{model.name}' has no adapter '{adapter[:80]}'. It has: {', '.join(by_name) or 'none'}. They are "
            f"read when the model is loaded, from the folder adapters/{model.name}; the log says why one is left out.",
            param="model",
        )
    return msgspec.structs.replace(model, name=f"{model.name}:{adapter}"), found


def served_adapters(services: Services) -> list[ServedModel]:
    """Those of the default model, as models. None while no engine runs."""
    with contextlib.suppress(EngineUnavailable):
        model = services.backend.model
        names = [f"{model.name}:{known.partition('@')[0]}" for known in model.adapters]
        return [ServedModel(name, int(services.started_at)) for name in names]
    return []
