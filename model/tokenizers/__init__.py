"""Text and image tokenizers: each turns its modality into ids, or codes, and back."""
