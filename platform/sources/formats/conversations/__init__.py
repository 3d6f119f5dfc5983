"""Conversations: turns however records hold them, and the marks for their images."""
