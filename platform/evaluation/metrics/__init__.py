"""What answers are worth: pure functions of texts, pictures and numbers. No model of ours, no cluster, no files."""
