"""The `hob` command as a user meets it: real processes, the fake engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hob.cli.main import app
from hob.memory import is_running
from tests.daemons import Daemon, environment, hob, running, short_folder, until

HEAVY = ("httpx", "numpy", "starlette", "uvicorn", "tokenizers", "msgspec", "asyncio", "rich")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


def one_line(stderr: str) -> str:
    """The error, which must be the only line and ours."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("hob: ")
    return lines[0]


def test_help_is_light_and_shows_every_command(tmp_path: Path) -> None:
    code = "import sys; from hob.cli.main import _run; _run(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & set(HEAVY), "`hob --help` must stay fast: import these inside the commands"
    for command in app.registered_commands:
        assert f"  {command.name} " in done.stdout


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_each_help_teaches_with_an_example(command: str, tmp_path: Path) -> None:
    done = hob(tmp_path, command, "--help")
    assert done.returncode == 0
    body = done.stdout.split("Options:")[0]
    assert f"hob {command}" in body.split("\n", 2)[2] or command in ("stop", "rm", "list"), body


def commands_of(group: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield from commands_of(command, (*words, name)) if hasattr(command, "commands") else [((*words, name), command)]


def test_each_help_of_a_groups_command_teaches_with_an_example() -> None:
    found = [each for each in commands_of(typer.main.get_command(app), ("hob",)) if len(each[0]) > 2]
    assert len(found) > 10
    for words, command in found:
        assert " ".join(words) in command.help, words


def test_a_task_that_is_not_there_leaves_no_file_and_a_failed_training_says_why(daemon: Daemon, tmp_path: Path) -> None:
    data, out = tmp_path / "few.csv", tmp_path / "out.csv"
    data.write_text("text,label\nHello,a\nGoodbye,b\n")
    assert "no task 'few'" in one_line(hob(daemon.home, "task", "run", "few", "--data", data, "--output", out).stderr)
    assert not out.exists()
    done = hob(daemon.home, "task", "train", "few", "--data", data)
    assert done.returncode == 2
    assert "label" in done.stderr
    assert hob(daemon.home, "task", "show", "few").stdout.startswith("few: not trained. ")


def test_top_draws_what_json_says(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.chat("Hello", max_tokens=2)
    shown = hob(daemon.home, "top", "--once").stdout
    state = json.loads(hob(daemon.home, "top", "--json").stdout)
    assert state["models"][0]["is_loaded"]
    assert all(each["app"][:6] in shown for each in state["apps"])
    assert "memory" in shown
    assert "processes" in shown


def test_every_line_of_a_json_log_is_an_object() -> None:
    with running(log_json="true") as daemon:
        with daemon.client() as client:
            client.chat("Hello", max_tokens=2)
        until(lambda: "/v1/chat/completions" in daemon.log, "the line")
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert {line["logger"].split(".")[1] for line in lines} >= {"daemon", "engine", "api"}
    (asked,) = [line for line in lines if line.get("endpoint") == "POST /v1/chat/completions"]
    assert (asked["status"], asked["class"], asked["output_tokens"]) == (200, "standard", 2)
    assert asked["ttft_ms"] <= asked["ms"]


def test_a_typo_is_answered_with_the_command_that_was_meant(tmp_path: Path) -> None:
    done = hob(tmp_path, "srve")
    assert done.returncode == 2
    assert "'serve'" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run"], "prompt"),
        (["run", "x", "--temprature", "1"], "--temperature"),
        (["run", "x", "--max-tokens", "0"], "--max-tokens"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--port", "70000"], "at most 65535"),
        (["serve", "--isa", "mmx"], "avx512"),
        (["rm", "no-such-model"], "no-such-model"),
        (["pull", "smollm2-135"], "smollm2-135m"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], expected: str, tmp_path: Path) -> None:
    done = hob(tmp_path, *words)
    assert done.returncode == 2
    assert expected in one_line(done.stderr)


def test_a_wrong_setting_in_the_environment_is_named(tmp_path: Path) -> None:
    done = hob(tmp_path, "config", threads="many")
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert "'threads'" in line
    assert "'many'" in line
    assert "HOB_THREADS" in line


def test_config_tells_where_each_value_comes_from(tmp_path: Path) -> None:
    (tmp_path / "config" / "hob").mkdir(parents=True)
    toml = tmp_path / "config" / "hob" / "hob.toml"
    toml.write_text("[scheduler]\nmax_running = 7\n")
    found = json.loads(hob(tmp_path, "config", "--json", threads="3").stdout)
    assert found["threads"] == {"section": "engine", "value": 3, "origin": "environment HOB_THREADS"}
    assert found["max_running"] == {"section": "scheduler", "value": 7, "origin": str(toml)}
    assert found["host"]["origin"] == "default"
    assert "max_running" in hob(tmp_path, "config").stdout


def test_without_a_daemon_ps_says_how_to_start_one_and_fails(tmp_path: Path) -> None:
    with short_folder() as home:
        done = hob(home, "ps")
        assert done.returncode == 1
        assert "`hob serve`" in one_line(done.stderr)


def test_stop_without_a_daemon_is_fine() -> None:
    with short_folder() as home:
        done = hob(home, "stop")
        assert (done.returncode, done.stdout) == (0, f"no daemon runs on {home}/run/hob.sock\n")


def test_run_starts_a_daemon_says_so_and_uses_it_again() -> None:
    with short_folder() as home:
        try:
            first = hob(home, "run", "hello", "--max-tokens", "5", "--temperature", "0")
            assert first.returncode == 0, first.stderr
            assert "daemon started" in one_line(first.stderr)
            assert "`hob stop`" in first.stderr
            again = hob(home, "run", "hello", "--max-tokens", "5", "--temperature", "0", "--no-stream")
            assert again.stderr == ""
            assert again.stdout == first.stdout
            assert (home / "logs" / "hob.log").read_text()
        finally:
            stopped = hob(home, "stop")
        assert stopped.stdout.startswith("stopped (pid ")


def test_serve_background_prints_where_it_is() -> None:
    with short_folder() as home:
        done = hob(home, "serve", "--background")
        try:
            assert done.returncode == 0, done.stderr
            assert "http://127.0.0.1:" in done.stdout
            again = hob(home, "serve", "--background")
            assert (again.returncode, again.stdout) == (2, "")
            assert "a daemon is already running" in one_line(again.stderr)
        finally:
            assert hob(home, "stop").returncode == 0


def test_run_reads_stdin_and_prints_json(daemon: Daemon) -> None:
    done = hob(daemon.home, "run", "-", "--json", "--max-tokens", "4", "--system", "short", stdin="hello")
    reply = json.loads(done.stdout)
    assert reply["usage"]["completion_tokens"] == 4
    assert reply["usage"]["prompt_tokens"] == len("system: short\nuser: hello\nassistant: ")


def test_chat_takes_lines_and_reset_forgets(daemon: Daemon) -> None:
    done = hob(
        daemon.home, "chat", "--max-tokens", "4", "--temperature", "0", stdin="one\n\n/reset\none\n/what\n/exit\nno\n"
    )
    assert done.returncode == 0
    first, second = done.stdout.split("\n")[:2]
    assert first == second, "after /reset the same question has the same answer"
    assert one_line(done.stderr) == "hob: unknown command '/what'. Known: /reset, /exit"


def test_chat_remembers_without_reset(daemon: Daemon) -> None:
    before = json.loads(hob(daemon.home, "ps", "--json").stdout)
    hob(daemon.home, "chat", "--max-tokens", "4", stdin="one\ntwo\n")
    after = json.loads(hob(daemon.home, "ps", "--json").stdout)
    prompt_tokens = [sum(app["num_prompt_tokens"] for app in report["apps"]) for report in (before, after)]
    alone = len("user: one\nassistant: ") + len("user: two\nassistant: ")
    assert prompt_tokens[1] - prompt_tokens[0] > alone


def test_classify_prints_probabilities_that_sum_to_one(daemon: Daemon) -> None:
    done = hob(daemon.home, "classify", "a train", "--labels", "food, travel,money", "--json")
    labels = json.loads(done.stdout)["labels"]
    assert [entry["label"] for entry in labels] == ["food", "travel", "money"]
    assert sum(entry["probability"] for entry in labels) == pytest.approx(1.0)
    lines = hob(daemon.home, "classify", "a train", "--labels", "food,travel").stdout.splitlines()
    assert len(lines) == 2


def test_ps_counts_apps_blocks_and_memory(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.chat("hello", max_tokens=3)
    report = json.loads(hob(daemon.home, "ps", "--json").stdout)
    assert report["pid"] == daemon.process.pid
    roles = {process["role"]: process["pss_bytes"] for process in report["processes"]}
    assert set(roles) == {"api", "engine"}
    assert report["pss_bytes"] == sum(roles.values()) > 10_000_000
    assert any(app["app"].endswith("/test") and app["num_requests"] >= 1 for app in report["apps"])
    assert "/test" in hob(daemon.home, "ps").stdout


@pytest.mark.parametrize("words", [("app", "list"), ("public", "list"), ("task", "list")])
def test_an_empty_list_says_so_and_leaves_standard_output_to_rows(words: tuple[str, ...], daemon: Daemon) -> None:
    done = hob(daemon.home, *words)
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.startswith("no "), done.stderr


def test_list_shows_the_default_model(tmp_path: Path) -> None:
    found = json.loads(hob(tmp_path, "list", "--json").stdout)
    default = next(model for model in found if model["name"] == "smollm2-135m")
    assert default["installed"] is False
    assert "hob pull smollm2-135m" in hob(tmp_path, "list").stdout


def test_interrupted_is_130() -> None:
    with running(model="fake:20") as slow:
        command = [sys.executable, "-m", "hob", "run", "hello", "--max-tokens", "4000"]
        process = subprocess.Popen(
            command,
            env=environment(slow.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        with process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m hob config | head -1"
    done = subprocess.run(command, shell=True, env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("section")
    assert done.stderr == ""


def test_a_daemon_in_the_background_outlives_its_starter() -> None:
    with short_folder() as home:
        try:
            hob(home, "run", "hello", "--max-tokens", "1")
            pid = json.loads(hob(home, "ps", "--json").stdout)["pid"]
            time.sleep(0.2)
            assert os.getsid(pid) == pid, "it leads a session of its own: closing the terminal does not end it"
        finally:
            hob(home, "stop")
        until(lambda: not is_running(pid), "the daemon to end")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_broken_off_leaves_no_daemon(number: int) -> None:
    with short_folder() as tmp_path:
        breaks_off(number, tmp_path)


def breaks_off(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hob", "demo"],
        env=environment(tmp_path, model="fake:20") | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        until(lambda: "Three programs" in process.stdout.readline(), "the second part", 30)
        daemons = [int(path.read_text()) for path in tmp_path.glob("hob-demo-*/*/run/hob.lock")]
        assert daemons
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else 128 + number)
    assert not any(is_running(pid) for pid in daemons)
    assert not list(tmp_path.glob("hob-demo-*"))
