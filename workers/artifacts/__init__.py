"""Model files: what a folder or file holds, and how it is converted to a TensorRT-LLM checkpoint for any layout.

Reads Hugging Face folders, GGUF files and checkpoints as one kind of :class:`~workers.artifacts.source.Source`. Imports no torch:
conversion runs where no engine is installed.
"""
