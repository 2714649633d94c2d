"""The same server from the `openai` package: `pip install openai`."""

from __future__ import annotations

import where
from openai import OpenAI


def main() -> None:
    args = where.options(__doc__).parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": "Name three colours."}],
        max_tokens=32,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")


if __name__ == "__main__":
    main()
