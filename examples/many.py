"""Many completions with the asyncio client, at most --at-once at the same time, as in a batch job or an evaluation.

A router refuses requests when its queue is full; the error says when to retry.
"""

from __future__ import annotations

import asyncio

import where

from trireme import AsyncClient, Overloaded


async def run(endpoints: list[str], model: str, prompts: list[str], at_once: int) -> list[str]:
    """The answers, in the order of ``prompts``."""
    places = asyncio.Semaphore(at_once)
    async with AsyncClient(endpoints, model=model) as client:

        async def one(index: int, prompt: str) -> str:
            async with places:
                while True:
                    try:
                        reply = await client.complete(prompt, max_tokens=16, temperature=0.8, seed=index, deadline_s=300).result()
                    except Overloaded as error:
                        await asyncio.sleep(error.retry_after or 1.0)
                    else:
                        return reply.text

        return await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))


def main() -> None:
    parser = where.options(__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    prompts = [f"The number {number} is" for number in range(args.count)]
    answers = asyncio.run(run(where.routers(args), args.model, prompts, args.at_once))
    for prompt, answer in list(zip(prompts, answers, strict=True))[:3]:
        print(repr(prompt + answer))
    print(f"{len(answers)} answers")


if __name__ == "__main__":
    main()
