"""Checkpoints: written while training goes on (`saver`), found and kept (`catalog`), resumed by any group of workers
(`resumption`).
"""
