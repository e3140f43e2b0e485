"""Measurements that back what the documents say; each writes its records to `results/`."""
