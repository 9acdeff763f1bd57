"""From leased groups to packed micro batches."""
