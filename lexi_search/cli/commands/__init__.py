"""The commands of `lexi-search`, one module for each thing that a user does."""
