"""The compressor of one base model: its factors as a module, its folder, its card, and the facts of that model."""
