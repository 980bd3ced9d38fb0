"""Forty jobs, eight at a time, in the background class. Run `hob serve --background` first."""

from concurrent.futures import ThreadPoolExecutor

from hob import Client

words = ["sun", "moon", "rain", "snow", "sea", "hill", "tree", "rose", "cat", "dog"]
jobs = [f"Write one short line about a {mood} {word}." for mood in ("red", "cold", "tiny", "loud") for word in words]
client = Client(app="batch", service_class="background")
with ThreadPoolExecutor(8) as pool:
    for reply in pool.map(lambda job: client.chat(job, max_tokens=24), jobs):
        print(reply["choices"][0]["message"]["content"])
