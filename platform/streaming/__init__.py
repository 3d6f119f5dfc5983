"""From token shards to a training worker's tensors: the mixture, the plan of micro-batches, Ray Data.

Start reading at `plan`: which micro-batches make up step n.
"""
