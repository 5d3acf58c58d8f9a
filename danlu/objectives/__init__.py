"""What is learned: how rows become a batch, and how outputs become sums and counts."""
