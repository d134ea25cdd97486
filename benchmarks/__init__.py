"""What `benchmark.py` measures: one module per `--what`, and what they share."""
