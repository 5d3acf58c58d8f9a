"""Models for other runtimes, each compared there with what it was made from."""
