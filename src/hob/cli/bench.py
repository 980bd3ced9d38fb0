"""`hob bench`: how fast the engine is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hob.lab.speed import Phase


def bench(
    model: Annotated[str | None, typer.Option(help="Catalogue name or path of a GGUF file.")] = None,
    isa: Annotated[str | None, typer.Option(help="auto, portable, avx2, avx512 or amx.")] = None,
    figure: Annotated[list[str] | None, typer.Option(help="Only this one, decode_1 say; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The median of this many counts.")] = 3,
    roofline: Annotated[bool, typer.Option("--roofline", help="Also where a step's time goes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode, alone and beside busy processes. A minute; best while the daemon is idle.

    \b
    hob bench
    hob bench --roofline --figure decode_1
    """
    from rich.console import Console
    from rich.progress import Progress

    from hob.cli.background import fetch_if_missing
    from hob.cli.output import print_json, print_table
    from hob.config import load_config
    from hob.errors import UserError
    from hob.lab.speed import FIGURES, SpeedTest, measure_all, peaks, with_base
    from hob.models.catalog import Catalog
    from hob.models.pack import ensure_packed

    config, _ = load_config({"model": model, "isa": isa})
    known = [f.key for f in FIGURES]
    if unknown := sorted(set(figure or []) - set(known)):
        raise UserError(f"figure '{unknown[0]}' is not known. Known: {', '.join(known)}.")
    chosen = [f for f in FIGURES if not figure or f.key in figure]
    fetch_if_missing(config)
    test = SpeedTest(ensure_packed(Catalog(config.models_dir).resolve(config.engine.model)), config.engine)
    with Progress(console=Console(stderr=True, quiet=json), transient=True) as progress:
        task = progress.add_task("measuring", total=rounds * len(with_base(chosen)))
        measured = measure_all(test, chosen, rounds, lambda: progress.advance(task))
    peak = peaks(test.info.num_threads)
    steps = (
        {"decode_1": test.phases("decode", 1, 128), "prefill_512": test.phases("prefill", 512, 0)} if roofline else {}
    )
    test.close()
    if json:
        lines = {key: [vars(phase) for phase in phases] for key, phases in steps.items()}
        print_json(
            {"ours": measured, "peak": peak, "isa": test.info.isa, "threads": test.info.num_threads, "roofline": lines}
        )
        return
    print(f"{config.engine.model}: isa {test.info.isa} ({test.info.isa_reason}), {test.info.num_threads} threads")
    print_table(["figure", "value"], [[f.title, f"{measured[f.key]:.{2 if f.num_busy else 0}f}"] for f in chosen])
    print(f"memory read {peak['read_gb_s']:.1f} GB/s, float32 {peak['float32_gmacs']:.0f} G multiply-adds/s (by NumPy)")
    for key, phases in steps.items():
        print(f"\none step of {key}")
        header = ["phase", "us", "share", "weights GB/s", "of memory read", "G multiply-adds/s", "of float32"]
        print_table(header, _rows(phases, peak))


def _rows(phases: list[Phase], peak: dict[str, float]) -> list[list[str]]:
    """Rates where weights are read; a dash elsewhere."""
    total = sum(phase.ns for phase in phases)
    rows = []
    for phase in phases:
        read, macs = phase.weight_bytes / phase.ns, phase.macs / phase.ns
        rates = [f"{read:.1f}", f"{read / peak['read_gb_s']:.2f}", f"{macs:.0f}", f"{macs / peak['float32_gmacs']:.2f}"]
        known = rates if phase.weight_bytes else ["-"] * 4
        rows.append([phase.name, f"{phase.ns / 1000:.0f}", f"{phase.ns / total:.2f}", *known])
    return rows
