"""The object store: blobs by digest, and their collection."""
