"""Run to directory."""
