"""Speed relative to other implementations of the same work: `python -m benchmarks --out=FILE [name ...]`."""
