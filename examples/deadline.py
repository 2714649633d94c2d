"""Deadlines, cancelling, and error messages.

Every error says what happened, why, and what to do; ``error.request`` is the id that `trireme debug story` takes.
"""

from __future__ import annotations

import where

from trireme import Client, DeadlineExceeded, NotFound, Rejected, TriremeError


def main() -> None:
    args = where.options(__doc__).parse_args()
    with Client(where.routers(args), model=args.model) as client:
        try:
            client.complete("Once upon a time", max_tokens=1000, ignore_eos=True, deadline_s=0.3).result()
        except DeadlineExceeded as error:
            print("too late:", error, "| request", error.request)

        call = client.complete("Once upon a time", max_tokens=1000, ignore_eos=True)
        for piece in call.stream():
            if piece.first + len(piece.tokens) >= 5:
                call.cancel()
                break
        print("cancelled after 5 tokens: its place is free again")

        for kind, body in (("a model that is not served", {"model": "no-such-model"}), ("a wrong parameter", {"temperature": -1})):
            try:
                client.complete("hello", **body).result()
            except (NotFound, Rejected) as error:
                print(f"{kind}: {error}")
            except TriremeError as error:
                raise SystemExit(f"not expected: {error}") from error


if __name__ == "__main__":
    main()
