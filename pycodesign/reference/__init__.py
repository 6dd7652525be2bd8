"""The specification of every family as naive NumPy: one file each, no compiled code."""
