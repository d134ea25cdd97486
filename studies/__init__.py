"""The study: the paper's main table and ablation in small. `study.py` is its command line."""
