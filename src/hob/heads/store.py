"""Trained heads on disk: an app's tasks, each with its versions. Knows files; no model, no HTTP.

    HOME/tasks/APP/TASK/3.npz        APP: a hash of the app's name. The highest version is the one in use.

A head holds words of the texts it was trained on, so an app sees its own tasks only; files are readable by the owner.
A version appears whole or not at all (written aside, then renamed).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

from hob.durable import write_whole
from hob.errors import InvalidRequest, NotFound, StorageError
from hob.heads.head import Head, from_file, to_bytes

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
KEPT_VERSIONS = 5
"""Older ones are dropped."""


def check_name(task: str) -> None:
    """Raise InvalidRequest unless it can be a task's name."""
    if not _NAME.fullmatch(task):
        raise InvalidRequest(
            f"task name '{task[:80]}'. Expected up to 64 of a-z, 0-9, '-' and '_', a letter or digit first.",
            param="name",
        )


class HeadStore:
    """All tasks of all apps under one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[Path, Head] = {}

    def tasks(self, app: str) -> list[str]:
        """Names, in order."""
        found = self._of(app).glob("*/*.npz")
        return sorted({path.parent.name for path in found})

    def versions(self, app: str, task: str) -> list[int]:
        """Ascending. Raises NotFound."""
        check_name(task)
        found = sorted(int(path.stem) for path in (self._of(app) / task).glob("*.npz"))
        if not found:
            known = ", ".join(self.tasks(app)) or "none"
            raise NotFound(f"there is no task '{task}'. Known: {known}. Make one: hob task train {task} --data FILE")
        return found

    def load(self, app: str, task: str, version: int | None = None) -> Head:
        """One version, the latest by default. Raises NotFound."""
        versions = self.versions(app, task)
        if version is not None and version not in versions:
            raise NotFound(f"task '{task}' has no version {version}. Known: {', '.join(map(str, versions))}.")
        path = self._of(app) / task / f"{version or versions[-1]}.npz"
        if path not in self._loaded:
            self._loaded[path] = from_file(path)
        return self._loaded[path]

    def save(self, app: str, head: Head) -> Head:
        """Keep it as the next version, which is what is returned."""
        check_name(head.task)
        folder = self._of(app) / head.task
        numbers = [int(path.stem) for path in folder.glob("*.npz")]
        kept = replace(head, version=max(numbers, default=0) + 1)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(folder / f"{kept.version}.npz", to_bytes(kept))
            for number in sorted(numbers)[: max(len(numbers) + 1 - KEPT_VERSIONS, 0)]:
                (folder / f"{number}.npz").unlink()
        except OSError as error:
            raise StorageError(f"task '{head.task}' cannot be kept in {folder}: {error}") from None
        return kept

    def remove(self, app: str, task: str) -> None:
        """Forget a task with all its versions. Raises NotFound."""
        self.versions(app, task)
        folder = self._of(app) / task
        shutil.rmtree(folder)
        self._loaded = {path: head for path, head in self._loaded.items() if path.parent != folder}

    def _of(self, app: str) -> Path:
        return self._folder / hashlib.sha256(app.encode()).hexdigest()[:16]
