"""The client every program of Hob uses: one method per endpoint over the Unix socket (or TCP). Synchronous.

    with hob.Client() as client:
        print(client.chat("Hello")["choices"][0]["message"]["content"])
        print(client.classify("I want my money back", ["refund", "praise"])["label"])

Replies are the JSON objects of the API. Errors are those of `hob.errors`, rebuilt from the reply. Before the first
byte is sent, the server must be of our uid or root: whoever squats on the socket's path or on the port learns nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import httpx
import msgspec

from hob.config import load_config
from hob.errors import DaemonUnreachable, HobError, InternalError, NotFound, UserError, error_from_name
from hob.unix_transport import LoopbackTransport, UnixTransport

Reply = dict[str, Any]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
POLL_S = 0.2
"""Between two looks at a training."""
Messages = str | list[dict[str, Any]]


class Client:
    """A connection to the daemon. Options beside the named ones go into the request's body as they are."""

    def __init__(
        self,
        socket: str | Path | None = None,
        base_url: str | None = None,
        *,
        app: str | None = None,
        service_class: str | None = None,
        model: str = "default",
        timeout_s: float | None = None,
    ) -> None:
        """socket: path of the Unix socket; unset, as the configuration says. base_url: a TCP address instead.

        app, service_class: sent with every request. timeout_s: longest silence accepted; None waits for ever.
        Raises ConfigError when the configuration that names the socket is wrong.
        """
        if socket is not None and base_url is not None:
            raise ValueError("socket and base_url are both given. Expected one of them.")
        headers = {"X-Hob-App": app, "X-Hob-Class": service_class}
        self.model = model
        transport: httpx.BaseTransport | None = None
        if base_url is None:
            path = Path(socket) if socket is not None else load_config()[0].socket_path
            self.address, transport = str(path), UnixTransport(str(path))
        else:
            self.address = base_url
            url = httpx.URL(base_url)
            if url.scheme == "http" and url.host in LOOPBACK:
                transport = LoopbackTransport()
        self._http = httpx.Client(
            base_url=base_url or "http://localhost",
            transport=transport,
            headers={name: value for name, value in headers.items() if value is not None},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            trust_env=False,  # a proxy has no business between a program and its own machine
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> Reply:
        """Whether an engine runs. Raises DaemonUnreachable or EngineUnavailable otherwise."""
        return self._get("/health")

    def models(self) -> list[Reply]:
        """What can be asked for by name."""
        found: list[Reply] = self._get("/v1/models")["data"]
        return found

    def stats(self) -> Reply:
        """The engine's numbers, per app too, and the model."""
        return self._get("/hob/v1/stats")

    def overview(self) -> Reply:
        """The whole state of the service, as the page shows it. For its owner."""
        return self._get("/hob/v1/overview")

    def watch(self) -> Iterator[Reply]:
        """The overview every second, until the service stops."""
        with self._errors(), self._http.stream("GET", "/hob/v1/events") as response:
            if response.status_code != 200:
                response.read()
                _reply_of(response)
            yield from _events(response.iter_lines())

    def dashboard(self) -> str:
        """Path of a link that lets one browser see the page, once. For the service's owner."""
        path: str = self._post("/hob/v1/dashboard", {})["path"]
        return path

    def apps(self) -> list[Reply]:
        """Apps with a key or a socket. For the service's owner."""
        found: list[Reply] = self._get("/hob/v1/apps")["data"]
        return found

    def add_app(self, name: str, kind: Literal["key", "socket"]) -> Reply:
        """Name an app: its key, this once, or the path of its socket. For the service's owner."""
        return self._post("/hob/v1/apps", {"name": name, "kind": kind})

    def remove_app(self, kind: str, name: str) -> Reply:
        """Take a key or a socket back. For the service's owner."""
        with self._errors():
            return _reply_of(self._http.delete(f"/hob/v1/apps/{kind}/{name}"))

    def public_prompts(self) -> list[Reply]:
        """Prompts that all apps share. For the service's owner."""
        found: list[Reply] = self._get("/hob/v1/public-prompts")["data"]
        return found

    def publish(self, name: str, **prompt: Any) -> Reply:
        """Let all apps share a prompt: `messages=` and `tools=`, or `prompt=`. For the service's owner."""
        return self._send("PUT", f"/hob/v1/public-prompts/{name}", prompt)

    def unpublish(self, name: str) -> Reply:
        """Make a prompt private again. For the service's owner."""
        with self._errors():
            return _reply_of(self._http.delete(f"/hob/v1/public-prompts/{name}"))

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> Reply: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> Iterator[Reply]: ...
    def chat(self, messages: Messages, *, stream: bool = False, **options: Any) -> Reply | Iterator[Reply]:
        """Answer a conversation, or one text as the user's turn. stream: chunks as they come."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._ask("/v1/chat/completions", {"messages": turns, **options}, stream=stream)

    @overload
    def complete(self, prompt: str | list[Any], *, stream: Literal[False] = False, **options: Any) -> Reply: ...
    @overload
    def complete(self, prompt: str | list[Any], *, stream: Literal[True], **options: Any) -> Iterator[Reply]: ...
    def complete(self, prompt: str | list[Any], *, stream: bool = False, **options: Any) -> Reply | Iterator[Reply]:
        """Continue a raw prompt: text, texts, token ids or lists of them."""
        return self._ask("/v1/completions", {"prompt": prompt, **options}, stream=stream)

    def classify(self, text: str | list[str] | None, labels: list[str] | None = None, **options: Any) -> Reply:
        """Probabilities of labels, exact. Without a text: `messages=` or `prompt=` in the options.

        A list of texts or prompts is answered in the reply's `data`, one after the other.
        """
        given = {"text": text, "labels": labels, **options}
        return self._post("/hob/v1/classify", {name: value for name, value in given.items() if value is not None})

    def embed(self, input: str | list[Any], **options: Any) -> list[list[float]]:
        """A vector of length 1 for each input."""
        reply = self._post("/v1/embeddings", {"input": input, "encoding_format": "float", **options})
        return [entry["embedding"] for entry in reply["data"]]

    def features(self, input: list[Any], **options: Any) -> Reply:
        """Hidden states of each text after `layers=`, pooled as `pools=` say: base64 of float32."""
        return self._post("/hob/v1/features", {"input": input, **options})

    # ---- trained heads ----

    def tasks(self) -> list[Reply]:
        """This app's trained tasks."""
        found: list[Reply] = self._get("/hob/v1/tasks")["data"]
        return found

    def task(self, name: str) -> Reply:
        """One task: its versions, how far it can be trusted, the training that runs. Raises NotFound."""
        return self._get(f"/hob/v1/tasks/{name}")

    def train_task(self, name: str, examples: list[Reply], **options: Any) -> Reply:
        """Begin to train a head from [{"text", "label"}, ...]; `trained_task` waits for its end."""
        return self._post(f"/hob/v1/tasks/{name}/train", {"examples": examples, **options})

    def trained_task(self, name: str, tell: Callable[[Reply], None] | None = None) -> Reply:
        """Wait until a task's training has ended. Returns its result; raises the error it ended with.

        tell: hears how far the training is, some times a second.
        """
        while True:
            training: Reply | None = self.task(name)["training"]
            if training is None:
                raise NotFound(f"task '{name}' is not being trained, and was not since the daemon started")
            if tell is not None:
                tell(training)
            if training["error"]:
                raise error_from_name(training["error"]["name"], training["error"]["message"])
            if training["result"]:
                result: Reply = training["result"]
                return result
            time.sleep(POLL_S)

    def run_task(self, name: str, texts: list[str], **options: Any) -> list[Reply]:
        """Labels of texts by a trained head, with calibrated probabilities."""
        found: list[Reply] = self._post(f"/hob/v1/tasks/{name}/run", {"texts": texts, **options})["data"]
        return found

    def delete_task(self, name: str) -> Reply:
        """Forget a task with all its versions."""
        with self._errors():
            return _reply_of(self._http.delete(f"/hob/v1/tasks/{name}"))

    def tokenize(self, text: str | None = None, **options: Any) -> Reply:
        """Token ids of a text, of `messages=`, or the text of `tokens=`."""
        return self._post("/hob/v1/tokenize", options if text is None else {"text": text, **options})

    # ---- memory and models ----

    def memory(self) -> Reply:
        """The ledger and the resident models."""
        return self._get("/hob/v1/memory")

    def set_budget(self, budget: int | str) -> Reply:
        """Change what the running service may take: bytes, or e.g. '4GiB'. Owner only."""
        return self._send("PUT", "/hob/v1/memory", {"budget": budget})

    def lease(self, model: str, *, rank: int = 0, pin: bool = False, keep_alive_s: float | None = None) -> Reply:
        """Load a model and hold it for this app. Raises PermissionDenied above the owner's cap."""
        return self._send("PUT", f"/hob/v1/leases/{model}", {"rank": rank, "pin": pin, "keep_alive_s": keep_alive_s})

    def end_lease(self, model: str) -> Reply:
        """End this app's lease."""
        with self._errors():
            return _reply_of(self._http.delete(f"/hob/v1/leases/{model}"))

    def unload(self, model: str) -> Reply:
        """Have a model unloaded once its requests have ended. Owner only."""
        return self._post("/hob/v1/unload", {"model": model})

    # ---- persistent contexts ----

    def create_context(self, name: str = "", messages: Messages | None = None, kv_bits: int = 16) -> Reply:
        """A conversation that the service keeps. `messages` open its first turn: a system prompt, say.

        kv_bits: 8, 4 or 3 keep its KV on disk with so many bits a value, in less room, and not quite as it was.
        """
        opening = [{"role": "system", "content": messages}] if isinstance(messages, str) else messages
        return self._post("/hob/v1/contexts", {"name": name, "messages": opening, "kv_bits": kv_bits})

    def contexts(self) -> list[Reply]:
        """This app's contexts, the last used first."""
        found: list[Reply] = self._get("/hob/v1/contexts")["data"]
        return found

    def context(self, context_id: str) -> Reply:
        """One context. Raises NotFound."""
        return self._get(f"/hob/v1/contexts/{context_id}")

    @overload
    def turn(
        self, context_id: str, messages: Messages | None = None, *, stream: Literal[False] = False, **options: Any
    ) -> Reply: ...
    @overload
    def turn(
        self, context_id: str, messages: Messages | None = None, *, stream: Literal[True], **options: Any
    ) -> Iterator[Reply]: ...
    def turn(
        self, context_id: str, messages: Messages | None = None, *, stream: bool = False, **options: Any
    ) -> Reply | Iterator[Reply]:
        """Append messages (or `prompt=`) to a context and generate. The context keeps both once the turn has ended."""
        new = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._ask(f"/hob/v1/contexts/{context_id}/generate", {"messages": new, **options}, stream=stream)

    def fork_context(self, context_id: str, name: str | None = None) -> Reply:
        """A copy that goes its own way."""
        return self._post(f"/hob/v1/contexts/{context_id}/fork", {"name": name})

    def delete_context(self, context_id: str) -> Reply:
        """Delete it, with its bytes on disk."""
        with self._errors():
            return _reply_of(self._http.delete(f"/hob/v1/contexts/{context_id}"))

    # ---- requests ----

    def _ask(self, path: str, body: Reply, *, stream: bool) -> Reply | Iterator[Reply]:
        return self._stream(path, {**body, "stream": True}) if stream else self._post(path, body)

    def _get(self, path: str) -> Reply:
        with self._errors():
            return _reply_of(self._http.get(path))

    def _post(self, path: str, body: Reply) -> Reply:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Reply) -> Reply:
        with self._errors():
            return _reply_of(self._http.request(method, path, **self._encoded(body)))

    def _stream(self, path: str, body: Reply) -> Iterator[Reply]:
        with self._errors(), self._http.stream("POST", path, **self._encoded(body)) as response:
            if response.status_code != 200:
                response.read()
                _reply_of(response)
            yield from _events(response.iter_lines())

    def _encoded(self, body: Reply) -> dict[str, Any]:
        content = msgspec.json.encode({"model": self.model, **body})
        return {"content": content, "headers": {"content-type": "application/json"}}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise DaemonUnreachable(
                f"no daemon answers at {self.address} ({error}). Start one with `hob serve`."
            ) from None
        except httpx.TimeoutException as error:
            raise DaemonUnreachable(
                f"the daemon at {self.address} was silent for too long ({type(error).__name__}). See `hob ps`."
            ) from None
        except httpx.TransportError as error:
            raise DaemonUnreachable(
                f"the daemon at {self.address} closed the connection: {error}. See its log, or restart: `hob serve`."
            ) from None


def _events(lines: Iterator[str]) -> Iterator[Reply]:
    """Objects of a stream of server-sent events. Raises the error that a broken stream ends with."""
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        event: Reply = msgspec.json.decode(line[6:])
        if "error" in event:
            raise _rebuild(event["error"], None)
        yield event
    raise DaemonUnreachable("the stream ended without [DONE]: the daemon went away")


def _reply_of(response: httpx.Response) -> Reply:
    try:
        reply: Reply = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        raise InternalError(
            f"{response.request.url} answered {response.status_code} with no JSON: {response.text[:200]!r}. Is it Hob?"
        ) from None
    if response.status_code < 400:
        return reply
    raise _rebuild(reply["error"], response)


def _rebuild(error: Reply, response: httpx.Response | None) -> HobError:
    """The error of `hob.errors` that was sent: by its code, the least general class first."""
    general = UserError if response is not None and response.status_code < 500 else HobError
    cls = _by_code(HobError).get(error.get("code") or "", general)
    retry_after = response.headers.get("retry-after") if response is not None else None
    rebuilt = cls(
        error["message"], param=error.get("param"), retry_after_s=None if retry_after is None else float(retry_after)
    )
    rebuilt.code, rebuilt.type = error.get("code") or cls.code, error.get("type") or cls.type
    if response is not None:
        rebuilt.status = response.status_code
    return rebuilt


def _by_code(cls: type[HobError]) -> dict[str, type[HobError]]:
    """Classes by code; of a class and its children with one code, the child that comes first."""
    found = {cls.code: cls}
    for child in reversed(cls.__subclasses__()):
        found |= _by_code(child)
    return found
