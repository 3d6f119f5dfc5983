"""A model in training, built without ever being whole on one worker: its place first, then each worker's weights."""
