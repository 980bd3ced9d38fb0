"""`hob install`, `hob uninstall`, `hob restart`, `hob doctor`, `hob completion`: Hob as a part of this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
UNITS = ("hob.socket", "hob.service")
RESTART_TIMEOUT_S = 180.0


class Shell(StrEnum):
    """Those whose completion is known."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def install(
    idle: Annotated[float, typer.Option(min=0, help="Seconds without a request after which it ends. 0: never.")] = 900,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Also open the sockets now.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the units and write nothing.")] = False,
) -> None:
    """Write systemd user units: from then on the first connection starts Hob, and it ends when nobody needs it.

    \b
    hob install
    hob install --dry-run
    """
    import sys

    from hob.config import load_config
    from hob.units import memory_max, service_unit, socket_unit, units_folder

    config, _ = load_config()
    service = service_unit(config, [sys.executable, "-m", "hob"], memory_max(config), idle)
    texts = dict(zip(UNITS, (socket_unit(config), service), strict=True))
    folder = units_folder()
    for name, text in texts.items():
        if dry_run:
            print(f"# {folder / name}\n{text}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / name}")
    if dry_run:
        return
    if not start or not _systemctl("daemon-reload"):
        print("to start it: systemctl --user daemon-reload && systemctl --user enable --now hob.socket")
        return
    _systemctl("enable", "--now", "hob.socket")
    print("listening; the first connection starts it. Logs: journalctl --user -u hob")


def uninstall() -> None:
    """Remove the systemd units. Models, contexts and settings stay.

    \b
    hob uninstall
    """
    from hob.units import units_folder

    found = [units_folder() / name for name in UNITS if (units_folder() / name).exists()]
    if not found:
        print(f"no units of hob in {units_folder()}")
        return
    _systemctl("disable", "--now", *UNITS)
    for path in found:
        path.unlink()
        print(f"removed {path}")
    _systemctl("daemon-reload")


def restart() -> None:
    """Start the daemon anew, with the program as it is installed now. Its sockets stay open: clients wait, none fails.

    \b
    hob restart
    """
    import os
    import signal
    import time

    from hob.cli.background import is_healthy
    from hob.config import load_config
    from hob.errors import DaemonUnreachable, ServiceError
    from hob.rundir import RunDir

    config, _ = load_config()
    rundir = RunDir(config.socket_path)
    before = rundir.read_state()
    if before is None:
        raise DaemonUnreachable(f"no daemon runs on '{config.socket_path}'. Start one with `hob serve`.")
    os.kill(before.pid, signal.SIGUSR2)
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while (state := rundir.read_state()) is None or state.started == before.started:
        if rundir.holder() is None or time.monotonic() > deadline:
            raise ServiceError(f"the daemon (pid {before.pid}) did not come back. See its log, or `hob serve`.")
        time.sleep(0.05)
    if not is_healthy(config.socket_path):
        raise ServiceError("the daemon came back and does not answer. See its log.")
    print(f"restarted (pid {state.pid}, version {state.version})")


def doctor(json: Json = False) -> None:
    """Look for what is wrong with this machine or installation, and say what to do.

    \b
    hob doctor
    """
    from dataclasses import asdict

    from hob.cli.output import print_json
    from hob.doctor import examine

    findings = examine()
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:4}  {finding.what:10}  {finding.says}")
            if finding.then:
                print(f"{'':16}  -> {finding.then}")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def completion(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> None:
    """Print the completion of a shell.

    \b
    hob completion bash > ~/.local/share/bash-completion/completions/hob
    hob completion zsh > ~/.zfunc/_hob
    hob completion fish > ~/.config/fish/completions/hob.fish
    """
    from typer._completion_shared import get_completion_script

    print(get_completion_script(prog_name="hob", complete_var="_HOB_COMPLETE", shell=shell.value))


def _systemctl(*words: str) -> bool:
    """Tell the user's own systemd, if one runs. Whether it took it."""
    import shutil
    import subprocess

    if shutil.which("systemctl") is None:
        return False
    done = subprocess.run(["systemctl", "--user", *words], capture_output=True, check=False)
    return done.returncode == 0
