"""Pure linear algebra: weights, statistics and a rank give low-rank factors."""
