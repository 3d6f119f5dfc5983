"""A group of Ray Train workers that runs a loop: started (`fit`), supervised, resized, stopped and restarted."""
