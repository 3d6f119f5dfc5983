"""What a person or a cluster starts: one file a job (`python -m calumma.jobs.NAME`), the command line,
the quickstart.

`entry` runs a job from its specification; `specifications/table` names all jobs.
"""
