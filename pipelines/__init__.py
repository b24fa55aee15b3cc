"""The engine room: recipes, Ray, Parquet, diffusers, MLflow and the command line around `hd_core`."""

import os

# Torch's threads spin while they wait for each other. With anything else on the same cores, a step of a small network
# took 277 to 3,700 ms instead of 42 that way, so they sleep instead. It is read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
