"""Attaching a compressor to a transformers model. The only room that knows transformers' internals."""
