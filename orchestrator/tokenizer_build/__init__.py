"""``tokenizer.json`` for a folder that has its tokenizer in another form: SentencePiece, vocabulary and merges, tekken, tiktoken."""
