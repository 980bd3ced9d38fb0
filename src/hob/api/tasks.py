"""/hob/v1/tasks: heads trained on this device over the shared model. And /hob/v1/features, which they read.

    POST   /hob/v1/tasks/{name}/train   {examples: [{text, label}], words?, max_tokens?}   202, works in the background
    GET    /hob/v1/tasks/{name}         versions, how far it can be trusted, the training that runs
    POST   /hob/v1/tasks/{name}/run     {texts, min_confidence?, version?}   one forward pass per text
    GET    /hob/v1/tasks                all of this app's
    DELETE /hob/v1/tasks/{name}         with all versions

A label is null where the head abstains: `best` has what it would have said. `out_of_domain` marks a text unlike those
it was trained on. NumPy is imported with the first head that runs, not before.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response
from starlette.routing import Router

from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.features import FeaturesRequest, PartBody, PoolBody, features, pooled_states
from hob.api.inputs import MAX_INPUTS
from hob.api.replies import json_reply
from hob.api.routes import CallOf, add_routes
from hob.api.schema import Body
from hob.api.training import Trainings, check_size
from hob.api.wire import usage_object
from hob.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from hob.heads.head import Answer, Head
    from hob.heads.store import HeadStore

PATH = "/hob/v1/tasks"


class ExampleBody(Body, kw_only=True):
    """A text and its label."""

    text: str
    label: str


class TrainRequest(Body, kw_only=True):
    """Body of POST /hob/v1/tasks/{name}/train."""

    model: str = ""
    examples: list[ExampleBody]
    words: bool | None = None
    """Whether words of the text count beside hidden states. Unset: whichever does better."""
    max_tokens: int = 1024
    """Longer texts lose their middle."""


class RunRequest(Body, kw_only=True):
    """Body of POST /hob/v1/tasks/{name}/run."""

    model: str = ""
    texts: list[str]
    min_confidence: float | None = None
    """Abstain below it. Unset: the head's own. 0: never."""
    version: int | None = None
    service_class: str | None = None


def register(router: Router, call_of: CallOf) -> None:
    """Add the routes."""
    routes = _Routes()
    add_routes(
        router,
        call_of,
        ("POST", "/hob/v1/features", features),
        ("GET", PATH, routes.list_tasks),
        ("GET", PATH + "/{task}", routes.get),
        ("DELETE", PATH + "/{task}", routes.delete),
        ("POST", PATH + "/{task}/train", routes.train),
        ("POST", PATH + "/{task}/run", routes.run),
    )


class _Routes:
    """The calls, with what they share: the trainings that run, and the heads that are loaded."""

    def __init__(self) -> None:
        self._trainings = Trainings()
        self._store: HeadStore | None = None

    async def list_tasks(self, call: Call) -> Response:
        store = self._store_of(call)
        names = sorted({*store.tasks(call.app), *self._trainings.names(call.app)})
        return json_reply({"object": "list", "data": [await self._object(call, name) for name in names]})

    async def get(self, call: Call, task: str) -> Response:
        return json_reply(await self._object(call, task))

    async def delete(self, call: Call, task: str) -> Response:
        self._trainings.forget(call.app, task)
        await asyncio.to_thread(self._store_of(call).remove, call.app, task)
        return json_reply({"id": task, "object": "task", "deleted": True})

    async def train(self, call: Call, task: str, raw: bytes) -> Response:
        from hob.heads.store import check_name

        body = parse_body(raw, TrainRequest)
        model = await call.use_model(body.model)
        check_name(task)
        if not body.examples:
            raise InvalidRequest("field 'examples' is empty. Expected texts with labels.", param="examples")
        check_size(len(body.examples), model.hidden_size)
        for i, example in enumerate(body.examples):
            if not example.text.strip() or not example.label.strip():
                raise InvalidRequest(f"field 'examples[{i}]' has an empty text or label", param=f"examples[{i}]")
        config = call.services.config
        job = {
            "task": task,
            "app": call.app,
            "socket": str(config.socket_path),
            "folder": str(config.paths.home / "tasks"),
            "examples": [(e.text, e.label) for e in body.examples],
            "words": body.words,
            "max_tokens": body.max_tokens,
            "model": model.name,
            "quantisation": model.quantisation,
            "num_layers": model.num_layers,
        }
        training = self._trainings.start(call.app, task, msgspec.json.encode(job))
        return json_reply({"id": task, "object": "task", "training": training.as_object()}, 202)

    async def run(self, call: Call, task: str, raw: bytes) -> Response:
        body = parse_body(raw, RunRequest)
        model = await call.use_model(body.model, body.service_class)
        head = await asyncio.to_thread(self._store_of(call).load, call.app, task, body.version)
        head.check_model(model.name, model.quantisation)
        if not 1 <= len(body.texts) <= MAX_INPUTS or not all(text.strip() for text in body.texts):
            raise InvalidRequest(
                f"field 'texts' has {len(body.texts):,} texts. Expected 1 to {MAX_INPUTS}, none empty.", param="texts"
            )
        states = await pooled_states(call, model, _wanted(head, body), len(raw))
        answers = await asyncio.to_thread(_answers, head, states, body)
        return json_reply(
            {
                "object": "task.run",
                "task": task,
                "version": head.version,
                "model": model.name,
                "labels": head.labels,
                "data": [_answer_object(answer) for answer in answers],
                "usage": usage_object(call.record.totals),
            }
        )

    def _store_of(self, call: Call) -> HeadStore:
        from hob.heads.store import HeadStore

        if self._store is None:
            self._store = HeadStore(call.services.config.paths.home / "tasks")
        return self._store

    async def _object(self, call: Call, task: str) -> dict[str, Any]:
        store, training = self._store_of(call), self._trainings.find(call.app, task)
        shown: dict[str, Any] = {"id": task, "object": "task"}
        try:
            head = await asyncio.to_thread(store.load, call.app, task)
            shown |= _head_object(head, store.versions(call.app, task))
        except NotFound:
            if training is None:
                raise
        return {**shown, "training": None if training is None else training.as_object()}


def _wanted(head: Head, body: RunRequest) -> FeaturesRequest:
    """What the head reads of the texts."""
    from hob.heads.parts import parts_of

    lead = head.features.lead
    return FeaturesRequest(
        input=[[PartBody(text=p.text, spans=list(p.spans)) for p in parts_of(text, lead)] for text in body.texts],
        pools=[PoolBody(how=how, span=span or None) for how, span in head.features.pools],  # type: ignore[arg-type]
        layers=head.features.layers,
        max_tokens=head.features.max_tokens,
        service_class=body.service_class,
    )


def _answers(head: Head, states: list[bytes], body: RunRequest) -> list[Answer]:
    import numpy as np

    values = np.stack([np.frombuffer(state, np.float32) for state in states])
    return head.answers(values, body.texts, body.min_confidence)


def _answer_object(answer: Answer) -> dict[str, Any]:
    return {
        "label": answer.label,
        "best": answer.best,
        "probability": answer.probability,
        "probabilities": answer.probabilities,
        "out_of_domain": answer.is_far,
    }


def _head_object(head: Head, versions: list[int]) -> dict[str, Any]:
    return {
        "version": head.version,
        "versions": versions,
        "model": head.model,
        "quantisation": head.quantisation,
        "labels": head.labels,
        "created": head.created,
        "min_confidence": head.min_confidence,
        "features": msgspec.to_builtins(head.features),
        "trust": msgspec.to_builtins(head.trust),
    }
