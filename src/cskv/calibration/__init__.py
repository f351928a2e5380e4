"""Statistics of a model's layers over text, taken by hooks in one streaming pass."""
