"""The linear Transformer: a matrix memory a head, with additive, delta or gated delta writes."""
