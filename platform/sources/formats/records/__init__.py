"""Records: their containers (JSON lines and arrays, CSV, Parquet, Arrow), and what of these damage leaves."""
