"""Sweeps: a space of `tune_spaces` searched with one recipe, on Ray Tune and Optuna."""
