"""The commands of `lexi-adapter`, one module each; what a command needs beyond its options is imported when it runs."""
