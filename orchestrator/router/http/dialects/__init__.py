"""HTTP dialects: what a family of clients sends and expects back (OpenAI; KServe and Triton)."""
