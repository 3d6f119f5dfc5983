"""What a training would need, before anything starts: memory, network, time, cost. Arithmetic alone.

Start reading at `forecast.py`. The order of the data, which elsewhere is called the plan, is another thing.
"""
