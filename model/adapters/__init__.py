"""Low-rank adapters (`ops/adapter.py`) in folders as PEFT has them (`files`), under Hugging Face's names (`names`), and
merged into a model directory (`merging`)."""
