"""Data: shards and folders, the plan, the reader, and the embedded picture sets (shapes, emoji)."""
