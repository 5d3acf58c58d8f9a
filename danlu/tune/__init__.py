"""The search for good settings: many short runs of one recipe, each a run folder."""
