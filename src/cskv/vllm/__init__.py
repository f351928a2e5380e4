"""Serving with vLLM: checkpoints that it loads, and the plugin that reads them."""
