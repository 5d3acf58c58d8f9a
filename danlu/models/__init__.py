"""Models: a config class and a module in one file, with its tables beside it."""
