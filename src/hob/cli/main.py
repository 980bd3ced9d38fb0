"""The `hob` command: the table of commands, and the one place where errors become a line and an exit status.

    0   done                    1   the service cannot do it (ServiceError)
    2   the user can mend it    130 interrupted

Commands parse, call the client or the daemon, and print; what they do lives there. Their imports are inside the
functions, so that `hob --help` and completion stay fast.
"""

from __future__ import annotations

import os
import sys

import typer

from hob.cli import apps, bench, look, machine, memory, models, policy, public, service, settings, show, talk, tasks
from hob.errors import HobError, UserError

INTERRUPTED = 130

app = typer.Typer(
    name="hob",
    help="""One daemon holds a small language model; every app of this device shares it.

    \b
    hob demo                         see it work: three programs, one model
    hob run "Name three rivers."     one answer; starts the daemon if none runs
    hob chat                         talk to it
    hob ps                           who uses it, and what it takes

    OpenAI clients use http://127.0.0.1:11435/v1 with any key.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from hob import __version__

        print(f"hob {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for _command in (
    service.serve,
    service.stop,
    service.ps,
    look.top,
    look.dashboard,
    talk.run,
    talk.chat,
    talk.classify,
    models.pull,
    models.list_models,
    models.rm,
    settings.config,
    memory.memory,
    show.demo,
    bench.bench,
    machine.install,
    machine.uninstall,
    machine.restart,
    machine.doctor,
    machine.completion,
):
    app.command(name=_command.__name__.removesuffix("_models"))(_command)


for _group in (apps.group, public.group, policy.group, tasks.task, tasks.evaluate):
    app.add_typer(_group)


def main(args: list[str] | None = None) -> None:
    """Entry point. Exits with the status above."""
    sys.exit(_run(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    if "_HOB_COMPLETE" in os.environ:  # a shell asks what could come next
        from typer._completion_classes import completion_init

        completion_init()
    try:
        status = typer.main.get_command(app)(args, prog_name="hob", standalone_mode=False)
        sys.stdout.flush()
    except HobError as error:
        print(f"hob: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `hob list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _usage_error(error)
    return status if isinstance(status, int) else 0


def _usage_error(error: Exception) -> int:
    """Typer's own errors (a wrong option or argument) as one line; anything else is ours and is raised on."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        raise error
    context = getattr(error, "ctx", None)
    text = " ".join(describe().split())
    if not text:  # `hob` alone: the help is the answer, and typer has printed it
        return 2
    text += "" if text[-1] in ".?" else "."
    print(f"hob: {text} See `{context.command_path if context else 'hob'} --help`.", file=sys.stderr)
    return int(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
