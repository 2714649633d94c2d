"""One chat message over ZeroMQ RPC; the answer is printed while it streams.

The client keeps a journal of the answer. With several --router, it continues at another router when one dies, without a gap or a repeated
token.
"""

from __future__ import annotations

import where

from trireme import Client


def main() -> None:
    parser = where.options(__doc__)
    parser.add_argument("message", nargs="?", default="What is the capital of France?")
    args = parser.parse_args()
    with Client(where.routers(args), model=args.model) as client:
        call = client.chat([{"role": "user", "content": args.message}], max_tokens=64, temperature=0.0, deadline_s=60)
        for piece in call.stream():
            print(piece.text, end="", flush=True)
        print()
        choice = call.result().choices[0]
        print(f"[{choice.finish_reason}: {choice.usage.prompt_tokens} tokens in, {choice.usage.output_tokens} out]")


if __name__ == "__main__":
    main()
