"""Zero-shot evaluation and the task commands over a daemon on the fake engine: what is asked, kept and printed."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hob.errors import UserError
from hob.tasks import zero_shot
from hob.tasks.datasets import Example
from tests.daemons import Daemon, hob, running

EXAMPLES = [
    Example(f"Message {i} about a prize", "spam") if i % 3 == 0 else Example(f"Message {i} about lunch", "not spam")
    for i in range(12)
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake") as started:
        yield started


class Counting:
    """A server that counts the prompts it is asked for."""

    def __init__(self, server: zero_shot.Server, fail_after: int = 1000) -> None:
        self.name = server.name
        self.num_asked = 0
        self._server, self._fail_after = server, fail_after

    def scores(self, prompts: list[str], words: list[str]) -> list[zero_shot.Scores]:
        self.num_asked += len(prompts)
        if self.num_asked > self._fail_after:
            raise UserError("interrupted on purpose")
        return self._server.scores(prompts, words)


def test_hob_and_an_echoing_server_say_the_same(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.client() as client:
        by_hob = zero_shot.scored("sms", EXAMPLES, zero_shot.HobServer(client), tmp_path, 500)
    with zero_shot.EchoServer(f"http://127.0.0.1:{daemon.state.port}/v1", "default") as server:
        by_echo = zero_shot.scored("sms", EXAMPLES, server, tmp_path, 500)
    assert by_hob.scores.counts.tolist() == by_echo.scores.counts.tolist() == [7.0, 5.0]
    for name in ("sums", "prior", "premise", "content_free"):
        assert getattr(by_echo.scores, name) == pytest.approx(getattr(by_hob.scores, name), abs=1e-4)


TABLE = {
    (" Answer:", " spam"): 0.25,
    (" Answer:", " not"): 0.5,
    (" not", " spam"): 0.2,
    (" Wednesday,", " Thursday"): 0.9,
}
"""p(word | the word before); all others .01."""


class Bigrams(BaseHTTPRequestHandler):
    """A server whose echo is known by hand. `is_shifted`: each token gets what it would have one place later."""

    is_shifted = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = re.findall(r" ?\S+", body["prompt"])
        told = list(zip(words if self.is_shifted else ["", *words], words, strict=False))
        values = [None, *(math.log(TABLE.get(pair, 0.01)) for pair in told[1:])]
        offsets = [len("".join(words[:i])) for i in range(len(words))]
        if not body["echo"]:
            values, offsets = [math.log(0.9)], [len(body["prompt"])]
        logprobs = {"token_logprobs": values, "text_offset": offsets}
        reply = json.dumps({"choices": [{"text": " Thursday", "logprobs": logprobs}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Shifted(Bigrams):
    is_shifted = True


@contextmanager
def served(handler: type[Bigrams]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def test_an_echo_by_hand() -> None:
    """ln .25 over one token; ln .5 + ln .2 over two."""
    with served(Bigrams) as url, zero_shot.EchoServer(url, "bigrams") as server:
        server.check_echo()
        ((sums, counts),) = server.scores(["A prize! Answer:"], [" spam", " not spam"])
    assert sums == pytest.approx([math.log(0.25), math.log(0.1)])
    assert counts == [1, 2]


def test_an_echo_that_is_off_by_one_is_refused() -> None:
    with (
        served(Shifted) as url,
        zero_shot.EchoServer(url, "bigrams") as server,
        pytest.raises(UserError, match=r"' Thursday' had -0.11 .* and -4.61"),
    ):
        server.check_echo()


def test_an_interrupted_run_goes_on(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "CALL_PROMPTS", 4)
    with daemon.client() as client:
        server = zero_shot.HobServer(client)
        broken = Counting(server, fail_after=9)
        with pytest.raises(UserError, match="on purpose"):
            zero_shot.scored("sms", EXAMPLES, broken, tmp_path, 500)
        (kept,) = tmp_path.glob("*.jsonl")
        with kept.open("a") as file:
            file.write('\n["cut off')
        whole, again = Counting(server), Counting(server)
        first = zero_shot.scored("sms", EXAMPLES, whole, tmp_path, 500)
        assert whole.num_asked == 12 + 5 - 8, "what two calls brought is not asked again"
        assert zero_shot.scored("sms", EXAMPLES[::-1], again, tmp_path, 500).answers() == {
            name: answers[::-1] for name, answers in first.answers().items()
        }
        assert again.num_asked == 0
        fresh = zero_shot.scored("sms", EXAMPLES, server, tmp_path / "fresh", 500)
        assert fresh.scores.sums.tolist() == first.scores.sums.tolist()


def test_labels_without_words_are_named() -> None:
    with pytest.raises(UserError, match="urgent"):
        zero_shot._prompt_of("sms", [Example("a", "urgent")])
    with pytest.raises(UserError, match="Known: agnews"):
        zero_shot._prompt_of("unknown", [])


def test_prompts_are_whole() -> None:
    for name, prompt in zero_shot.prompts().items():
        assert "{text}" in prompt.prompt, name
        assert len(set(prompt.words.values())) == len(prompt.words), name
        assert all(word.startswith(" ") for word in prompt.words.values()), name
        filled = prompt.filled("The <e1>cat</e1> {e2} sat on <e2>it</e2>.", 500)
        assert "The cat {e2} sat on it." in filled, "what a text says is no field"
    assert len(zero_shot.shortened("x" * 5000, 100)) == 105


def test_the_report(daemon: Daemon, tmp_path: Path) -> None:
    rows = [{"text": e.text, "label": e.label} for e in EXAMPLES]
    (tmp_path / "sms.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("eval", "zero-shot", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    done = hob(daemon.home, *words, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "contextual_calibration" in done.stdout
    assert "sms: " in done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| sms | 6 |" in text
    assert "Of the variance" in text
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_few_shot_curves(daemon: Daemon, tmp_path: Path) -> None:
    words = {"food": ["bread", "soup", "apple"], "travel": ["train", "ship", "ticket"]}
    rows = [{"text": f"{words[label][i % 3]} {i}", "label": label} for i in range(40) for label in words]
    (tmp_path / "topics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    call = ("eval", "few-shot", "--data", str(tmp_path), "--counts", "4,16,512", "--seeds", "2", "--out", str(out))
    done = hob(daemon.home, *call, timeout_s=240)
    assert done.returncode == 0, done.stderr
    (curve,) = json.loads((out / "few-shot.json").read_text())
    assert curve["num_train"] + curve["num_test"] == 80
    assert {int(count): len(scores) for count, scores in curve["scores"].items()} == {
        4: 2,
        16: 2,
        curve["num_train"]: 1,
    }
    assert curve["scores"][str(curve["num_train"])][0] > 0.9 > curve["majority"]
    assert "| topics |" in (out / "few-shot.md").read_text()
    assert "<svg" in (out / "few-shot.svg").read_text()
    wrong = hob(daemon.home, "eval", "few-shot", "--data", str(tmp_path), "--only", "other", "--out", str(out))
    assert wrong.returncode != 0
    assert "topics" in wrong.stderr


def test_task_commands(daemon: Daemon, tmp_path: Path) -> None:
    lines = ["text,label", *(f"win a prize {i},spam\nlunch at noon {i},ok" for i in range(30))]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    done = hob(daemon.home, "task", "train", "spam", "--data", str(tmp_path / "data.csv"), timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "version 1: macro-F1" in done.stdout
    assert "spam" in hob(daemon.home, "task", "list").stdout
    assert "it answers where it is at least" in hob(daemon.home, "task", "show", "spam").stdout
    out = tmp_path / "out.csv"
    words = ("task", "run", "spam", "--data", str(tmp_path / "data.csv"), "--output", str(out), "--min-confidence", "0")
    assert hob(daemon.home, *words).returncode == 0
    answers = [line.split(",") for line in out.read_text().splitlines()[1:]]
    assert sum((a[1] == "spam") == ("prize" in a[0]) for a in answers) >= 55
    assert hob(daemon.home, "task", "run", "spam", "win a prize 3").stdout.strip()
    assert hob(daemon.home, "task", "rm", "spam").returncode == 0
    gone = hob(daemon.home, "task", "show", "spam")
    assert (gone.returncode, "hob task train spam" in gone.stderr) == (2, True)


def test_classify_a_file(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\n1,hello\n2,bye\n")
    done = hob(daemon.home, "classify", "--data", str(tmp_path / "in.csv"), "--labels", "a,b")
    lines = done.stdout.splitlines()
    assert lines[0] == "id,text,label,probability,out_of_domain"
    assert [line.split(",")[:2] for line in lines[1:]] == [["1", "hello"], ["2", "bye"]]
    assert "--data" in hob(daemon.home, "classify", "--labels", "a,b").stderr
