"""From video files to batches: tables, buckets, the plan, decoding, caches. NumPy only."""
