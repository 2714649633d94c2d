"""OpenAI's API with vLLM's additions: chats, completions, models."""
