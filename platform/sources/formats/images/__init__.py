"""Images with words: pairs, samples of files and archives, and pages of parallel lists."""
