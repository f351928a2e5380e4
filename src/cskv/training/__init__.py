"""Layer-wise reconstruction training of a compressor (paper, section 3.2)."""
