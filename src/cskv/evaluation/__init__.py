"""Measuring a model, compressed or not: accuracy, perplexity, bytes, speed and spectra."""
