"""SentencePiece's BPE as a tokenizer of the ``tokenizers`` library: pieces with scores in, merges out.

SentencePiece joins the neighbours whose piece has the highest score; the library joins the pair of the lowest rank. So every way to cut a
piece in two is a pair, and pairs have the order of their pieces' scores. Must never know a file.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, normalizers

#: SentencePiece's sign for a blank.
BLANK = "\u2581"


def sentencepiece_tokenizer(ids: dict[str, int], scores: Mapping[str, float], *, unknown: str | None, prefix: bool) -> Tokenizer:
    """``ids``: of all pieces; ``scores``: of those that are made by merges. Characters without a piece become their bytes (``<0x0A>``).
    ``prefix``: a blank is put before every text."""
    bytes_too = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    model = models.BPE(vocab=ids, merges=merges(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too)
    tokenizer = Tokenizer(model)
    blanks = normalizers.Replace(" ", BLANK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), blanks]) if prefix else blanks
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges(ids: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs by which pieces with ``scores`` are made of others, the ones to be joined first at the front."""
    found = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]
