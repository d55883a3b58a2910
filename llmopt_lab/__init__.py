"""Seven LLM inference optimizations, each as a reference, a Triton kernel and a picture."""

__version__ = "0.1.0"
