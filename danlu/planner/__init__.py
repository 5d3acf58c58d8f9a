"""What a run will cost, on which machine it fits, and which technique to choose, before it starts."""
