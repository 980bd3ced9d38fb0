"""A chat through the `openai` package. Run `hob serve --background` first."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:11435/v1", api_key="any")
stream = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Why is the sky blue? One sentence."}],
    max_tokens=60,
    stream=True,
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
