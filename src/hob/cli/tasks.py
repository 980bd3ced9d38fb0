"""`hob task ...`, `hob eval ...`: heads trained on this device, and zero-shot classification measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hob.cli.talk import connected

if TYPE_CHECKING:
    from hob.client import Client

task = typer.Typer(
    name="task",
    help="""Heads: classifiers trained here from your examples, over the shared model.

    \b
    hob task train spam --data messages.csv          columns text and label
    hob task run spam "Win a prize now"              or: --data new.csv --output sorted.csv
    hob task show spam                               how far it can be trusted
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)
evaluate = typer.Typer(
    name="eval", help="Measure the model on data of yours.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="The task's name.")]
Data = Annotated[Path | None, typer.Option(help="A .csv, .tsv or .jsonl file.")]
TextColumn = Annotated[str, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@task.command()
def train(
    name: Name,
    data: Annotated[Path, typer.Option(help="Examples: a .csv, .tsv or .jsonl file with a text and a label each.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    words: Annotated[
        bool | None, typer.Option(help="Whether words of the text count too. Unset: whichever does better.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a head in the background and wait for it. It replaces the one in use only if it is better.

    \b
    hob task train spam --data messages.csv
    hob task train spam --data messages.csv --text-column body --label-column folder
    """
    from hob.cli.output import print_json
    from hob.tasks.datasets import read_examples

    examples = [{"text": e.text, "label": e.label} for e in read_examples(data, text_column, label_column)]
    with connected() as client:
        client.train_task(name, examples, **({} if words is None else {"words": words}))
        result = _followed(client, name)
    if json:
        print_json(result)
        return
    print(f"{'version ' + str(result['version']) if result['is_kept'] else 'not kept'}: {result['reason']}")


def _followed(client: Client, name: str) -> dict[str, Any]:
    """The result of a training, whose progress is shown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=None)

        def show(training: dict[str, Any]) -> None:
            progress.update(bar, description=training["step"], completed=training["done"], total=training["of"] or None)

        return client.trained_task(name, show)


@task.command()
def run(
    name: Name,
    text: Annotated[str | None, typer.Argument(help="A text. Without it: --data.")] = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Where the CSV goes. Unset: to the terminal.")] = None,
    text_column: TextColumn = "text",
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Abstain below it. Unset: the head's own. 0: never.")
    ] = None,
    json: Json = False,
) -> None:
    """Classify a text, or the rows of a file: the same rows come out with label, probability and out_of_domain.

    An abstention is an empty label.

    \b
    hob task run spam "Win a prize now"
    hob task run spam --data new.csv --output sorted.csv
    """
    from hob.cli.output import print_json
    from hob.tasks import files

    options = {} if min_confidence is None else {"min_confidence": min_confidence}
    with connected() as client:
        if text is not None:
            (answer,) = client.run_task(name, [text], **options)
            if json:
                print_json(answer)
                return
            doubt = " (unlike what it was trained on)" if answer["out_of_domain"] else ""
            label = answer["label"] or f"unsure, perhaps {answer['best']}"
            print(f"{label}  {answer['probability']:.3f}{doubt}")
            return
        files.classify_file(data, output, text_column, lambda texts: client.run_task(name, texts, **options))


@task.command(name="list")
def list_tasks(json: Json = False) -> None:
    """List the trained tasks of the command line.

    \b
    hob task list
    """
    from hob.cli.output import print_json, print_table

    with connected() as client:
        tasks = client.tasks()
    if json:
        print_json(tasks)
        return
    rows = [
        (t["id"], t["version"], len(t["labels"]), t["trust"]["num_train"], f"{t['trust']['macro_f1']:.3f}", t["model"])
        for t in tasks
        if "version" in t
    ]
    header = ("task", "version", "labels", "examples", "macro-F1", "model")
    print_table(header, rows, "no tasks of the command line. Train one: hob task train NAME --data FILE")


@task.command()
def show(name: Name, json: Json = False) -> None:
    """Show what a task is and how far it can be trusted.

    \b
    hob task show spam
    """
    from hob.cli.output import print_json, print_table
    from hob.tasks.files import trust_lines

    with connected() as client:
        found = client.task(name)
    if json:
        print_json(found)
        return
    if "trust" not in found:
        error = found["training"]["error"]
        print(f"{name}: {found['training']['step']}" if error is None else f"{name}: not trained. {error['message']}")
        return
    print(
        f"{name} version {found['version']} of {found['model']} {found['quantisation']}: {', '.join(found['labels'])}"
    )
    print("\n".join(trust_lines(found)))
    rows = [(f"{c:.3f}", f"{share:.0%}", f"{right:.1%}") for c, share, right in found["trust"]["coverage"]]
    print_table(("confidence from", "of texts", "right"), rows)


@task.command()
def rm(name: Name) -> None:
    """Forget a task with all its versions.

    \b
    hob task rm spam
    """
    with connected() as client:
        client.delete_task(name)


@evaluate.command(name="zero-shot")
def zero_shot(
    data: Annotated[Path, typer.Option(help="Folder with data sets as NAME.jsonl or NAME.csv.")],
    only: Annotated[str, typer.Option(help="Names, with commas between them. Unset: all that are known.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Texts of each set at most, drawn by a hash.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for results and report; what is there is not asked again.")] = Path(
        "zero-shot"
    ),
    base_url: Annotated[
        str | None, typer.Option(help="Another server that echoes log-probabilities, e.g. http://127.0.0.1:8000/v1")
    ] = None,
    model: Annotated[str, typer.Option(help="The model's name at that server.")] = "default",
    max_chars: Annotated[int, typer.Option(min=100, help="Longer texts lose their middle.")] = 4000,
    json: Json = False,
) -> None:
    """Score label words six ways on data sets that have prompts, and write report.md and report.html.

    \b
    hob eval zero-shot --data ~/datasets --only sms,trec
    """
    import contextlib

    from hob.cli.output import print_json, print_table
    from hob.tasks import report, zero_shot

    plan = zero_shot.Plan(data, [name for name in only.split(",") if name], rows, max_chars, out)
    with contextlib.ExitStack() as stack:
        server: zero_shot.Server
        if base_url is None:
            server = zero_shot.HobServer(stack.enter_context(connected()))
        else:
            server = echo = stack.enter_context(zero_shot.EchoServer(base_url, model))
            echo.check_echo()
        results = zero_shot.run(plan, server, _bar)
    report.write(out, results)
    if json:
        print_json([report.row_object(result) for result in results])
        return
    print_table(report.HEADER, [report.table_row(result) for result in results])
    print(f"report: {out / 'report.md'}, {out / 'report.html'}")


@evaluate.command(name="few-shot")
def few_shot(
    data: Annotated[Path, typer.Option(help="A file of examples, or a folder of them: .jsonl, .csv, .tsv.")],
    only: Annotated[str, typer.Option(help="Names of files, with commas between them. Unset: all of the folder.")] = "",
    counts: Annotated[str, typer.Option(help="Numbers of examples.")] = "8,32,128,512",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each number.")] = 5,
    out: Annotated[
        Path, typer.Option(help="Folder for curves and the model's states, which are not asked again.")
    ] = Path("few-shot"),
    json: Json = False,
) -> None:
    """What heads reach from few examples: macro-F1 on rows they have not seen, as few-shot.md and few-shot.svg.

    \b
    hob eval few-shot --data messages.csv
    """
    import msgspec

    from hob.cli.output import print_json, print_table
    from hob.errors import UserError
    from hob.tasks import few_shot

    try:
        numbers = tuple(int(count) for count in counts.split(","))
    except ValueError:
        raise UserError(f"--counts is '{counts}'. Expected numbers with commas between them, e.g. 8,32,128.") from None
    plan = few_shot.Plan(data, [name for name in only.split(",") if name], numbers, seeds, out / "states")
    with connected() as client:
        curves = few_shot.run(plan, client, lambda what, done, of: _bar(what, done, of, None))
    few_shot.write(out, curves, numbers)
    if json:
        print_json([msgspec.to_builtins(curve, str_keys=True) for curve in curves])
        return
    header, *rows = few_shot.table(curves, numbers)
    print_table(header, rows)
    print(f"curves: {out / 'few-shot.md'}, {out / 'few-shot.svg'}")


def _bar(name: str, done: int, of: int, left_s: float | None) -> None:
    import sys

    end = "\n" if done == of else ""
    left = "" if left_s is None else f", {left_s:.0f} s left"
    print(f"\r{name}: {done} of {of}{left}   ", end=end, file=sys.stderr, flush=True)
