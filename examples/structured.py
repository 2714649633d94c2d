"""An answer that follows a JSON schema, and the probability of each of its tokens. Needs the extra `guided` on the server."""

from __future__ import annotations

import json
import math

import where

from trireme import Client

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "minimum": 0, "maximum": 99_000_000}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def main() -> None:
    args = where.options(__doc__).parse_args()
    with Client(where.routers(args), model=args.model) as client:
        reply = client.chat(
            [{"role": "user", "content": "Name a big city and how many people live there, as JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
            max_tokens=100,
            seed=1,
            logprobs=True,
        ).result()
    choice = reply.choices[0]
    print(json.loads(choice.text))
    for token, score in list(zip(choice.tokens, choice.logprobs or [], strict=True))[:5]:
        print(f"  token {token}: probability {math.exp(score.logprob):.3f}")


if __name__ == "__main__":
    main()
