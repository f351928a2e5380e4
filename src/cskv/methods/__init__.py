"""Cache methods: the compressed cache, the uncompressed one, dropped tokens, and quantised channels.

Every method is put on a model in the same way (`cskv.methods.method.Method`), so that one measurement serves all.
"""
