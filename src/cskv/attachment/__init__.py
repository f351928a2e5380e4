"""The compressor on a transformers model: hooks, the layer of the cache, and the step that joins them."""
