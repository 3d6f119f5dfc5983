"""The report of a curation: findings that tasks collect, and the page made of them."""
