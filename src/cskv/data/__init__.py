"""Text: sources by name, token samples packed from them, and LongEval lines."""
