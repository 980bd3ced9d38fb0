"""What each app may do: policy.toml as rules, use counted against them, refusals that say which rule and how much.

    [default]                      for every app; what it does not say is unlimited
    [unknown]                      for peers of another namespace: nothing is known of them, so they get the least
    [app."1000/python*"]           for apps whose name matches; the first that matches, over [default]
    [background]                   when background work waits (conditions.py)
    [audit]                        what the audit log keeps (audit.py)

The file is read again when it changes; a file that is wrong then changes nothing and is told in the log. Time is passed
in, never read. Knows no HTTP.
"""

from __future__ import annotations

import logging
import tomllib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from hob.errors import ConfigError, HobError, PermissionDenied, RateLimited
from hob.request import ServiceClass

log = logging.getLogger("hob.policy")

WINDOW_S = 60.0
UNKNOWN = "unknown"
ClassName = Literal["interactive", "standard", "background"]


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one table says. None: not said."""

    models: list[str] | None = None
    """Patterns of model names."""
    adapters: list[str] | None = None
    """Patterns of adapter names."""
    endpoints: list[str] | None = None
    """Patterns of paths, e.g. '/v1/*'."""
    service_class: ClassName | None = None
    """Class of requests that do not ask for one."""
    most_urgent: ClassName | None = None
    """The most urgent class that may be asked for."""
    weight: float | None = None
    """Share of compute time among the apps of a class."""
    tokens_per_minute: int | None = None
    """Tokens read and generated within the last minute."""
    max_concurrent: int | None = None
    """Requests at once."""
    max_contexts: int | None = None
    """Persistent contexts; setting 'max_contexts' where it is not said."""
    context_bytes: int | None = None
    """KV of its persistent contexts."""
    leases: bool | None = None
    """Whether it may keep a model in memory."""


class BackgroundRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When background work waits. 0 switches a rule off."""

    battery_percent: float = 30.0
    """On battery, below this charge. 100: whenever on battery."""
    celsius: float = 90.0
    """Any thermal zone hotter than this."""
    busy_percent: float = 0.0
    """Other programs use more than this share of the processors."""


class AuditRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the audit log keeps."""

    enabled: bool = True
    prompts: bool = False
    """Keep request bodies too: they hold what was said."""
    max_bytes: int = 16 << 20
    """Size at which a new file is begun."""
    num_files: int = 4
    """Old files kept beside the present one."""


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """policy.toml."""

    default: Rules = Rules()
    unknown: Rules = Rules()
    app: dict[str, Rules] = {}
    background: BackgroundRules = BackgroundRules()
    audit: AuditRules = AuditRules()


BUILT_IN = Rules(
    models=["*"],
    adapters=["*"],
    endpoints=["*"],
    service_class="standard",
    most_urgent="interactive",
    weight=1.0,
    leases=True,
)
LEAST = Rules(
    endpoints=[
        "/v1/*",
        "/api/*",
        "/hob/v1/classify",
        "/hob/v1/score",
        "/hob/v1/tokenize",
        "/health",
    ],
    service_class="background",
    most_urgent="background",
    tokens_per_minute=20_000,
    max_concurrent=2,
    max_contexts=0,
    leases=False,
)


class Use(Protocol):
    """Tokens of a request so far."""

    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What one app may do, and where that is written."""

    app: str
    rules: Rules
    origins: dict[str, str]
    """Rule -> table it comes from."""

    @property
    def weight(self) -> float:
        """Share of compute time among its class."""
        return self.rules.weight or 1.0

    @property
    def may_lease(self) -> bool:
        """Whether it may keep a model in memory."""
        return bool(self.rules.leases)

    def check_lease(self) -> None:
        """Raises PermissionDenied unless it may keep a model in memory."""
        if not self.may_lease:
            raise self._denied("leases", "a lease", False)

    def service_class(self, asked: ServiceClass | None) -> ServiceClass:
        """The class of a request. Raises PermissionDenied if a more urgent one was asked for than is allowed."""
        most_urgent = ServiceClass[(self.rules.most_urgent or "interactive").upper()]
        if asked is None:
            return max(ServiceClass[(self.rules.service_class or "standard").upper()], most_urgent)
        if asked < most_urgent:
            raise self._denied("most_urgent", f"class '{asked.name.lower()}'", self.rules.most_urgent)
        return asked

    def check_model(self, name: str) -> None:
        """Raises PermissionDenied."""
        self._check("models", name, "model")

    def check_adapter(self, name: str) -> None:
        """Raises PermissionDenied."""
        self._check("adapters", name, "adapter")

    def check_endpoint(self, path: str) -> None:
        """Raises PermissionDenied."""
        self._check("endpoints", path, "endpoint")

    def check_context_bytes(self, used: int) -> None:
        """Raises RateLimited if the app's contexts take more than they may."""
        limit = self.rules.context_bytes
        if limit is not None and used > limit:
            raise self.limited("context_bytes", used, limit, None, "Delete a context: DELETE /hob/v1/contexts/{id}.")

    def _check(self, rule: str, name: str, what: str) -> None:
        allowed = getattr(self.rules, rule) or []
        if not any(fnmatchcase(name, pattern) for pattern in allowed):
            raise self._denied(rule, f"{what} '{name}'", allowed)

    def _denied(self, rule: str, what: str, limit: object) -> PermissionDenied:
        error = PermissionDenied(
            f"app '{self.app}' may not use {what}: rule '{rule}' of {self.origins.get(rule, 'the default policy')} "
            f"allows {_words(limit)}. The owner of the device can change that; until then trying again is of no use."
        )
        error.policy = {"rule": rule, "table": self.origins.get(rule), "limit": limit, "used": what}
        return error

    def limited(self, rule: str, used: int, limit: int, retry_after_s: float | None, then: str) -> RateLimited:
        """The refusal of a limit that is used up."""
        where = self.origins.get(rule, "the default policy")
        error = RateLimited(
            f"app '{self.app}' is at {used:,} of {limit:,} (rule '{rule}' of {where}). {then}",
            retry_after_s=retry_after_s,
        )
        error.policy = {"rule": rule, "table": where, "limit": limit, "used": used, "retry_after_s": retry_after_s}
        return error


@dataclass(slots=True)
class _Account:
    """An app's use."""

    in_flight: dict[int, Use] = field(default_factory=dict)
    spent: deque[tuple[float, int]] = field(default_factory=deque)
    """When a request ended, and its tokens; those of the last minute."""

    def forget(self, now: float) -> None:
        """What was before the last minute."""
        while self.spent and self.spent[0][0] <= now - WINDOW_S:
            self.spent.popleft()

    def used(self, now: float) -> int:
        """Tokens of the last minute, those of running requests included."""
        self.forget(now)
        return sum(tokens for _, tokens in self.spent) + sum(map(_tokens, self.in_flight.values()))

    def frees_at(self, now: float, limit: int) -> float:
        """Seconds until the use falls below the limit if nothing more is used."""
        left = self.used(now)
        for ended, tokens in self.spent:
            left -= tokens
            if left < limit:
                return ended + WINDOW_S - now
        return WINDOW_S


class Policy:
    """The rules in force and the use of each app. On one event loop's thread."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is there and wrong."""
        self.path = path
        self._stamp = _stamp(path)
        self.file = read_policy(path)
        self._grants: dict[str, Grant] = {}
        self._accounts: dict[str, _Account] = {}

    def refresh(self) -> None:
        """Read the file again if it has changed; keep the rules in force if it is wrong now."""
        if (stamp := _stamp(self.path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self.file = read_policy(self.path)
        except HobError as error:
            log.error("the policy stays as it was: %s", error)
            return
        self._grants.clear()
        log.info("policy read again: %s", self.path)

    def grant(self, app: str) -> Grant:
        """What an app may do."""
        if (found := self._grants.get(app)) is None:
            if len(self._grants) > 10_000:  # names are declared by callers: there may be any number
                self._grants.clear()
            found = self._grants[app] = grant_of(self.file, app)
        return found

    def enter(self, app: str, path: str, use: Use, now: float, *, is_counted: bool = True) -> Grant:
        """A request of an app begins. Raises PermissionDenied or RateLimited; else `leave` must follow.

        is_counted: False for one that asks nothing of the model: it takes no tokens and none of the requests at once.
        """
        self.refresh()
        grant = self.grant(app)
        grant.check_endpoint(path)
        if not is_counted:
            return grant
        account = self._accounts.setdefault(app, _Account())
        limit = grant.rules.max_concurrent
        if limit is not None and len(account.in_flight) >= limit:
            raise grant.limited(
                "max_concurrent", len(account.in_flight), limit, 1.0, "Come back when one of its requests has ended."
            )
        limit = grant.rules.tokens_per_minute
        if limit is not None and (used := account.used(now)) >= limit:
            wait_s = account.frees_at(now, limit)
            raise grant.limited("tokens_per_minute", used, limit, wait_s, f"Come back in {wait_s:.0f} s.")
        account.in_flight[id(use)] = use
        return grant

    def leave(self, app: str, use: Use, now: float) -> None:
        """It ended. Nothing if it was never let in."""
        account = self._accounts.get(app)
        if account is None or account.in_flight.pop(id(use), None) is None:
            return
        if tokens := _tokens(use):
            account.spent.append((now, tokens))
        account.forget(now)
        if not account.in_flight and not account.spent:
            del self._accounts[app]


def grant_of(file: PolicyFile, app: str) -> Grant:
    """Built-in rules, then [default] or what is built in for unknown peers and [unknown], then the first match."""
    layers: list[tuple[str, Rules]] = [("the built-in policy", BUILT_IN), ("[default]", file.default)]
    if app.partition("/")[0] == UNKNOWN:
        layers += [("the built-in policy for unknown peers", LEAST), ("[unknown]", file.unknown)]
    for pattern, rules in file.app.items():
        if fnmatchcase(app, pattern):
            layers.append((f'[app."{pattern}"]', rules))
            break
    said: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, rules in layers:
        for name in Rules.__struct_fields__:
            if (value := getattr(rules, name)) is not None:
                said[name], origins[name] = value, where
    return Grant(app, Rules(**said), origins)


def read_policy(path: Path) -> PolicyFile:
    """The file; the defaults if there is none. Raises ConfigError naming what is wrong and what is known."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return PolicyFile()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the policy '{path}': {error}") from error
    try:
        found = msgspec.convert(tomllib.loads(text), PolicyFile)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {str(error).replace('`', chr(39))}. Known: {_KNOWN}.") from error
    _check(path, found)
    return found


_KNOWN = (
    '[default], [unknown] and [app."NAME"] with '
    + ", ".join(Rules.__struct_fields__)
    + "; [background] with "
    + ", ".join(BackgroundRules.__struct_fields__)
    + "; [audit] with "
    + ", ".join(AuditRules.__struct_fields__)
)


def _check(path: Path, file: PolicyFile) -> None:
    tables = {"default": file.default, "unknown": file.unknown, **{f'app."{k}"': v for k, v in file.app.items()}}
    for table, rules in tables.items():
        for name, least in (("tokens_per_minute", 1), ("max_concurrent", 1), ("max_contexts", 0), ("context_bytes", 0)):
            value = getattr(rules, name)
            if value is not None and value < least:
                raise ConfigError(f"{path}: [{table}] {name} is {value}. Expected at least {least}.")
        if rules.weight is not None and not 0.01 <= rules.weight <= 100:
            raise ConfigError(f"{path}: [{table}] weight is {rules.weight:g}. Expected 0.01 to 100.")
    if file.audit.max_bytes < 1 << 16 or not 0 <= file.audit.num_files <= 100:
        raise ConfigError(f"{path}: [audit] expects max_bytes of at least 65536 and num_files from 0 to 100.")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_ino


def _tokens(use: Use) -> int:
    return use.num_prompt_tokens + use.num_output_tokens


def _words(limit: object) -> str:
    if isinstance(limit, list):
        return ", ".join(map(str, limit)) or "none"
    return f"'{limit}' at most"


Clock = Callable[[], float]
