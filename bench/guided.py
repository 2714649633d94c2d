"""Counts answers that follow a schema but do not end: ``python -m bench.guided URL [--seeds 10] [--streams 16] [--unbounded]``.

Asks a running deployment for 20 schemas × seeds at temperature 1, with at most 400 tokens, and checks each answer against its schema with
jsonschema. Prints how many fit, how many were cut at their length, and the longest run of white space outside of strings. With
``--unbounded``, white space may have any length; without this flag, the exit code is 1 if an answer is cut.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema

MAX_TOKENS = 400
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?')
_SPACE = re.compile(r"\s+")

WORD = {"type": "string", "maxLength": 12}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def some(items: dict[str, Any], fewest: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}


SCHEMAS: list[dict[str, Any]] = [
    record(xs=some(DIGIT, 2, 4)),
    record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    record(ok={"type": "boolean"}, why=WORD),
    record(colour={"enum": ["red", "green", "blue"]}, shade={"enum": ["light", "dark"]}),
    record(point=record(x=DIGIT, y=DIGIT), label=WORD),
    record(places=some(record(city=WORD, country={"enum": ["IT", "FR", "DE"]}), 1, 3)),
    some(some(DIGIT, 2, 2), 2, 3),
    record(date={"type": "string", "format": "date"}, time={"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}),
    record(id={"type": "string", "format": "uuid"}),
    record(phone={"type": "string", "pattern": r"^\d{3}-\d{4}$"}, kind={"enum": ["home", "work"]}),
    record(value={"anyOf": [{"type": "null"}, DIGIT, WORD]}),
    record(a=record(b=record(c=record(d=DIGIT)))),
    record(tags=some({"type": "string", "pattern": "^[a-z]{2,8}$"}, 1, 5)),
    record(matrix=some(some({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5}, 3, 3), 3, 3)),
    {"type": "object", "properties": {"a": DIGIT, "b": WORD, "c": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^[a-z]{1,8}$": DIGIT}, "additionalProperties": False, "minProperties": 1, "maxProperties": 3},
    {"anyOf": [record(cat=DIGIT), record(dog=WORD)]},
    {"$ref": "#/$defs/Leaf", "$defs": {"Leaf": record(n=DIGIT, word=WORD)}},
    record(email={"type": "string", "pattern": "^[a-z]{1,10}@[a-z]{1,10}\\.(com|org)$"}),
    {"enum": ["yes", "no", {"maybe": [1, 2]}]},
]


def ask(http: httpx.Client, schema: dict[str, Any], seed: int, extra: dict[str, Any]) -> tuple[str, str]:
    """(text, finish reason)."""
    body = {
        "messages": [{"role": "user", "content": "Give me one example as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}},
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": MAX_TOKENS,
        **extra,
    }
    answer = http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def longest_space(text: str) -> int:
    """Longest run of white space outside of strings, characters."""
    return max(map(len, _SPACE.findall(_STRING.sub('""', text))), default=0)


def fits(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--unbounded", action="store_true")
    options = parser.parse_args()
    extra: dict[str, Any] = {"guided_whitespace_pattern": r"[ \t\n\r]+"} if options.unbounded else {}
    cases = [(schema, seed) for schema in SCHEMAS for seed in range(options.seeds)]
    with httpx.Client(base_url=options.url, timeout=600.0, trust_env=False) as http, ThreadPoolExecutor(options.streams) as pool:
        extra["model"] = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        answers = list(pool.map(lambda case: ask(http, *case, extra), cases))
    right = sum(fits(text, schema) for (text, _), (schema, _) in zip(answers, cases, strict=True))
    cut = [(index, text) for index, (text, reason) in enumerate(answers) if reason != "stop"]
    space = max(longest_space(text) for text, _ in answers)
    print(f"{len(answers)} answers: {right} fit their schema, {len(cut)} cut at {MAX_TOKENS} tokens; {space} blanks in a row at most")
    for index, text in cut[:5]:
        print(f"  schema {index // options.seeds}, seed {index % options.seeds}: {text[-80:]!r}")
    return int(right < len(answers) and not options.unbounded)


if __name__ == "__main__":
    sys.exit(main())
