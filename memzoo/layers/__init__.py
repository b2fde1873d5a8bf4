"""nn.Modules of the memories: projections, convolutions, gates, one operator call and a state; one file per memory."""
