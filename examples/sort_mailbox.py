"""Sort new mail into the folders you made, by a head that learns from the mail already in them.

    python examples/sort_mailbox.py ~/Maildir            say where each new message would go
    python examples/sort_mailbox.py ~/Maildir --move     and move it

The Maildir's sub-folders are the labels. What the head is not sure of, and what looks unlike anything in the folders,
stays in the inbox. Mail does not leave the machine.
"""

from __future__ import annotations

import argparse
import mailbox
from email.header import decode_header, make_header
from email.message import Message
from pathlib import Path

import hob
from hob.tasks.files import in_calls, trust_lines

TASK = "mailbox"
MAX_CHARS = 2000


def main() -> None:
    """Learn, then sort."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("maildir", type=Path)
    parser.add_argument("--move", action="store_true")
    args = parser.parse_args()
    inbox = mailbox.Maildir(args.maildir, create=False)
    with hob.Client(app="mailbox") as client:
        examples = [
            {"text": text_of(message), "label": folder}
            for folder in inbox.list_folders()
            for message in inbox.get_folder(folder)
        ]
        client.train_task(TASK, examples)
        print(client.trained_task(TASK)["reason"])
        print("\n".join(trust_lines(client.task(TASK))))
        keys = list(inbox.keys())
        texts = [text_of(inbox[key]) for key in keys]
        answers = list(in_calls(texts, lambda some: client.run_task(TASK, some)))
    for key, answer in zip(keys, answers, strict=True):
        target = None if answer["out_of_domain"] else answer["label"]
        subject = str(make_header(decode_header(inbox[key].get("Subject", "(no subject)"))))
        print(f"{target or 'inbox':12} {answer['probability']:.2f}  {subject[:60]}")
        if target and args.move:
            inbox.get_folder(target).add(inbox[key])
            inbox.remove(key)


def text_of(message: Message) -> str:
    """Sender, subject and the beginning of the plain text."""
    body = ""
    for part in message.walk():
        if part.get_content_type() == "text/plain" and not body:
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                body = payload.decode(part.get_content_charset() or "utf-8", "replace")
    return f"{message.get('From', '')}\n{message.get('Subject', '')}\n\n{body[:MAX_CHARS]}"


if __name__ == "__main__":
    main()
