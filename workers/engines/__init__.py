"""Engines, all behind :class:`workers.protocol.engine.Engine`: portable (PyTorch and Triton), TensorRT-LLM, and a fake for tests."""
