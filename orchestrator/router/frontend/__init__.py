"""From a request's body to token ids, and from token ids to text: what HTTP and RPC have in common.

Schemas and their checks, chat templates, tokenizers, structured output, tool-call parsing, and the confined processes that run templates
and try grammars.
"""
