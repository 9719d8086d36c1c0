"""Passes: one file each, a folder where a family grows. They import the core and never one another."""
