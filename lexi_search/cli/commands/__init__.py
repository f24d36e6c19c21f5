"""The subcommands of `lexi-search`, one module each; `show` holds `plot` as well."""
