"""Which samples a step reads: sizes, buckets, and the order of batches."""
