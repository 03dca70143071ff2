"""Callbacks: the base class, and a file for each built-in one."""
