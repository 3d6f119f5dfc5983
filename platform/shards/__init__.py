"""Shards in Parquet: curated documents (`documents`) and packed tokens (`tokens`).

`row_groups` reads token shards, verified, a row group at a time; `receipts` lets a killed job go on.
"""
