"""Pages of HTML and Markdown, with their images in place."""
