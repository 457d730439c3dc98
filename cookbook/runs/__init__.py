"""The files that a run leaves on disk: the names, formats and records of its folder, written and read only
here.
"""
