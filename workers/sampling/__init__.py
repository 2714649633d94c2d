"""How the next token is chosen, as a definition in numpy; and grammars that constrain it."""
