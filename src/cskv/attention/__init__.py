"""Attention over the two branches of a compressed cache: latents of old tokens, exact keys and values of the newest.

Old keys and values never exist at full size. A value is U_v c, so the weights are summed with the latents c first and
U_v is applied once per query head. A key that is a linear function of its latents is absorbed in the same way, by
giving U_k^T to the query; a key that is rotated after it was rebuilt is rebuilt a tile of tokens at a time. The two
branches are joined by the log-sum-exp of their logits, so the result is that of one softmax over all tokens.

`attend` is the way in and computes with torch on any device, `triton` has kernels for a GPU, and `reference` says what
is computed.
"""
