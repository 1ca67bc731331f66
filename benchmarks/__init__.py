"""The packed mixture against what a user would run instead, side by side in one run: `python -m benchmarks --help`."""
