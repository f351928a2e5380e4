"""From a model, its statistics and a budget to an adapter: factors, ranks and widths, and what they cost in nats."""
