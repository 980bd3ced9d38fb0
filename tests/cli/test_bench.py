"""`hob bench` on a tiny model: what it prints, not how fast the machine is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hob.lab.speed import FIGURES, as_shares, with_base
from tests.daemons import hob
from tests.tiny import write_tiny_gguf


def test_figures_and_phases_of_a_model(tmp_path: Path) -> None:
    model = str(write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1"))
    asked = ["--figure", "decode_4", "--figure", "prefill_128", "--rounds", "1"]
    done = hob(tmp_path, "bench", "--model", model, *asked, "--roofline", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["ours"]) == ["prefill_128", "decode_4"]
    assert min(result["ours"].values()) > 0
    assert min(result["peak"].values()) > 0
    phases = {phase["name"]: phase for phase in result["roofline"]["decode_1"]}
    assert {"qkv", "attention", "out", "gate_up", "down", "head"} <= set(phases)
    assert phases["qkv"]["weight_bytes"] > 0
    assert phases["attention"]["weight_bytes"] == 0
    layers = next(phase for phase in result["roofline"]["prefill_512"] if phase["name"] == "layers")
    assert layers["macs"] == 512 * sum(phases[name]["macs"] for name in ("qkv", "out", "gate_up", "down"))


def test_a_figure_that_is_not_known(tmp_path: Path) -> None:
    done = hob(tmp_path, "bench", "--figure", "decode_5")
    assert done.returncode == 2
    assert done.stderr.startswith("hob: figure 'decode_5' is not known. Known: prefill_128, ")


def test_busy_figures_are_shares_of_the_undisturbed_speed() -> None:
    busy = [figure for figure in FIGURES if figure.num_busy]
    assert [figure.key for figure in with_base(busy)] == ["decode_busy_1", "decode_busy_2", "decode_1"]
    values = {"decode_busy_1": 50.0, "decode_busy_2": 20.0, "decode_1": 100.0}
    assert as_shares(values, busy) == pytest.approx({"decode_busy_1": 0.5, "decode_busy_2": 0.2})
