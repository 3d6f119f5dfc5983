"""The steps of a curation: filters, scrubbing, decontamination, scores and duplicates.

`chain` holds those that look at one document alone; `staging` is what one phase leaves for the next.
"""
