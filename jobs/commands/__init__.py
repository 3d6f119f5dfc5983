"""The command `calumma`: one module a subcommand, put together in `main`."""
