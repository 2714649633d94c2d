"""Sampling of the next token, as a definition in numpy; and grammars that constrain it."""
