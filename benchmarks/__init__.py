"""One file a claim: `python -m benchmarks.NAME [--quick]` prints a table and, last, one JSON line of its figures."""
