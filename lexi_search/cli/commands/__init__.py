"""The subcommands of `lexi-search`, one module each; `show` has `plot` as well."""
