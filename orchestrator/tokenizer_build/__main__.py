"""The process that builds a tokenizer: ``python -m orchestrator.tokenizer_build FOLDER TARGET``.

The last line of its errors says what failed.
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

from workers.process import die_with_parent


def main(folder: str, target: str) -> None:
    die_with_parent()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        sys.exit(f"transformers reads it as {type(tokenizer).__name__}, which has no form for tokenizer.json")
    tokenizer.save_pretrained(target)


main(*sys.argv[1:])
