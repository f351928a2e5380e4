"""What a transformers model is: where keys and values are made, how they are normalised, rotated and attended to."""
