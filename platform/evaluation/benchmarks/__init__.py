"""Benchmarks as their publishers wrote them: their files, what is asked of a system, and how an answer is graded.

Each is a module with a `read` and a `grade`; `registry` is the table of all.
"""
