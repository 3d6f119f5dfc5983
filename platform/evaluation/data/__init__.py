"""The benchmarks' files: fetched, and known by their checksums."""
