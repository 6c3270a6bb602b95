"""What an adapter learnt, layer by layer, from its files alone."""
