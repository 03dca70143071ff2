"""The commands of the `interlock` command line, a module for each, and what they have in common."""
