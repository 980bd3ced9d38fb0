"""Tag notes without any training: the model says which of your tags fits each note.

    python examples/tag_notes.py ~/notes --tags work,home,travel,money            say what it would write
    python examples/tag_notes.py ~/notes --tags work,home,travel,money --write    and write it

A note is a .md file; its tag is a first line "tag: NAME". Notes that have one already are not touched: they show how
far the model can be trusted on yours. Below --min-confidence a note stays untagged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import hob
from hob.tasks import metrics
from hob.tasks.files import in_calls

MARK = "tag: "
MAX_CHARS = 1500


def main() -> None:
    """Tag what is untagged, and say how the tagged ones would have come out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notes", type=Path)
    parser.add_argument("--tags", required=True)
    parser.add_argument("--min-confidence", type=float, default=0.6)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tags = [tag.strip() for tag in args.tags.split(",") if tag.strip()]
    truth, answers = [], []
    with hob.Client(app="notes") as client:
        notes = {path: path.read_text(encoding="utf-8") for path in sorted(args.notes.glob("**/*.md"))}
        asked = [body_of(text)[:MAX_CHARS] for text in notes.values()]
        replies = list(in_calls(asked, lambda texts: client.classify(texts, tags)["data"]))
        for (path, text), reply in zip(notes.items(), replies, strict=True):
            tagged = text.partition("\n")[0]
            probability = max(entry["probability"] for entry in reply["labels"])
            if tagged.startswith(MARK):
                truth.append(tagged.removeprefix(MARK).strip())
                answers.append(reply["label"])
                continue
            is_sure = probability >= args.min_confidence
            print(f"{reply['label'] if is_sure else '-':12} {probability:.2f}  {path.name}")
            if is_sure and args.write:
                path.write_text(f"{MARK}{reply['label']}\n{text}", encoding="utf-8")
    print(trust(truth, answers))


def body_of(text: str) -> str:
    """A note without its tag."""
    return text.partition("\n")[2] if text.startswith(MARK) else text


def trust(truth: list[str], answers: list[str]) -> str:
    """What to expect, from the notes that had a tag."""
    if not truth:
        return "how far to trust it: unknown, no note has a tag yet. Tag some by hand."
    most = metrics.majority(truth)
    return (
        f"how far to trust it: right on {metrics.accuracy(truth, answers):.0%} of {len(truth)} notes that you tagged; "
        f"always saying '{most}' is on {metrics.accuracy(truth, [most] * len(truth)):.0%}"
    )


if __name__ == "__main__":
    main()
