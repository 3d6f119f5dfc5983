"""Which jobs there are (`table`), and how a YAML file becomes one's specification (`reading`)."""
