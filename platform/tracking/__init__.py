"""MLflow: the server, runs, the model registry, and the outbox that keeps what a server away has not taken yet.

A job's run begins in `job_run`; `fingerprints` says whether a result is reusable.
"""
