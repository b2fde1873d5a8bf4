"""sDNC: the causal Transformer as a stateless differentiable neural computer, and the DNC's extensions of it."""
