"""What models are made of: attention, positions, feed-forward layers, norms, heads, caches."""
