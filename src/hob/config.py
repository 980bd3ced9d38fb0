"""Settings: one frozen dataclass per component. A flag beats an environment variable beats hob.toml beats the default.

A setting `port` of section `server` is `[server] port` in hob.toml, HOB_PORT in the environment and --port on the
command line (names are unique over all sections). `hob config` prints each value with its origin.
"""

from __future__ import annotations

import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hob.errors import ConfigError

MIN_BUDGET_BYTES = 16 << 20
"""A smaller memory budget holds no model."""


def _default_home() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "hob"


@dataclass(frozen=True)
class PathConfig:
    """Where things lie."""

    home: Path = field(default_factory=_default_home)
    """Models, contexts and state. Environment: HOB_HOME."""
    socket: Path | None = None
    """The service's Unix socket. Unset: $XDG_RUNTIME_DIR/hob/hob.sock, else run/hob.sock under `home`."""
    policy: Path | None = None
    """What each app may do. Unset: policy.toml beside hob.toml. It need not exist."""


@dataclass(frozen=True)
class ServerConfig:
    """Where the service listens."""

    host: str = "127.0.0.1"
    """Address of the TCP listener; loopback only."""
    port: int = 11435
    """Port of the TCP listener. 0: any free one."""
    max_body_bytes: int = 8 << 20
    """Largest request body accepted."""
    idle_exit_s: float = 0.0
    """End after this many seconds without a request. For a service that systemd starts again. 0: never."""
    log_json: bool = False
    """Log one JSON object a line instead of text."""


@dataclass(frozen=True)
class EngineConfig:
    """How the compute core runs."""

    model: str = "smollm2-135m"
    """Catalogue name or path of the model to serve."""
    isa: str = "auto"
    """Instruction set: auto, portable, avx2, avx512, amx."""
    threads: int = 0
    """Compute threads. 0: one per available core."""
    weights: str = "copy"
    """'copy' reads the packed file into huge pages; 'map' maps it, shared with other processes and slower."""
    kv_type: str = "auto"
    """Keys and values in memory and on disk: 'f16', or 'q8', 8 bits with a scale for each token and head, which takes
    half as much. 'auto': q8 where attention counts in whole numbers (avx512, amx) and heads suit it, else f16."""
    watchdog_s: float = 60.0
    """A step that takes longer hangs: the engine process is replaced."""
    adapters: str = ""
    """Folder of LoRA adapters: MODEL/NAME.gguf, or MODEL/NAME/ as PEFT saves them. Empty: adapters under `home`."""


@dataclass(frozen=True)
class SchedulerConfig:
    """How steps are filled."""

    max_running: int = 64
    """Most sequences in a step. More raises throughput and the time between tokens alike."""
    max_step_tokens: int = 512
    """Most rows of a step, prefill and decode together: the size of the engine's workspace."""
    max_step_s: float = 0.045
    """Seconds a step may take by the cost model. Whoever arrives waits for one step; lower costs prefill speed. A model
    whose streams take longer has longer steps."""
    urgent_stretch: float = 1.8
    """How many times longer than with them alone a step may take that carries interactive rows."""
    lend_every: int = 24
    """Of so many steps of interactive streams one may take `max_step_s`: lesser work is cheapest in long steps,
    and one long gap among many short ones is no slower pace. 0: none."""
    max_waiting: int = 1024
    """Most requests in the queue; one more is refused with a retry-after."""
    speculation: str = "auto"
    """'auto' guesses a stream's next tokens from its own text and computes them ahead where that is measured to pay;
    the output is the same. 'off': for measuring what it gives."""
    prefix_cache: bool = True
    """Reuse computed blocks of equal prefixes of the same app. Off: for measuring what it gives."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the service may take."""

    budget: str = "half"
    """What weights, KV, buffers and tokenizers of all models may take together: 'half' of the machine's memory (or of
    the control group's limit, if that is less), bytes, or e.g. '4GiB'."""
    kv_tokens: int = 16384
    """Most tokens of KV of a model, over all its sequences; memory is taken as they come. Whole blocks of 16."""
    keep_alive_s: float = 300.0
    """Seconds that a model stays without a request. The default model stays until its memory is wanted."""
    max_keep_alive_s: float = 3600.0
    """Most seconds that an app's lease may keep an idle model."""
    max_pinned_share: float = 0.5
    """Share of the budget that one app's leases may pin."""

    @property
    def budget_bytes(self) -> int | None:
        """The budget, None for half of the memory. Raises ConfigError."""
        return None if self.budget == "half" else parse_bytes("budget", self.budget)


UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_bytes(name: str, text: str) -> int:
    """'4GiB' -> 4294967296. Raises ConfigError naming the setting."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ConfigError(f"setting '{name}' is '{text}'. Expected bytes, or e.g. 512MB or 4GiB.")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class ContextConfig:
    """Persistent contexts."""

    max_contexts: int = 64
    """Most contexts an app may keep."""
    context_disk_bytes: int = 4 << 30
    """KV of contexts on disk, of each model over all apps; beyond it that of the longest unused is dropped and computed
    again when they are called. 0: none is kept, every resumed context is computed again."""


@dataclass(frozen=True)
class Config:
    """All settings."""

    paths: PathConfig = field(default_factory=PathConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    contexts: ContextConfig = field(default_factory=ContextConfig)

    @property
    def socket_path(self) -> Path:
        """The Unix socket: set, or under XDG_RUNTIME_DIR, or under home."""
        if self.paths.socket is not None:
            return self.paths.socket
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        return (Path(runtime) / "hob" if runtime else self.paths.home / "run") / "hob.sock"

    @property
    def policy_path(self) -> Path:
        """policy.toml: set, or beside hob.toml."""
        return self.paths.policy or _config_folder(os.environ) / "policy.toml"

    @property
    def app_sockets_dir(self) -> Path:
        """Sockets of single apps."""
        return self.socket_path.parent / "apps"

    @property
    def audit_dir(self) -> Path:
        """The audit log."""
        return self.paths.home / "audit"

    @property
    def contexts_dir(self) -> Path:
        """Histories and KV of persistent contexts."""
        return self.paths.home / "contexts"

    @property
    def keys_dir(self) -> Path:
        """The apps' wrapped keys and, unless systemd has it, the device's."""
        return self.paths.home / "keys"

    @property
    def public_prompts_path(self) -> Path:
        """Prompts that all apps share."""
        return self.paths.home / "public.json"

    @property
    def adapters_dir(self) -> Path:
        """Where adapters lie, in a folder for each model."""
        return Path(self.engine.adapters) if self.engine.adapters else self.paths.home / "adapters"

    @property
    def models_dir(self) -> Path:
        """Where models are kept."""
        return self.paths.home / "models"


Origins = dict[str, str]
"""Setting name -> where its value came from: 'flag', 'environment HOB_X', a file, or 'default'."""


def load_config(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Config, Origins]:
    """Merge flags, environment, hob.toml and defaults. Flags that are None count as not given.

    hob.toml is $HOB_CONFIG, else $XDG_CONFIG_HOME/hob/hob.toml (~/.config by default); it need not exist.
    Raises ConfigError naming the setting, its value and what was expected.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    file_path = _config_path(environ)
    in_file = _read_file(file_path)
    config, origins = Config(), {}
    known: set[str] = set()
    for section in fields(Config):
        component = getattr(config, section.name)
        hints = typing.get_type_hints(type(component))
        section_file = in_file.pop(section.name, {})
        if not isinstance(section_file, dict):
            raise ConfigError(f"{file_path}: '{section.name}' must be a table, e.g. [{section.name}]")
        changes = {}
        for setting in fields(component):
            known.add(setting.name)
            raw, origin = _lookup(setting.name, given, environ, section_file, file_path)
            if origin != "default":
                changes[setting.name] = _convert(setting.name, raw, hints[setting.name], origin)
            origins[setting.name] = origin
        if unknown := sorted(set(section_file) - {s.name for s in fields(component)}):
            raise ConfigError(
                f"{file_path}: unknown setting '{unknown[0]}' in [{section.name}]. "
                f"Known: {', '.join(s.name for s in fields(component))}"
            )
        config = replace(config, **{section.name: replace(component, **changes)})
    if in_file:
        raise ConfigError(
            f"{file_path}: unknown section '{sorted(in_file)[0]}'. Known: {', '.join(f.name for f in fields(Config))}"
        )
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"unknown setting '{unknown[0]}'. Known: {', '.join(sorted(known))}")
    _check(config)
    return config, origins


def _config_path(environ: Mapping[str, str]) -> Path:
    if explicit := environ.get("HOB_CONFIG"):
        if not Path(explicit).is_file():
            raise ConfigError(f"HOB_CONFIG names '{explicit}', which is not a file")
        return Path(explicit)
    return _config_folder(environ) / "hob.toml"


def _config_folder(environ: Mapping[str, str]) -> Path:
    if explicit := environ.get("HOB_CONFIG"):
        return Path(explicit).parent
    return Path(environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")) / "hob"


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _lookup(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], section: Mapping[str, Any], file_path: Path
) -> tuple[Any, str]:
    if name in flags:
        return flags[name], "flag"
    variable = f"HOB_{name.upper()}"
    if variable in environ:
        return environ[variable], f"environment {variable}"
    if name in section:
        return section[name], str(file_path)
    return None, "default"


def _convert(name: str, value: Any, hint: Any, origin: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    try:
        if hint is Path:
            return Path(value).expanduser()
        if hint is bool:
            words = {
                "1": True,
                "true": True,
                "yes": True,
                "on": True,
                "0": False,
                "false": False,
                "no": False,
                "off": False,
            }
            return value if isinstance(value, bool) else words[str(value).lower()]
        if hint is int:
            if isinstance(value, (bool, float)):
                raise ValueError
            return int(value)
        return hint(value)
    except (KeyError, ValueError, TypeError):
        expected = {int: "a whole number", bool: "true or false", float: "a number", Path: "a path", str: "text"}[hint]
        raise ConfigError(f"setting '{name}' is '{value}' ({origin}). Expected {expected}.") from None


def _check(config: Config) -> None:
    choices = {
        "isa": (config.engine.isa, ("auto", "portable", "avx2", "avx512", "amx")),
        "weights": (config.engine.weights, ("copy", "map")),
        "kv_type": (config.engine.kv_type, ("auto", "f16", "q8")),
        "speculation": (config.scheduler.speculation, ("auto", "off")),
        "host": (config.server.host, ("127.0.0.1", "::1", "localhost")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"setting '{name}' is '{value}'. Expected one of: {', '.join(allowed)}.")
    least: dict[str, tuple[float, float]] = {
        "port": (config.server.port, 0),
        "threads": (config.engine.threads, 0),
        "max_body_bytes": (config.server.max_body_bytes, 1024),
        "idle_exit_s": (config.server.idle_exit_s, 0),
        "max_running": (config.scheduler.max_running, 1),
        "max_step_tokens": (config.scheduler.max_step_tokens, 16),
        "max_step_s": (config.scheduler.max_step_s, 0.001),
        "urgent_stretch": (config.scheduler.urgent_stretch, 1.0),
        "lend_every": (config.scheduler.lend_every, 0),
        "max_waiting": (config.scheduler.max_waiting, 1),
        "budget": (config.memory.budget_bytes or MIN_BUDGET_BYTES, MIN_BUDGET_BYTES),
        "kv_tokens": (config.memory.kv_tokens, 256),
        "keep_alive_s": (config.memory.keep_alive_s, 0),
        "max_keep_alive_s": (config.memory.max_keep_alive_s, 0),
        "max_pinned_share": (config.memory.max_pinned_share, 0),
        "max_contexts": (config.contexts.max_contexts, 0),
        "context_disk_bytes": (config.contexts.context_disk_bytes, 0),
    }
    for name, (number, minimum) in least.items():
        if number < minimum:
            raise ConfigError(f"setting '{name}' is {number}. Expected at least {minimum}.")
    if config.server.port > 65535:
        raise ConfigError(f"setting 'port' is {config.server.port}. Expected at most 65535.")
