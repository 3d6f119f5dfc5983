"""A Ray cluster, embedded in this process or connected to: its capacity, tasks on it, the runner of jobs, progress.

Start reading at `runner`; `head` is the Ray head of `calumma serve start`.
"""
