"""Paged attention: a KV cache cut into fixed blocks."""
