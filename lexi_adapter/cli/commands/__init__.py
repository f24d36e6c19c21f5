"""The subcommands of `lexi-adapter`, one module each."""
